"""Which reports stay: those that speak of the part of the body that their case is of."""

from __future__ import annotations

from pathlib import Path

from examples.echovlm.cases import Case
from examples.echovlm.corpus.manifest import Manifest
from examples.echovlm.corpus.organs import WORDS, organs_in
from examples.echovlm.corpus.store import Corpus, write_corpus

UNKNOWN, OTHER, SILENT = "organ unknown", "report of another region", "report without a finding"
SHORTEST = 2  # words, or characters of Chinese


def unrelated(case: Case) -> str:
    """Why the report has nothing to do with the case's region; "" if it has, or if there is no report (split "show").

    A report that names no organ is taken to be about the case's, and an organ that is not of organs.py is believed.
    """
    if case.split == "show":
        return ""
    if len(case.findings.split() if case.language == "en" else case.findings.strip()) < SHORTEST:
        return SILENT
    if case.organ == "unknown":
        return UNKNOWN
    named = organs_in(f"{case.findings}\n{case.impression}")
    return OTHER if named and case.organ in WORDS and case.organ not in named else ""


def filter_texts(corpus: Corpus, out: Path) -> Manifest:
    """Write the cases whose report is about their region into `out`."""
    manifest = Manifest(step="filter-texts", given=len(corpus.cases), settings={"shortest": SHORTEST})
    kept = []
    for case in corpus.cases:
        if reason := unrelated(case):
            manifest.drop(case.id, reason)
        else:
            kept.append(case)
            manifest.keep()
    write_corpus(out, kept, corpus.layouts, manifest)
    return manifest
