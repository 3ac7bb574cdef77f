"""Generation of the instruction corpus by a language model (Figure 3): sources in, instances and a manifest out.

A source is a case with a template and a kind; one request asks for all parts of it. The answers lie in a journal, and
the instances are read out of it in the order of the sources: a run that was killed, and goes on, ends as any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.echovlm.cases import Case, read_cases
from examples.echovlm.corpus import grounding
from examples.echovlm.corpus.client import INVALID, BadAnswer, Client, Reply, Request, Server, ServerError, seed_of
from examples.echovlm.corpus.instances import (
    DIMENSIONS,
    INSTANCES,
    KINDS,
    Instance,
    InstanceError,
    write_instances,
)
from examples.echovlm.corpus.manifest import Manifest
from examples.echovlm.corpus.prompts import STYLES, answer_model, field_of, messages, organs, parse, parts_of
from examples.echovlm.journal import Journal

ANSWERS = "answers.jsonl"
NO_REPORT, NO_TEMPLATE = "no report", "no template for the organ"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is generated: which kinds, how many of an organ's three templates for each case, how many of its frames
    the model sees beside the report, and the seed of all that is drawn."""

    kinds: tuple[str, ...] = KINDS
    templates: int = 1
    frames: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not set(self.kinds) <= set(KINDS) or not self.kinds:
            raise InstanceError(f"kinds: got {', '.join(self.kinds)}, expected some of {', '.join(KINDS)}")
        if not 1 <= self.templates <= len(STYLES):
            raise InstanceError(f"templates: got {self.templates}, expected 1 to {len(STYLES)} for each case")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What one request is made of; as a job of the client it asks for every part of the case at once."""

    case: Case
    template: str
    kind: str
    seed: int
    round: int = 0
    notes: tuple[str, ...] = ()
    frames: tuple[Path, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.case.id}:{self.template}:{self.kind}:{self.round}"

    def request(self, attempt: int) -> Request:
        return Request(
            messages=messages(self.case, self.template, self.kind, notes=self.notes, frames=self.frames),
            schema=answer_model(self.kind, parts_of(self.case)).model_json_schema(),
            seed=seed_of(self.seed, self.id, attempt),
            frames=self.case.images[: len(self.frames)],
        )

    def read(self, text: str) -> Any:
        answer = parse(answer_model(self.kind, parts_of(self.case)), text)
        if self.kind == "open":
            for part in parts_of(self.case):
                written = getattr(answer, field_of(part))
                if not (written.question.strip() and written.answer.strip()):
                    raise BadAnswer(f"{field_of(part)}: {grounding.EMPTY}")
        return answer


def generate(
    cases_file: Path, out: Path, server: Server, choice: Choice | None = None, again: Path | None = None
) -> Manifest:
    """Write `out`/instances.jsonl, of every case that has a report, or of the sources in `again` once more.

    Raises: ServerError where the server left requests unanswered: what it has answered is written all the same, and
    the same call asks for the rest.
    """
    choice = choice or Choice()
    cases = read_cases(cases_file)
    sources = _again(cases, cases_file, again, choice) if again else _sources(cases, cases_file, choice)
    with Journal(out / ANSWERS) as journal:
        client = Client(server=server, journal=journal)
        client.ask(tqdm(sources, desc="sources", disable=None))
        settings = {"server": asdict(server), **asdict(choice), "again": again is not None}
        manifest = _write(client, sources, [] if again else cases, out, settings)
    if client.failures:
        raise ServerError(
            f"{server.base_url}: {len(client.failures)} requests were left unanswered, the last with: "
            f"{client.failures[-1]}. What was answered is in {out / INSTANCES}; the same command asks for the rest."
        )
    return manifest


def _sources(cases: Sequence[Case], cases_file: Path, choice: Choice) -> list[Source]:
    """For each case the kinds and, drawn by the seed, so many of its organ's templates."""
    sources = []
    for case in cases:
        if _no_source(case):
            continue
        styles = sorted(STYLES, key=lambda style: seed_of(choice.seed, case.id, style))
        for style in styles[: choice.templates]:
            for kind in choice.kinds:
                sources.append(_source(case, cases_file, choice, template=f"{case.organ}/{style}", kind=kind))
    return sources


def _again(cases: Sequence[Case], cases_file: Path, again: Path, choice: Choice) -> list[Source]:
    """The sources of the batches that experts have failed, in their next round and with the experts' notes."""
    by_id, sources = {case.id: case for case in cases}, []
    if not again.is_file():
        raise InstanceError(f"--again {again}: no such file; expected the again.jsonl of `review --close`")
    try:
        lines = again.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InstanceError(f"--again {again}: not UTF-8; expected the again.jsonl of `review --close`") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            case, notes = by_id[row["case"]], tuple(row["notes"])
            asked = dict(template=row["template"], kind=row["kind"], round=row["round"] + 1, notes=notes)
        except (ValueError, KeyError, TypeError) as error:
            raise InstanceError(f"{again}:{number}: got {error!r}; expected a file of `review --close`") from None
        sources.append(_source(case, cases_file, choice, **asked))
    return sources


def _source(case: Case, cases_file: Path, choice: Choice, **asked: Any) -> Source:
    frames = tuple(cases_file.parent / image for image in case.images[: choice.frames])
    return Source(case=case, seed=choice.seed, frames=frames, **asked)


def _no_source(case: Case) -> str:
    if not case.findings.strip():
        return NO_REPORT
    return "" if case.organ in organs() else NO_TEMPLATE


def _write(
    client: Client, sources: Sequence[Source], cases: Sequence[Case], out: Path, settings: dict[str, Any]
) -> Manifest:
    """The instances and their manifest, which counts parts of sources, and a case without any as one."""
    left_out = {case.id: reason for case in cases if (reason := _no_source(case))}
    given = len(left_out) + sum(len(parts_of(source.case)) for source in sources)
    manifest = Manifest(step="generate", given=given, settings=settings, more={"stopped": client.stopped})
    for id, reason in left_out.items():
        manifest.drop(id, reason)
    kept = []
    for source in sources:
        for id, instance, reason, why in _instances(source, client.reply(source)):
            if instance is None:
                manifest.drop(id, reason, **why)
            else:
                kept.append(instance)
                manifest.keep()
    write_instances(out / INSTANCES, kept)
    manifest.write(out)
    return manifest


def _instances(source: Source, reply: Reply) -> Iterator[tuple[str, Instance | None, str, dict[str, Any]]]:
    """For each part its id and its instance; or None, the reason, and more of it."""
    case = source.case
    for part in parts_of(case):
        id = f"{source.id}:{part}"
        origin = {"model": reply.model, "template": source.template, "prompt": reply.key, "seed": reply.seed}
        if reply.problem:
            yield id, None, reply.problem, {"detail": reply.detail} | origin if reply.problem == INVALID else {}
            continue
        question, answer, fault = _pair(source, part, getattr(reply.value, field_of(part)))
        if fault:
            yield id, None, fault, origin
            continue
        yield (
            id,
            Instance(
                id=id,
                case=case.id,
                organ=case.organ,
                language=case.language,
                component="question answering" if part in DIMENSIONS else part,
                dimension=part if part in DIMENSIONS else "",
                kind=source.kind,
                question=question,
                answer=answer,
                round=source.round,
                **origin,
            ),
            "",
            {},
        )


def _pair(source: Source, part: str, written: Any) -> tuple[str, str, str]:
    """Question, answer, and what is wrong with them; a closed-ended answer is taken from the report."""
    question = written.question.strip()
    if source.kind == "open":
        return question, written.answer.strip(), ""
    case, fault = source.case, ""
    report = f"{case.findings}\n{case.impression}"
    if part in DIMENSIONS:
        answer, fault = grounding.quoted(report, written.quote, case.language)
    else:
        answer = case.findings if part == "description" else case.impression
    return question, answer, fault or grounding.question_fault(question, answer, report)
