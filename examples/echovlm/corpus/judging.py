"""Judging of open-ended instances by a language model with a rubric (templates/judge.yaml)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.echovlm.cases import Case, read_cases
from examples.echovlm.corpus.client import INVALID, Client, Request, Server, ServerError, seed_of
from examples.echovlm.corpus.instances import INSTANCES, Instance, InstanceError, read_instances, write_instances
from examples.echovlm.corpus.manifest import Manifest
from examples.echovlm.corpus.prompts import Verdict, judge_messages, parse
from examples.echovlm.journal import Journal

CRITERIA = ("faithfulness", "relevance", "safety", "clarity")
VERDICTS = "verdicts.jsonl"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One instance to be judged against its case's report."""

    instance: Instance
    case: Case
    seed: int

    def request(self, attempt: int) -> Request:
        return Request(
            messages=judge_messages(self.case, self.instance.question, self.instance.answer),
            schema=Verdict.model_json_schema(),
            seed=seed_of(self.seed, self.instance.id, "judge", attempt),
        )

    def read(self, text: str) -> Verdict:
        return parse(Verdict, text)


def judge(
    instance_files: Sequence[Path], cases_file: Path, out: Path, server: Server, *, threshold: int = 4, seed: int = 0
) -> Manifest:
    """Write those instances to `out`/instances.jsonl whose every score is at least `threshold`, with the verdict.

    Closed-ended ones, whose answers are the report's, go through unjudged.
    Raises: ServerError where the server left requests unanswered; the same call asks for the rest.
    """
    instances = read_instances(*instance_files)
    cases = {case.id: case for case in read_cases(cases_file)}
    for instance in instances:
        if instance.case not in cases:
            raise InstanceError(f"instance {instance.id!r}: its case {instance.case!r} is not in {cases_file}")
    jobs = {
        item.id: Judgement(instance=item, case=cases[item.case], seed=seed) for item in instances if item.kind == "open"
    }
    settings = {"server": asdict(server), "threshold": threshold, "seed": seed, "criteria": CRITERIA}
    with Journal(out / VERDICTS) as journal:
        client = Client(server=server, journal=journal)
        client.ask(tqdm(jobs.values(), desc="instances", disable=None))
        manifest = Manifest(
            step="judge", given=len(instances), settings=settings, more={"judged": len(jobs), "stopped": client.stopped}
        )
        kept = [judged for item in instances if (judged := _judged(item, jobs.get(item.id), client, manifest))]
    write_instances(out / INSTANCES, kept)
    manifest.write(out)
    if client.failures:
        raise ServerError(
            f"{server.base_url}: {len(client.failures)} requests were left unanswered, the last with: "
            f"{client.failures[-1]}; the same command asks for the rest."
        )
    return manifest


def _judged(item: Instance, job: Judgement | None, client: Client, manifest: Manifest) -> Instance | None:
    """The instance with its verdict if it passes; None, and a drop in the manifest, if not."""
    if job is None:
        manifest.keep()
        return item
    reply = client.reply(job)
    origin: dict[str, Any] = {"model": reply.model, "prompt": reply.key, "seed": reply.seed}
    if reply.problem:
        why = {"judge": origin, "detail": reply.detail} if reply.problem == INVALID else {}
        manifest.drop(item.id, reply.problem, **why)
        return None
    scores: dict[str, Any] = {name: getattr(reply.value, name) for name in CRITERIA}
    verdict = scores | origin | {"reason": reply.value.reason}
    if low := [name for name in CRITERIA if scores[name] < manifest.settings["threshold"]]:
        manifest.drop(item.id, f"low {low[0]}", judge=verdict)  # the first that failed it: one reason a drop
        return None
    manifest.keep()
    return replace(item, judge=verdict)
