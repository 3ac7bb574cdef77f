"""What the model is asked: the paper's three tasks (report, diagnosis, VQA) made from cases."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from examples.echovlm.cases import Case

TASKS = ("report", "diagnosis", "vqa")
PROMPTS = {
    "report": {"en": "Describe the ultrasound findings.", "zh": "请描述超声所见。"},
    "diagnosis": {"en": "What is the ultrasound diagnosis?", "zh": "超声诊断是什么?"},
}


@dataclass(frozen=True, kw_only=True)
class Example:
    """One turn: images and a prompt, and the answer that the labels are made of.

    `case_id` and `organ` say where it comes from; both are empty for general examples.
    """

    prompt: str
    answer: str
    images: tuple[Path | Image.Image, ...] = ()
    case_id: str = ""
    organ: str = ""

    def messages(self) -> list[dict[str, Any]]:
        """The turn as chat messages, without the answer."""
        parts = [{"type": "image"} for _ in self.images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.prompt}]}]

    def frames(self) -> list[Image.Image]:
        """The images, read from disk where they are paths."""
        return [image if isinstance(image, Image.Image) else Image.open(image).convert("RGB") for image in self.images]


def examples_of(cases: Iterable[Case], folder: Path, tasks: Iterable[str] = TASKS) -> list[Example]:
    """The cases' examples for `tasks`, in order; a case without an impression has no diagnosis, and so on.

    `folder`: what the cases' image paths are relative to.
    """
    return [example for case in cases for task in tasks for example in _examples(case, folder, task)]


def draw_questions(cases: Iterable[Case], most: int | None, seed: int) -> list[Case]:
    """The cases with at most so many of their questions each, drawn; all where `most` is None."""
    if most is None:
        return list(cases)
    asked = []
    for case in cases:
        rng = random.Random(f"{seed} {case.id}")  # each case its own, whoever else is asked
        asked.append(replace(case, questions=tuple(rng.sample(case.questions, min(most, len(case.questions))))))
    return asked


def report_example(case: Case, folder: Path) -> Example:
    """The question for the case's report, whatever report it has; the answer may be empty."""
    images = tuple(folder / image for image in case.images)
    prompt = PROMPTS["report"][case.language]
    return Example(prompt=prompt, answer=case.findings, images=images, case_id=case.id, organ=case.organ)


def _examples(case: Case, folder: Path, task: str) -> list[Example]:
    if task == "vqa":
        turns = [(question.question, question.answer) for question in case.questions]
    else:
        turns = [(PROMPTS[task][case.language], case.findings if task == "report" else case.impression)]
    images = tuple(folder / image for image in case.images)
    return [
        Example(prompt=prompt, answer=answer, images=images, case_id=case.id, organ=case.organ)
        for prompt, answer in turns
        if answer
    ]
