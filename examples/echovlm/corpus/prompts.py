"""The 21 expert templates, three styles for each of seven organs, and the chat messages made of them (Figure 3).

Each template holds, in English and in Chinese, all three components: description, diagnosis, and question answering in
five dimensions, as a guide and an example in the style; the words that they share are in templates/common.yaml.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from examples.echovlm.cases import Case
from examples.echovlm.corpus.client import BadAnswer
from examples.echovlm.corpus.instances import DIMENSIONS

TEMPLATES = Path(__file__).parent / "templates"
STYLES = ("report", "structured", "teaching")
PARTS = ("description", "diagnosis", *DIMENSIONS)
MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Written(_Strict):
    question: str
    answer: str


class Asked(_Strict):
    question: str


class Quoted(_Strict):
    question: str
    quote: str


class Verdict(_Strict):
    """A judge's scores by the rubric of templates/judge.yaml, from 1 to 5."""

    reason: str
    faithfulness: Literal[1, 2, 3, 4, 5]
    relevance: Literal[1, 2, 3, 4, 5]
    safety: Literal[1, 2, 3, 4, 5]
    clarity: Literal[1, 2, 3, 4, 5]


@cache
def read_template(name: str) -> dict[str, Any]:
    """A YAML file of templates/: an organ's three templates by style, "common" or "judge"."""
    import yaml

    return yaml.safe_load((TEMPLATES / f"{name}.yaml").read_text(encoding="utf-8"))


@cache
def organs() -> tuple[str, ...]:
    """The organs that have templates."""
    return tuple(read_template("common")["organs"])


def parts_of(case: Case) -> tuple[str, ...]:
    """What can be asked about a case: no diagnosis where the report has no impression."""
    return tuple(part for part in PARTS if part != "diagnosis" or case.impression.strip())


@cache
def answer_model(kind: str, parts: tuple[str, ...]) -> type[BaseModel]:
    """The answer to a request, part by part; its JSON schema is what the server is given."""
    closed = {"description": Asked, "diagnosis": Asked}
    fields = {field_of(part): (closed.get(part, Quoted) if kind == "closed" else Written, ...) for part in parts}
    return create_model("Instances", __base__=_Strict, **fields)


def parse(model: type[BaseModel], text: str) -> Any:
    """An answer, checked against its schema. Raises BadAnswer."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadAnswer(f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")) from None


def field_of(part: str) -> str:
    return part.replace(" ", "_")


def messages(
    case: Case, template: str, kind: str, *, notes: Sequence[str] = (), frames: Sequence[Path] = ()
) -> list[dict[str, Any]]:
    """System prompt, the template's example as a turn that went before, and the case's report with its frames.

    `template`: "organ/style". `notes`: what experts found wrong with an earlier round.
    """
    organ, style = template.split("/")
    common, language = read_template("common"), case.language
    chosen = read_template(organ)[style]
    example = chosen["examples"][language]
    parts = parts_of(case)
    rules = [
        common["system"][language].format(organ=common["organs"][organ][language]),
        common["styles"][style][language],
        chosen["guide"][language],
        common["kinds"][kind][language],
        "\n".join(f"- {field_of(part)}: {common['parts'][part][language]}" for part in parts),
    ]
    if notes:
        rules.append(common["again"][language].format(notes="\n".join(f"- {note}" for note in notes)))
    text: Any = report_text(case.findings, case.impression, language)
    if frames:
        text = [*map(_picture, frames), {"type": "text", "text": text}]
    return [
        {"role": "system", "content": "\n\n".join(rule.strip() for rule in rules)},
        {"role": "user", "content": report_text(example["findings"], example["impression"], language)},
        {"role": "assistant", "content": json.dumps(example_answer(example, kind, parts), ensure_ascii=False)},
        {"role": "user", "content": text},
    ]


def report_text(findings: str, impression: str, language: str) -> str:
    """A report as the model reads it."""
    lines = read_template("common")["report"][language].format(findings=findings, impression=impression)
    return lines.strip()


def example_answer(example: dict[str, Any], kind: str, parts: Sequence[str]) -> dict[str, dict[str, str]]:
    """A template's example as the answer to its report; what the report does not say is quoted as ""."""
    answer = {}
    for part in parts:
        question, text = example["open"][part]
        if kind == "open":
            answer[field_of(part)] = {"question": question, "answer": text}
        elif part in DIMENSIONS:
            question, text = example["closed"].get(part, ("", ""))
            answer[field_of(part)] = {"question": question, "quote": text}
        else:
            answer[field_of(part)] = {"question": question}
    return answer


def judge_messages(case: Case, question: str, answer: str) -> list[dict[str, Any]]:
    """The rubric, and the question and answer beside the report that they were made of."""
    judge = read_template("judge")[case.language]
    report = report_text(case.findings, case.impression, case.language)
    return [
        {"role": "system", "content": judge["system"].strip()},
        {"role": "user", "content": judge["user"].format(report=report, question=question, answer=answer).strip()},
    ]


def _picture(path: Path) -> dict[str, Any]:
    data = base64.b64encode(path.read_bytes()).decode()
    kind = MEDIA.get(path.suffix.lower(), "application/octet-stream")
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}
