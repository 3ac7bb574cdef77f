"""Which organs a text speaks of: the paper's seven, and those that an examination may take in besides.

The bladder is not among them: it is the window to what lies behind it.
"""

from __future__ import annotations

import re

WORDS = {
    "thyroid": r"\bthyroid|甲状腺",
    "breast": r"\bbreasts?\b|\bmammary\b|\bnipple|\bbi-?rads\b|乳腺|乳房|乳头",
    "liver": r"\bliver\b|\bhepatic\b|\bintrahepatic\b|肝(?!素)",
    "kidney": r"\bkidneys?\b|\brenal\b|\bpelvicalyceal\b|肾(?!上腺)",
    "gynaecology": r"\buter(us|ine)\b|\bovar(y|ies|ian)\b|\b(endo|myo)metri|\badnexa|\bcervix\b|子宫|卵巢|附件区|宫腔",
    "vessel": r"\bcarotid|\bjugular\b|颈总?动脉|颈[内外][动静]脉|椎动脉|锁骨下动脉|股(总|浅|深)?[动静]脉|腘[动静]脉|"
    r"大隐静脉|\b(femoral|popliteal|saphenous|vertebral|subclavian|brachial) (artery|arteries|veins?)\b",
    "heart": r"\bheart\b|\bcardiac\b|\b(left|right) (ventric|atri)|\bventric(le|ular)\b|\bmitral\b|\btricuspid\b|"
    r"\bchambers\b|\bfour[- ]chamber|\bpericardial\b|\bechocardiogra|心[脏腔尖室房包]|四腔心|[二三]尖瓣|主动脉瓣",
    "gallbladder": r"\bgall ?bladder\b|\bcholecyst|胆囊",
    "spleen": r"\bspleen\b|\bsplenic\b|脾",
    "pancreas": r"\bpancrea|胰",
    "prostate": r"\bprostat|前列腺",
    "testis": r"\btest(is|es|icular)\b|\bscrot|\bepididym|睾丸|附睾|阴囊",
    "obstetrics": r"\bfo?etal\b|\bfo?etus\b|\bplacenta|\bgestational sac\b|胎儿|胎盘|孕囊",
}
_PATTERNS = {organ: re.compile(words, re.IGNORECASE) for organ, words in WORDS.items()}


def organs_in(text: str) -> tuple[str, ...]:
    """The organs that a report, or the body part of a header, speaks of, in the order of their first mention.

    A denied organ counts as well: "no lesion in the liver" is about the liver. So does one it is compared with.
    """
    first = {organ: match.start() for organ, pattern in _PATTERNS.items() if (match := pattern.search(text))}
    return tuple(sorted(first, key=first.__getitem__))
