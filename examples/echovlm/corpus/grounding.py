"""Checks that a closed-ended answer is the report's own: its words, whole numbers, and no denial left behind."""

from __future__ import annotations

import re

from examples.echovlm.findings import CLAUSE_END, NEGATED_AFTER, NEGATOR, SIZE

# why an instance is dropped
NOT_SAID = "the report does not say"
NOT_QUOTED = "not the report's words"
DENIAL_LOST = "the quote leaves out a denial"
GIVEN_AWAY = "the question holds the answer"
INVENTED = "the question holds a measurement that is not in the report"
EMPTY = "nothing written"


def quoted(report: str, quote: str, language: str) -> tuple[str, str]:
    """The report's own words that `quote` repeats, whatever its case and spaces; or "" and why there are none.

    A quote that starts within a word or a number ("4 mm" of "14 mm") is none, nor is one whose clause denies it
    ("cyst" of "no cyst"), since it would say the opposite.
    """
    report, quote = " ".join(report.split()), " ".join(quote.split())
    if not quote:
        return "", NOT_SAID
    before = r"(?<![A-Za-z0-9])(?<!\d[.,])" if re.match(r"[.,]?[A-Za-z0-9]", quote) else ""
    after = r"(?![A-Za-z0-9])(?![.,]\d)" if re.search(r"[A-Za-z0-9]$", quote) else ""  # Chinese has no such bounds
    pattern = before + re.escape(quote) + after
    places = [match.span() for match in re.finditer(pattern, report, re.IGNORECASE)]
    if not places:
        return "", NOT_QUOTED
    for start, end in places:
        if not _denied(report.lower(), start, end, language):
            return report[start:end], ""
    return "", DENIAL_LOST


def question_fault(question: str, answer: str, report: str) -> str:
    """What is wrong with a closed-ended question, or ""."""
    if not question.strip():
        return EMPTY
    if _folded(answer) in _folded(question):
        return GIVEN_AWAY
    return "" if _sizes(question) <= _sizes(report) else INVENTED


def _denied(report: str, start: int, end: int, language: str) -> bool:
    """Whether a word before the quote in its clause, or right after it, turns it into its opposite."""
    ends = (match.end() for match in re.finditer(CLAUSE_END[language], report))
    clause = max((place for place in ends if place <= start), default=0)
    return bool(re.search(NEGATOR[language], report[clause:start]) or re.match(NEGATED_AFTER[language], report[end:]))


def _folded(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".。")


def _sizes(text: str) -> set[str]:
    return {"".join(match[0].split()) for match in re.finditer(SIZE, text.lower())}
