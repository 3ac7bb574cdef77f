"""The paper's table form: organs as rows, metrics × models as columns, and the average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from examples.echovlm.evaluation import Scored
from examples.echovlm.metrics import METRICS


def score_table(scored: Sequence[Scored]) -> str:
    """Markdown table of every metric, model by model; the best value of each metric and row is bold."""
    rows = {organ: {model.name: model.by_organ[organ] for model in scored} for organ in scored[0].by_organ}
    rows["**average**"] = {model.name: model.average() for model in scored}
    heads = [f"{metric} {model.name}" for metric in METRICS for model in scored]
    return markdown(
        ["organ", *heads],
        [[name, *(cell for metric in METRICS for cell in _cells(row, metric))] for name, row in rows.items()],
    )


def findings_table(scored: Sequence[Scored]) -> str:
    """Markdown table of the finding-level accuracy in per cent, organ by organ."""
    organs = [organ for organ in scored[0].findings if organ != "all"]
    return markdown(
        ["organ", *(model.name for model in scored)],
        [[name, *(_percent(model.findings[organ]) for model in scored)] for organ, name in _named(organs)],
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _named(organs: Sequence[str]) -> list[tuple[str, str]]:
    return [*((organ, organ) for organ in organs), ("all", "**all**")]


def _cells(row: Mapping[str, Mapping[str, float]], metric: str) -> list[str]:
    values = [scores[metric] for scores in row.values()]
    return [f"**{value:.1f}**" if value == max(values) else f"{value:.1f}" for value in values]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    ruler = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ruler, *rows])
