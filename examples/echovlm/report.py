"""The run's report: the paper's tables, Figure 5, α and λ, the show cases and the account, as report.md and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from examples.echovlm import ranks
from examples.echovlm.account import Account
from examples.echovlm.cases import Case
from examples.echovlm.data import Data
from examples.echovlm.evaluation import Scored
from examples.echovlm.metrics import IMPLEMENTATIONS
from examples.echovlm.tables import findings_table, markdown, score_table
from examples.echovlm.tasks import Example

REPORT, RESULTS = "report.md", "results.json"
SYMBOLS = {"alpha": "α", "lambda": "λ"}
SAMPLES = 7  # held-out reports shown beside their references


@dataclass(frozen=True, kw_only=True)
class Results:
    """What the recipe found. `scored` in the order of the tables, stage II last; `weights` by layer.

    `figure` is the name of Figure 5's PNG, None if nothing is routed.
    """

    scored: Sequence[Scored]
    shuffled: Scored
    static_loss: float
    weights: list[dict[str, float]]
    figure: str | None
    shown: list[tuple[Case, Example, str]]


def write_results(out: Path, data: Data, results: Results, account: Account) -> Path:
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
        _samples(data, results),
        _shown(results),
        _account(account),
    ]
    report = out / REPORT
    report.write_text("\n".join(parts), encoding="utf-8")
    values = {
        "models": [asdict(scored) for scored in [*results.scored, results.shuffled]],
        "general_loss_static_only": results.static_loss,
        "weights": results.weights,
        "seconds": account.seconds,
    }
    (out / RESULTS).write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
    print(f"\nreport: {report}")
    return report


def _tables(results: Results) -> str:
    tuned = results.scored[-1]
    losses = [(scored.name, scored.general_loss) for scored in results.scored if scored.general_loss is not None]
    losses.append((f"{tuned.name}, static experts alone", results.static_loss))
    return "\n".join(
        [
            "## Report generation on held-out cases\n",
            f"{IMPLEMENTATIONS}\n",
            score_table(results.scored) + "\n",
            "## Findings stated right, per cent\n",
            "An attribute of the case counts if the report states it with its value. With images shuffled, each case "
            "is answered from another case of its organ: what a model gains over that, it has seen.\n",
            findings_table([*results.scored, results.shuffled]) + "\n",
            "## Loss on held-out general text, nats per token\n",
            markdown(["model", "loss"], [(name, f"{loss:.3f}") for name, loss in losses]) + "\n",
        ]
    )


def _figure(results: Results) -> str:
    if results.figure is None:
        return "## Where the tokens went (Figure 5)\n\nNo token is routed: there are no routed experts.\n"
    return f"## Where the tokens went (Figure 5)\n\n![routed tokens by organ and expert]({results.figure})\n"


def _weights(results: Results) -> str:
    """The scalars that the layers have: no λ without a shared expert, neither where each token has its own."""
    names = list(results.weights[0])
    if not names:
        return "## α and λ after stage II (equation 3)\n\nEach token has its own weights (mixing: token).\n"
    rows = [(layer, *(f"{row[name]:.3f}" for name in names)) for layer, row in enumerate(results.weights)]
    head = ["layer", *(SYMBOLS[name] for name in names)]
    return f"## {' and '.join(head[1:])} by layer after stage II (equation 3)\n\n{markdown(head, rows)}\n"


def _samples(data: Data, results: Results) -> str:
    """The first held-out case of each organ, with stage II's answer."""
    first = {case.organ: index for index, case in reversed(list(enumerate(data.test)))}
    rows = [
        (_cell(data.test[index].id), _cell(data.test[index].findings), _cell(results.scored[-1].answers[index]))
        for index in sorted(first.values())[:SAMPLES]
    ]
    return "## Held-out reports\n\n" + markdown(["case", "reference", results.scored[-1].name], rows) + "\n"


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
