"""Identifiers in report texts: what is found, and what a report needs and keeps."""

from __future__ import annotations

import pytest

from examples.echovlm.corpus.scrub import scrub, strike_out

FOUND = [
    ("Compared with 2023-04-17.", "Compared with [date]."),
    ("Compared with 17.04.2023, stable.", "Compared with [date], stable."),
    ("Scan of 04/17/23 14:05:09 PM.", "Scan of [date]."),
    ("Prior: 3 March 2021; Mar 3, 2021.", "Prior: [date]; [date]."),
    ("Exam 20230417 reviewed.", "Exam [date] reviewed."),
    ("对比2023年4月17日 10:30检查，结节无变化。", "对比[date]检查，结节无变化。"),
    ("较4月17日增大。", "较[date]增大。"),
    ("Tel: +1 (555) 123-4567.", "Tel: [telephone]."),
    ("Call 555-123-4567.", "Call [telephone]."),
    ("电话：13812345678", "电话：[telephone]"),
    ("010-12345678", "[telephone]"),
    ("Write to a.b@example.org.", "Write to [address]."),
    ("MRN: 4471182", "MRN: [id]"),
    ("Accession no: AB-1234", "Accession no: [id]"),
    ("住院号：Z00123", "住院号：[id]"),
    ("超声号 20240001234", "超声号 [id]"),
    ("身份证号11010519491231002X", "身份证号[id]"),
    ("Film 1234567.", "Film [id]."),
    ("Seen with Dr. Mary Ann O'Neil today.", "Seen with Dr. [name] today."),
    (
        "Discussed with Prof. van Dyke",
        "Discussed with Prof. van Dyke",
    ),  # begins in lower case: not found, as documented
    ("Patient: John Smith, 45 y", "Patient: [name], 45 y"),
    ("Patient name: SMITH, JOHN", "Patient name: [name]"),
    ("Reported by: Jane Doe", "Reported by: [name]"),
    ("Performed by Jane Doe.", "Performed by [name]."),
    ("姓名：张三丰，女", "姓名：[name]，女"),
    ("审核医师：李四", "审核医师：[name]"),
    ("报告者:王小明", "报告者:[name]"),
    ("王医生会诊。", "王医生会诊。"),  # a single surname: not found, as documented
    ("李小明医生", "[name]医生"),
    ("Imaged at Saint Elsewhere Hospital.", "Imaged at [institution]."),
    ("BAPTIST MED CTR", "[institution]"),
    ("于北京协和医院复查。", "于[institution]复查。"),
]
KEPT = [
    "A 14 mm round anechoic cyst, 12 x 8 x 9 mm, volume 123456 mm.",
    "Mass at 10:30, 3 cm from the nipple; ratio 3:1, 2.5.1 is no date.",
    "MR Mild to moderate, MS Severe; EF 55.6 %, E/A 1.2, BI-RADS 4a, TI-RADS 3.",
    "甲状腺左叶见结节，大小约12×8mm，位于10点，血流1/3级。诊断：囊肿。检查：肝脏。患者：女性。",
    "建议上级医院复查，请结合临床，3个月后随访。",
    "Follow-up in 6 months; no change since the last study.",
]


@pytest.mark.parametrize(("text", "expected"), FOUND)
def test_identifiers_are_marked_by_kind(text: str, expected: str) -> None:
    scrubbed, counts = scrub(text)
    assert scrubbed == expected
    assert sum(counts.values()) == expected.count("[")


@pytest.mark.parametrize("text", KEPT)
def test_what_a_report_needs_stays(text: str) -> None:
    assert scrub(text) == (text, {})


def test_what_is_scrubbed_stays_so() -> None:
    for text, _ in FOUND:
        assert scrub(scrub(text)[0])[1] == {}, text


def test_known_words_go_whatever_their_case_and_joints() -> None:
    words = {"name": ("Zabriskie^Quentin", "Zabriskie", "Quentin", "Li", "张三"), "id": ("12",)}
    text, counts = strike_out("ZABRISKIE, quentin; Quentin's liver, Zabriskies, Li; 张三，12 mm.", words)
    assert text == "[name]; [name]'s liver, Zabriskies, Li; [name]，12 mm."
    assert counts == {"name": 3}


STRUCK = [
    (("王^东", "王", "东"), "患者王东，王氏，东侧。", "患者[name]，王氏，东侧。"),
    (("王^小东",), "王小东甲状腺；王 小东；小王。", "[name]甲状腺；[name]；小王。"),
    (("Wang^Dong=王^东",), "王东，Wang Dong，WANG, DONG，Wangdong", "[name]，[name]，[name]，Wangdong"),
    (("王^", "Li^", "^", "=", ""), "王, Li^ a = b", "王, Li^ a = b"),  # one character, or two Latin ones
    (("Li^On", "Na^Li"), "A lion; Li On; Na Li.", "A lion; [name]; [name]."),
    (("高^升", "高^升高"), "高升，血压升高，高升高。", "[name]，血压升高，[name]。"),
]


@pytest.mark.parametrize(("words", "text", "expected"), STRUCK)
def test_chinese_parts_are_struck_out_joined_and_not_alone(words: tuple[str, ...], text: str, expected: str) -> None:
    assert strike_out(text, {"name": words})[0] == expected
