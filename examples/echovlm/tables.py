"""The paper's table form: organs as rows, metrics × models as columns, the average and its uncertainty."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from examples.echovlm.evaluation import Scored
from examples.echovlm.significance import Difference
from moe_adapter.analysis.resampling import Estimate

LANGUAGES = {"en": "English", "zh": "Chinese"}


def score_table(scored: Sequence[Scored], task: str, metrics: Iterable[str]) -> str:
    """Markdown table of every metric, model by model; the best value of each metric and row is bold."""
    models = {model.name: model.tasks[task] for model in scored}
    first, metrics = scored[0].tasks[task], list(metrics)
    rows = {organ: {name: found.by_organ[organ] for name, found in models.items()} for organ in first.by_organ}
    averages = {"**average**": {name: found.overall for name, found in models.items()}}
    if len(first.by_language) > 1:
        for language in first.by_language:
            of_language = {name: found.by_language[language] for name, found in models.items()}
            averages[f"average, {LANGUAGES[language]}"] = of_language
    for row, found in averages.items():
        rows[row] = {
            name: {metric: float(values[metric].value) for metric in metrics} for name, values in found.items()
        }
    heads = [f"{metric} {name}" for metric in metrics for name in models]
    return markdown(
        ["organ", *heads],
        [[name, *(cell for metric in metrics for cell in _cells(row, metric))] for name, row in rows.items()],
    )


def findings_table(scored: Sequence[Scored], task: str, name: str = "attributes") -> str:
    """Markdown table of a finding-level score in per cent, organ by organ."""
    models = [model.tasks[task] for model in scored]
    rows = [[organ, *(_percent(found.by_organ[organ][name]) for found in models)] for organ in models[0].by_organ]
    rows.append(["**all**", *(_percent(float(found.overall[name].value)) for found in models)])
    return markdown(["organ", *(model.name for model in scored)], rows)


def estimate_table(scored: Sequence[Scored], task: str, names: Iterable[str]) -> str:
    """Markdown table of scores over all organs with their intervals, a model a row."""
    names = list(names)
    rows = [[model.name, *(_interval(model.tasks[task].overall[name]) for name in names)] for model in scored]
    return markdown(["model", *names], rows)


def difference_table(found: Mapping[str, Mapping[str, Difference]], names: Iterable[str]) -> str:
    """Markdown table of differences with interval and p, a model that another is compared with a row."""
    names = list(names)
    rows = [
        [f"against {model}", *(_difference(differences[name]) for name in names)]
        for model, differences in found.items()
    ]
    return markdown(["", *names], rows)


def _difference(found: Difference) -> str:
    return _interval(found.estimate, "+z.1f") + ("" if np.isnan(found.p) else f" p={found.p:.3f}")


def _interval(found: Estimate, spec: str = "z.1f") -> str:
    if np.isnan(found.value):
        return "–"
    interval = "" if np.isnan(found.low) else f" [{found.low:{spec}}, {found.high:{spec}}]"
    return f"{found.value:{spec}}{interval}"


def _percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.1f}"


def _cells(row: Mapping[str, Mapping[str, float]], metric: str) -> list[str]:
    values = [scores[metric] for scores in row.values()]
    return [f"**{value:.1f}**" if value == max(values) else f"{value:.1f}" for value in values]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    ruler = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ruler, *rows])
