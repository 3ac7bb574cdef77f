"""Takes identifiers out of report texts: words that are known to be ones, and what looks like one.

The patterns find dates, telephone numbers, e-mail and web addresses, long or labelled numbers, names behind a title
or a label, and institutions, in English and Chinese. They do not find a name that nothing announces ("seen by Miller
today"), nor nicknames, places or occupations: read a sample of what comes out before it leaves the house.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|sept|oct|nov|dec)[a-z]*\.?"
_CAPITALISED = r"[A-Z][\w'’-]+(?:[ \t]+(?:[A-Z]\.|(?:van|von|de|der|al)\b|[A-Z][\w'’-]+)){0,3}"
_FULL = rf"{_CAPITALISED}(?:,[ ]{_CAPITALISED})?"
_ROLE = "patient|physician|doctor|radiologist|sonographer|operator|technician|nurse"
_DEED = "reported|performed|signed|dictated|reviewed|read|interpreted"
_DOCTOR = "(?:医师|医生)"
_HAN = r"[\u4e00-\u9fff]"
# Behind a date only: "at 10:30" of a breast is a place.
_CLOCK = r"(?:[T,，]?[ \t]*\d{1,2}[:：]\d{2}(?:[:：]\d{2}(?:\.\d+)?)?(?:[ \t]*(?:[AaPp][Mm]\b|[ap]\.m\.))?)?"
_YEAR, _DAY = r"(?:19|20)\d{2}", r"(?:0?[1-9]|[12]\d|3[01])"

# Kind -> patterns, applied in this order; where a pattern has a group, the group alone is replaced.
PATTERNS: dict[str, tuple[str, ...]] = {
    "address": (r"(?i)\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+", r"(?i)\bhttps?://\S+|\bwww\.\S+"),
    "date": (
        rf"(?<![\d.]){_YEAR}[-/.](?:0?[1-9]|1[0-2])[-/.]{_DAY}(?![\d]){_CLOCK}",
        rf"(?<![\d.])\d{{1,2}}[-/.]\d{{1,2}}[-/.](?:{_YEAR}|\d{{2}})(?![\d]|\s*(?:mm|cm|x\b|×)){_CLOCK}",
        rf"(?<!\d){_YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\d)",
        rf"(?i)\b{_DAY}(?:st|nd|rd|th)?[ -]{_MONTH},?[ -]{_YEAR}\b{_CLOCK}",
        rf"(?i)\b{_MONTH}[ -]{_DAY}(?:st|nd|rd|th)?,?[ -]{_YEAR}\b{_CLOCK}",
        rf"(?:{_YEAR}|\d{{2}})[ ]?年[ ]?\d{{1,2}}[ ]?月(?:[ ]?{_DAY}[ ]?[日号])?{_CLOCK}",
        rf"(?<!\d)\d{{1,2}}月{_DAY}[日号]{_CLOCK}",
        r"(?<!\d)\d{1,2}[:：]\d{2}[:：]\d{2}(?!\d)",
    ),
    "telephone": (
        r"(?i)\b(?:tel|telephone|phone|fax|mobile)\b\.?(?:[ ]?(?:no|number)\b\.?)?[ ]?[:：]?[ ]?(\+?[\d() -]{6,20}\d)",
        r"(?:电话|手机|联系方式|传真)(?:号码?)?[ ]?[:：]?[ ]?(\+?[\d() -]{6,20}\d)",
        r"(?<![\d.])1[3-9]\d{9}(?!\d)",
        r"(?<![\d.])0\d{2,3}-\d{7,8}(?!\d)",
        r"(?<![\d.])\+\d{1,3}[ -]?\(?\d{1,4}\)?(?:[ -]?\d{2,4}){2,4}(?!\d)",
        r"(?<![\d.])\(\d{3}\)[ ]?\d{3}-\d{4}(?!\d)|(?<![\d.-])\d{3}-\d{3}-\d{4}(?!\d)",
    ),
    "id": (
        r"(?i)\b(?:mrn|(?:patient )?id|accession|acc|exam|study|record|case|ssn)\b\.?(?:[ ]?(?:no|nr|number|id)\b\.?)?"
        r"[ ]?[:：#][ ]?((?=[\w-]*\d)\w[\w-]{2,})",
        r"(?:住院|门诊|检查|超声|病历|病案|登记|身份证|就诊|床|影像|条码|病人|患者|卡)(?:号码?|编号|ID)[ ]?[:：]?[ ]?"
        r"([A-Za-z0-9-]+)",
        r"(?<![\w.])[A-Z]{1,4}-?\d{5,}(?!\w)",
        r"(?<![\w.])\d{17}[\dXx](?!\w)|(?<![\w.])\d{6,}(?!\w|\.\d|\s*(?:mm|cm|ml))",
    ),
    "name": (
        rf"\b(?:Dr|Prof|Mr|Mrs|Ms|Miss|DR|PROF)\b\.?[ ]*({_CAPITALISED}|[A-Z]{{2,}})",  # MR, MS: the mitral valve's
        rf"(?i:\b(?:{_ROLE}(?:'s)?(?:[ ]name)?|name(?: of patient)?|(?:{_DEED}) by)[ ]?[:：])[ ]*({_FULL})",
        rf"(?i:\b(?:{_DEED}|referred) by)[ ]+({_FULL})",
        rf"(?:姓名|签名|{_DOCTOR}|(?:报告|审核|检查|诊断|记录|申请|送检|操作|复核)[者人]|患者|病人)[ ]?[:：]"
        rf"[ ]*(?![男女])({_HAN}{{2,4}})(?!{_HAN})",
        rf"(?<!{_HAN})({_HAN}{{2,3}})(?:(?:副?主任|主治|住院)?{_DOCTOR}|主任|教授)(?!{_HAN}|[ ]?[:：])",
    ),
    "institution": (
        r"\b(?:[A-Z][\w.'’&-]*[ ]+){1,6}(?:Hospital|Clinic|(?:Medical|Health|Imaging) Cent(?:er|re)|Infirmary|"
        r"Healthcare|Radiology)\b(?:[ ]of(?:[ ][A-Z][\w-]+)+)?",
        r"\b(?:[A-Z]{2,}[ ]+){1,5}(?:HOSPITAL|CLINIC|MED(?:ICAL)? (?:CTR|CENTER|CENTRE)|INFIRMARY)\b",
        rf"(?:(?![在于到往赴请议]){_HAN}){{2,16}}(?:(?<!上级|当地|其他)医院|卫生院|诊所|医学中心|体检中心|保健院)",
    ),
}
_COMPILED = [(kind, re.compile(pattern, re.MULTILINE)) for kind, patterns in PATTERNS.items() for pattern in patterns]


def scrub(text: str) -> tuple[str, Counter[str]]:
    """The text with "[date]", "[name]" and so on in place of what looks like an identifier; how many of each kind."""
    counts: Counter[str] = Counter()
    for kind, pattern in _COMPILED:

        def mark(match: re.Match[str], kind: str = kind) -> str:
            counts[kind] += 1
            start, end = match.span(1) if match.re.groups and match.group(1) else match.span()
            return match[0][: start - match.start()] + f"[{kind}]" + match[0][end - match.start() :]

        text = pattern.sub(mark, text)
    return text, counts


def strike_out(text: str, words: Mapping[str, Sequence[str]]) -> tuple[str, Counter[str]]:
    """The text without the given words, by kind, in either case and as whole words; how many of each kind.

    "=" divides the scripts of a name, "^", "," and spaces its parts. They are found apart, and joined where the word is
    not ASCII ("王小东" by "王^小东").
    Words of fewer than two characters, or three Latin ones, are left: they would strike out ordinary text.
    """
    counts: Counter[str] = Counter()
    for kind, known in words.items():
        for word in sorted({script for name in known for script in name.split("=")}, key=len, reverse=True):
            parts = [re.escape(part) for part in re.split(r"[\s^,]+", word) if part]
            joint, shortest = (r"[\s^,]+", 3) if word.isascii() else (r"[\s^,]*", 2)
            if len(re.sub(r"[\s^,]", "", word)) < shortest:
                continue
            pattern = r"(?<![^\W_\u4e00-\u9fff])" + joint.join(parts) + r"(?![^\W_\u4e00-\u9fff])"
            text, struck = re.subn(pattern, f"[{kind}]", text, flags=re.IGNORECASE)
            counts[kind] += struck
    return text, +counts
