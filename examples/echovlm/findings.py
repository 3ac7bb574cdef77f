"""Reads a report's findings back into attributes, for a finding-level score that sees negation and measurements.

The vocabulary is that of the phantoms (phantom/attributes.py). What the text does not state, or states in words
that are not known here, is missing from the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from examples.echovlm.phantom.attributes import KINDS
from moe_adapter.errors import MoEAdapterError

# attribute -> value -> pattern; "lesion" also has words for an unnamed lesion, which count when negated
TERMS: dict[str, dict[str, dict[str, str]]] = {
    "en": {
        "lesion": {
            "cyst": r"\bcysts?\b|\bcystic\b",
            "nodule": r"\bnodules?\b",
            "calcification": r"\bcalcifications?\b|\bcalcified nodule",
            "mass": r"\bmass(es)?\b|\btumou?rs?\b|\bfibroids?\b|\bmyomas?\b|\bdermoids?\b",
            "stone": r"\bstones?\b|\bcalcul(us|i)\b",
            "hydronephrosis": r"\bhydronephrosis\b|\bdilated (renal pelvis|collecting system)",
            "plaque": r"\bplaques?\b",
            "thrombus": r"\bthromb(us|osis)\b",
            "effusion": r"\beffusions?\b",
            "dilatation": r"\bdilat(ed|ation)\b|\benlarged\b",
            "regurgitation": r"\bregurgita(tion|nt)\b",
            "none": r"\bfocal lesions?\b|\babnormalit(y|ies)\b",
        },
        "side": {"left": r"\bleft\b", "right": r"\bright\b"},
        "site": {"ovary": r"\bovar(y|ian|ies)\b", "uterus": r"\buter(us|ine)\b|\bmyometri"},
        "position": {
            "subcapsular": r"\bsubcapsular\b",
            "deep": r"\bdeep\b",
            "upper pole": r"\bupper pole\b",
            "lower pole": r"\blower pole\b",
            "near wall": r"\b(near|anterior) wall\b",
            "far wall": r"\b(far|posterior) wall\b",
        },
        "shape": {"round": r"\bround\b", "oval": r"\boval\b", "irregular": r"\birregular\b"},
        "echogenicity": {
            "anechoic": r"\banechoic\b",
            "hypoechoic": r"\bhypo-?echoic\b",
            "hyperechoic": r"\bhyper-?echoic\b",
        },
        "posterior": {"enhancement": r"\benhancement\b", "shadow": r"\bshadow"},
        "flow": {
            "toward": r"\btowards? the (probe|transducer)",
            "away": r"\baway from the (probe|transducer)",
            "absent": r"\bno (colour |color )?flow\b|\bflow is absent\b|\babsence of flow\b",
        },
        "pattern": {"laminar": r"\blaminar\b", "aliasing": r"\baliasing\b"},
    },
    "zh": {
        "lesion": {
            "cyst": r"囊肿",
            "nodule": r"结节",
            "calcification": r"钙化",
            "mass": r"肿块|肿物|肌瘤|畸胎瘤",
            "stone": r"结石",
            "hydronephrosis": r"积水",
            "plaque": r"斑块",
            "thrombus": r"血栓",
            "effusion": r"积液",
            "dilatation": r"扩大|扩张|增大",
            "regurgitation": r"反流|返流",
            "none": r"局灶性病变|占位|异常",
        },
        "side": {"left": r"左", "right": r"右"},
        "site": {"ovary": r"卵巢|附件", "uterus": r"子宫|肌层"},
        "position": {
            "subcapsular": r"包膜下",
            "deep": r"深部",
            "upper pole": r"上极",
            "lower pole": r"下极",
            "near wall": r"前壁",
            "far wall": r"后壁",
        },
        "shape": {"round": r"(?<!椭)圆形", "oval": r"椭圆形", "irregular": r"不规则"},
        "echogenicity": {"anechoic": r"无回声", "hypoechoic": r"低回声", "hyperechoic": r"高回声|强回声"},
        "posterior": {"enhancement": r"增强", "shadow": r"声影"},
        "flow": {
            "toward": r"朝向探头",
            "away": r"(背离|远离)探头",
            "absent": r"(无|未见)(彩色)?血流|血流信号消失",
        },
        "pattern": {"laminar": r"层流", "aliasing": r"混叠"},
    },
}
CLAUSE_END = {
    "en": r"[.;:](?!\d)|\bbut\b|\bexcept\b|,\s*(?=(?:an?|one|the|with)\b)",
    "zh": r"[。;:\uff1b\uff1a]|但|[,\uff0c](?!未|无|没)(?=.{0,8}(?:见|探及|血流))",
}
NEGATOR = {
    "en": r"\b(no|not|without|free of|absence of|negative for|neither|nor)\b",
    "zh": r"未见|未探及|未发现|无(?!回声)|没有|排除",
}
NEGATED_AFTER = {"en": r"\W*(is|are|was|were)\s+(not|absent|excluded)\b", "zh": r"\W*(不存在|消失)"}
SIZE = r"\d+(?:\.\d+)?(?:\s*[x×*]\s*\d+(?:\.\d+)?)*\s*(mm|cm|毫米|厘米)"
STATED_IN_NEGATION = ("side", "flow")  # "no mass in the left breast" is about the left breast


def parse_findings(text: str, organ: str, language: str) -> dict[str, str]:
    """The attributes that a report's findings state, e.g. {"lesion": "cyst", "side": "left", "size_mm": "14"}.

    `lesion` is "none" where lesions are mentioned only to be denied. For one of the phantoms' organs, words that
    are not of its vocabulary are passed over; any other organ is read with the whole vocabulary.
    Raises MoEAdapterError for a language other than "en" and "zh".
    """
    if language not in TERMS:
        raise MoEAdapterError(f"language: got {language!r}; expected one of {', '.join(TERMS)}; translate or leave out")
    text = text.lower()
    mentions = sorted(_mentions(text, language), key=lambda m: m[0])
    found: dict[str, str] = {}
    denied = False
    for _, name, value, negated in mentions:
        if not _in_vocabulary(organ, name, value):
            continue
        if name == "lesion" and (negated or value == "none"):
            denied |= negated
        elif not negated or name in STATED_IN_NEGATION:
            found.setdefault(name, value)
    if denied:
        found.setdefault("lesion", "none")
    kept = _attributes_of(organ, found.get("lesion"))
    return {name: value for name, value in found.items() if kept is None or name in kept}


def _mentions(text: str, language: str) -> Iterator[tuple[int, str, str, bool]]:
    """Position, attribute, value and whether it is denied, of every term in the text."""
    start = 0
    for clause in re.split(f"({CLAUSE_END[language]})", text):
        negation = re.search(NEGATOR[language], clause)
        scope = negation.start() if negation else len(clause)
        for name, values in TERMS[language].items():
            for value, pattern in values.items():
                for match in re.finditer(pattern, clause):
                    after = re.match(NEGATED_AFTER[language], clause[match.end() :])
                    yield start + match.start(), name, value, match.start() >= scope or after is not None
        for match in re.finditer(SIZE, clause):
            factor = 10 if match[1] in ("cm", "厘米") else 1
            largest = max(float(number) for number in re.findall(r"\d+(?:\.\d+)?", match[0])) * factor
            yield start + match.start(), "size_mm", f"{largest:g}", match.start() >= scope
        start += len(clause)


def _in_vocabulary(organ: str, name: str, value: str) -> bool:
    if organ not in KINDS or name == "size_mm" or (name, value) == ("lesion", "none"):
        return True
    return any(value in kind.get(name, ()) for kind in KINDS[organ])


def _attributes_of(organ: str, lesion: str | None) -> set[str] | None:
    """The attributes that a finding of this kind can have; None: any."""
    kinds = [kind for kind in KINDS.get(organ, ()) if lesion in kind["lesion"]]
    return set().union(*kinds) if kinds else None
