"""Reports and questions in English and Chinese, written from a case's attributes by the phrases in the JSON files.

A hospital has a house style: of each slot's phrasings its own one, always.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from examples.echovlm.cases import Question
from examples.echovlm.phantom.attributes import concern, grade
from examples.echovlm.phantom.screen import HOSPITALS

FEATURES = ("side", "position", "echogenicity", "size_mm", "flow")
CONSEQUENCES = ("risk", "surveillance", "treatment", "counselling")


@lru_cache(maxsize=2)
def phrases(language: str) -> dict[str, Any]:
    """The grammar of a language ("en" or "zh"): words, sentences, questions."""
    return json.loads((Path(__file__).parent / f"phrases_{language}.json").read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Writes about one case in its language and its hospital's house style."""

    organ: str
    language: str
    hospital: str
    attributes: dict[str, str]

    def findings(self) -> str:
        """What the frames show: a sentence on the organ, then one that states every attribute."""
        grammar, lesion = self._grammar, self.attributes["lesion"]
        key = f"{lesion} {self.attributes['pattern']}" if lesion == "plaque" else lesion
        known = grammar["special"].get(key, grammar["lesion"])
        variants = grammar["normal"][self.organ] if lesion == "none" else known
        return self._filled(grammar["context"][self.organ]) + self._space + self._filled(variants)

    def impression(self) -> str:
        """The conclusion."""
        table, a = self._grammar["impression"], self.attributes
        if a["lesion"] == "none":
            return self._filled(table["normal"][self.organ])
        stem = f"{self.organ} {a['lesion']}"
        details = (a.get(name) for name in ("shape", "echogenicity", "site", "pattern"))
        return self._filled(next(table[key] for key in (stem, *(f"{stem} {d}" for d in details)) if key in table))

    def questions(self, rng: np.random.Generator) -> tuple[Question, ...]:
        """Whether there is a finding, one of its features if there is one, and one of its consequences."""
        features = [name for name in FEATURES if name in self.attributes]
        if self.attributes["lesion"] == "none":
            features = [name for name in features if name == "flow"]
        names = ["presence", *rng.permutation(features)[:1], rng.choice(CONSEQUENCES)]
        tables = [self._grammar["questions"][str(name)] for name in names]
        return tuple(
            Question(
                question=str(rng.choice(table["question"])),
                answer=self._filled([table["answer"]]),
                dimension=table["dimension"],
            )
            for table in tables
        )

    @property
    def _grammar(self) -> dict[str, Any]:
        return phrases(self.language)

    @property
    def _space(self) -> str:
        return " " if self.language == "en" else ""

    def _house(self, variants: list[str]) -> str:
        return variants[HOSPITALS.index(self.hospital) % len(variants)]

    def _filled(self, variants: list[str]) -> str:
        text = self._house(variants).format_map(self._slots)
        return text[:1].upper() + text[1:]

    @cached_property
    def _slots(self) -> dict[str, str]:
        """What the phrases' braces stand for; a slot that the case does not have is empty."""
        grammar, a = self._grammar, self.attributes
        slots: dict[str, str] = defaultdict(str)
        for name, value in a.items():
            slots[name] = self._house(grammar["words"].get(name, {}).get(value, [value]))
        slots["look"] = self._space.join(slots[name] for name in ("shape", "echogenicity") if name in a)
        slots["noun"] = grammar["nouns"].get(a["lesion"], "")
        slots["finding"] = grammar["presence"][a["lesion"]]
        slots["where"] = grammar["where"].get(a.get("site", self.organ), "").format_map(slots)
        slots["behind"] = self._house(grammar["behind"]).format_map(slots) if "posterior" in a else ""
        slots["grade"] = grammar["grades"][grade(self.organ, a)]
        slots["valve"] = grammar["valves"].get(a.get("side"), "")
        return slots | grammar["advice"][concern(self.organ, a)]
