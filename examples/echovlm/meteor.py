"""METEOR by nltk, with a WordNet that lies on this machine: nltk's own data, or Debian's package."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import nltk
from nltk.corpus.reader import WordNetCorpusReader
from nltk.translate.meteor_score import single_meteor_score

DEBIAN = "/usr/share/wordnet"
CURE = "needs WordNet: `python -m nltk.downloader wordnet`, or Debian's package wordnet-base"


class _WordNet(WordNetCorpusReader):
    """nltk's reader, of Debian's folder too, which lacks a list of names that METEOR does without."""

    def open(self, file: str):
        return io.StringIO("".join(f"{i} - 0\n" for i in range(45))) if file == "lexnames" else super().open(file)

    def map_wn(self, version: str = "wordnet") -> None:
        """No mapping onto another WordNet, which other languages than English would need."""


@lru_cache(maxsize=1)
def wordnet() -> WordNetCorpusReader | None:
    """The first WordNet found in nltk's data folders, as a folder or as the archive it comes in, then in Debian's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The multilingual functions")
        for name in ("corpora/wordnet", "corpora/wordnet.zip/wordnet/"):
            with suppress(LookupError):
                return _WordNet(nltk.data.find(name), None)
        if not (Path(DEBIAN) / "data.noun").is_file():
            return None
        if DEBIAN not in nltk.data.path:  # nltk opens nothing outside its data folders
            nltk.data.path.append(DEBIAN)
        return _WordNet(DEBIAN, None)


def description() -> str:
    """Implementation, parameters and WordNet; there has to be one."""
    found = wordnet()
    assert found is not None
    return (
        f"nltk {version('nltk')}, mean of single_meteor_score (α 0.9, β 3, γ 0.5): exact words, then Porter "
        f"stems, then the stems' synonyms in WordNet {found.get_version()}; Chinese characters have neither"
    )


def scores(answers: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> list[float]:
    """METEOR, 0 to 1, of each answer against its reference, both in tokens.

    Source: Lavie & Agarwal (2007), as nltk has it.
    """
    return [
        single_meteor_score(reference, answer, wordnet=wordnet())
        for answer, reference in zip(answers, references, strict=True)
    ]
