"""The run's report: the paper's tables, Figure 5, α and λ, the show cases and the account, as report.md and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.echovlm import ranks
from examples.echovlm.account import Account
from examples.echovlm.cases import Case
from examples.echovlm.evaluation import Scored
from examples.echovlm.finding_scores import FINDING_SCORES
from examples.echovlm.metrics import TextMetrics
from examples.echovlm.scoring import HeldOut
from examples.echovlm.significance import Difference
from examples.echovlm.tables import difference_table, estimate_table, findings_table, markdown, score_table
from examples.echovlm.tasks import Example

REPORT, RESULTS = "report.md", "results.json"
SYMBOLS = {"alpha": "α", "lambda": "λ"}
SAMPLES = 7  # held-out answers of a task shown beside their references
HEADINGS = {"report": "Report generation", "diagnosis": "Diagnosis", "vqa": "Question answering"}
TRUTH = (
    "Findings are read off the answers by `findings.py`. The truth is a case's attributes; of a case without, and of "
    "the tasks other than the report, it is what the reference states, read off likewise."
)
INTERVALS = (
    "95 % intervals by bootstrap over patients within their organ, of the unweighted mean of the organs (text) or of "
    "all answers (findings); p by exchanging the two models' answers at random, patient by patient, two-sided and of "
    "each comparison alone. Neither knows how the models would differ with another seed of training."
)


@dataclass(frozen=True, kw_only=True)
class Results:
    """What the recipe found. `scored` in the order of the tables, the last stage last; `weights` by layer.

    `parameters`: stage → "trainable" and "total". Without dual-path layers `static_loss` is None and `weights` empty.
    `differences`: task → model → score → how much stage II scores above that model. `figure` is the name of Figure 5's
    PNG, None if nothing is routed.
    """

    held_out: Mapping[str, HeldOut]
    metrics: TextMetrics
    parameters: Mapping[str, Mapping[str, int]]
    scored: Sequence[Scored]
    shuffled: Scored
    differences: Mapping[str, Mapping[str, Mapping[str, Difference]]]
    static_loss: float | None
    weights: list[dict[str, float]]
    figure: str | None
    shown: list[tuple[Case, Example, str]]


def write_results(out: Path, results: Results, account: Account) -> Path:
    """Write `report.md` and `results.json` into `out`, print the tables; returns the report's path."""
    if not ranks.is_main():
        return out / REPORT
    tables = _tables(results)
    print("\n" + tables)
    parts = [
        "# EchoVLM recipe: what this run found\n",
        tables,
        _figure(results),
        _weights(results),
        *(_samples(held_out, results) for held_out in results.held_out.values()),
        _shown(results),
        _account(account),
    ]
    report = out / REPORT
    report.write_text("\n".join(parts), encoding="utf-8")
    values = {
        "metrics": results.metrics.described,
        "metrics_left_out": results.metrics.missing,
        "finding_scores": FINDING_SCORES,
        "models": [_model(scored) for scored in [*results.scored, results.shuffled]],
        "differences": {
            task: {model: {name: _plain(found) for name, found in of.items()} for model, of in models.items()}
            for task, models in results.differences.items()
        },
        "general_loss_static_only": results.static_loss,
        "weights": results.weights,
        "parameters": results.parameters,
        "seconds": account.seconds,
    }
    (out / RESULTS).write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
    print(f"\nreport: {report}")
    return report


def _model(scored: Scored) -> dict[str, Any]:
    tasks = {task: found.values() for task, found in scored.tasks.items()}
    return {"name": scored.name, "general_loss": scored.general_loss, "tasks": tasks}


def _plain(found: Difference) -> dict[str, float | None]:
    values = {**found.estimate._asdict(), "p": found.p}
    return {name: None if math.isnan(value) else float(value) for name, value in values.items()}


def _tables(results: Results) -> str:
    tuned = results.scored[-1]
    losses = [(scored.name, scored.general_loss) for scored in results.scored if scored.general_loss is not None]
    if results.static_loss is not None:
        losses.append((f"{tuned.name}, static experts alone", results.static_loss))
    return "\n".join(
        [
            *(_task(results, task) for task in results.held_out),
            "## How it is scored\n",
            *(f"- {name}: {how}" for name, how in results.metrics.described.items()),
            *(f"- {name} is left out: it {lack}" for name, lack in results.metrics.missing.items()),
            *(f"- findings, {name}: {what}" for name, what in FINDING_SCORES.items()),
            f"\n{TRUTH} {INTERVALS}\n",
            "## Loss on held-out general text, nats per token\n",
            markdown(["model", "loss"], [(name, f"{loss:.3f}") for name, loss in losses]) + "\n",
        ]
    )


def _task(results: Results, task: str) -> str:
    metrics, models = results.metrics.described, [*results.scored, results.shuffled]
    names = [*metrics, *FINDING_SCORES]
    return "\n".join(
        [
            f"## {HEADINGS[task]} on held-out cases\n",
            score_table(results.scored, task, metrics) + "\n",
            "### Findings stated right, per cent\n",
            "An attribute of the truth counts if the answer states it with its value. With images shuffled, each case "
            "is answered from another case of its organ: what a model gains over that, it has seen.\n",
            findings_table(models, task) + "\n",
            "### Over all organs\n",
            estimate_table(models, task, names) + "\n",
            f"{results.scored[-1].name} minus another model:\n",
            difference_table(results.differences[task], names) + "\n",
        ]
    )


def _figure(results: Results) -> str:
    if results.figure is None:
        return "## Where the tokens went (Figure 5)\n\nNo token is routed: there are no routed experts.\n"
    return f"## Where the tokens went (Figure 5)\n\n![routed tokens by organ and expert]({results.figure})\n"


def _weights(results: Results) -> str:
    """The scalars that the layers have: no λ without a shared expert, neither where each token has its own."""
    if not results.weights:
        return ""
    names = list(results.weights[0])
    if not names:
        return "## α and λ after stage II (equation 3)\n\nEach token has its own weights (mixing: token).\n"
    rows = [(layer, *(f"{row[name]:.3f}" for name in names)) for layer, row in enumerate(results.weights)]
    head = ["layer", *(SYMBOLS[name] for name in names)]
    return f"## {' and '.join(head[1:])} by layer after stage II (equation 3)\n\n{markdown(head, rows)}\n"


def _samples(held_out: HeldOut, results: Results) -> str:
    """The task's first question about each organ, with stage II's answer."""
    tuned = results.scored[-1]
    answers = tuned.tasks[held_out.task].answers
    first = {case.organ: index for index, case in reversed(list(enumerate(held_out.cases)))}
    rows = [
        tuple(map(_cell, (held_out.examples[i].case_id, held_out.examples[i].answer, answers[i])))
        for i in sorted(first.values())[:SAMPLES]
    ]
    return f"## {HEADINGS[held_out.task]}, examples\n\n" + markdown(["case", "reference", tuned.name], rows) + "\n"


def _shown(results: Results) -> str:
    if not results.shown:
        return ""
    rows = [(_cell(case.id), _cell(case.source), len(turn.images), _cell(said)) for case, turn, said in results.shown]
    return (
        "## Real frames without a report\n\nThe toy model has seen phantoms only; its words on real frames show that "
        "the frames go through, not that it can read them.\n\n"
        + markdown(["case", "source", "frames", "answer"], rows)
        + "\n"
    )


def _account(account: Account) -> str:
    lines = ["## What each step did\n"]
    for step, said in account.lines.items():
        lines.append(f"- **{step}** ({account.seconds.get(step, 0):.0f} s)")
        lines += [f"  - {line}" for line in said]
    lines.append(f"\nIn all {sum(account.seconds.values()):.0f} s.")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text of the data, inert inside a Markdown table."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("\n", " ")
