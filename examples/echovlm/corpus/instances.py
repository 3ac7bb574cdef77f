"""The instances of the instruction corpus: a question and its answer, and where both came from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from examples.echovlm.cases import LANGUAGES, Case, Question
from moe_adapter.directory import replace_file
from moe_adapter.errors import MoEAdapterError

INSTANCES = "instances.jsonl"
DIMENSIONS = (
    "diagnostic interpretation",
    "risk stratification",
    "patient counselling",
    "surveillance",
    "treatment planning",
)
COMPONENTS = ("description", "diagnosis", "question answering")
KINDS = ("open", "closed")


class InstanceError(MoEAdapterError):
    """A file of instances that cannot be used: names the file and the line."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class Instance:
    """One question and answer about the frames of `case`, with its audit trail.

    `kind`: "open", the model wrote both; "closed", the answer is the report's own words. `dimension` is empty but for
    question answering. `model` wrote it by `template`, asked with the request whose hash is `prompt` and with `seed`;
    `round` counts the times that its source was generated. `judge` and `review` are empty until it was judged, or seen
    by an expert.
    """

    id: str
    case: str
    organ: str
    language: Literal[LANGUAGES]
    component: Literal[COMPONENTS]
    kind: Literal[KINDS]
    question: str
    answer: str
    model: str
    template: str
    prompt: str
    seed: int
    dimension: str = ""
    round: int = 0
    judge: dict[str, Any] = field(default_factory=dict)
    review: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> tuple[str, str, str, int]:
        """Case, template, kind and round: what one request was made of."""
        return self.case, self.template, self.kind, self.round


_READER = TypeAdapter(Instance)


def read_instances(*paths: str | os.PathLike[str]) -> list[Instance]:
    """Read and check whole files of instances. Raises InstanceError, with file and line; also where an id is twice."""
    instances: dict[str, Instance] = {}
    for where, line in (line for path in paths for line in _lines(Path(path))):
        try:
            instance = _READER.validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise InstanceError(f"{where}: {f'field {name!r}: ' if name else ''}{first['msg']}; correct it") from None
        if instance.id in instances:
            raise InstanceError(f"{where}: field 'id': got {instance.id!r} again, expected ids that occur once")
        instances[instance.id] = instance
    return list(instances.values())


def write_instances(path: str | os.PathLike[str], instances: Iterable[Instance]) -> Path:
    """Write instances as JSONL in UTF-8; atomic."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(instance), ensure_ascii=False) + "\n" for instance in instances)
    replace_file(path, lines.encode())
    return path


def attach(cases: Sequence[Case], instances: Iterable[Instance]) -> list[Case]:
    """The cases with the instances as their questions, after those that they have; equal ones are entered once.

    Raises: InstanceError for an instance whose case is not among them.
    """
    questions = {case.id: list(case.questions) for case in cases}
    for instance in instances:
        if instance.case not in questions:
            raise InstanceError(f"instance {instance.id!r}: its case {instance.case!r} is not in the case file")
        dimension = instance.dimension or instance.component
        questions[instance.case].append(
            Question(question=instance.question, answer=instance.answer, dimension=dimension)
        )
    return [replace(case, questions=tuple(dict.fromkeys(questions[case.id]))) for case in cases]


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InstanceError(f"{path}: {error}; expected a JSONL file of instances in UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line
