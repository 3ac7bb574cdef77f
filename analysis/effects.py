"""What an intervention costs: the change in loss and in answers, for each group, with intervals over cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from moe_adapter.analysis.cases import CaseSums, estimate_cells, means
from moe_adapter.analysis.intervene import Intervention, intervene
from moe_adapter.analysis.resampling import DEFAULT, Estimate, Resampling, estimate_columns
from moe_adapter.analysis.tables import cell_table
from moe_adapter.errors import MoEAdapterError
from moe_adapter.losses import IGNORED_LABEL

OVERALL = "overall"


class CaseBatch(NamedTuple):
    """Sequences of cases: what the model is called with, labels (B, S) among it, and each row's case and group."""

    inputs: Mapping[str, Any]
    case_ids: Sequence[str]
    groups: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Effects:
    """By intervention, group and measure, (C,) each: the mean over cases without it, and its change.

    The measure "loss" is equation (5) as a mean over a case's label tokens, in nats; "answers" the share of a case's
    answers that are not as without the intervention. The group "overall" is all cases.
    """

    cells: tuple[tuple[str, str, str], ...]
    cases_C: np.ndarray
    baseline_C: np.ndarray
    change_C: Estimate

    def to_table(self) -> pa.Table:
        """intervention, group, measure, cases, baseline, change, change_low, change_high."""
        columns = dict(cases=self.cases_C, baseline=self.baseline_C, **estimate_columns(change=self.change_C))
        return cell_table(("intervention", "group", "measure"), self.cells, **columns)


def effect(
    model: nn.Module,
    batches: Iterable[CaseBatch],
    interventions: Mapping[str, Intervention | Sequence[Intervention]],
    *,
    answer: Callable[[nn.Module, Mapping[str, Any]], Sequence[Any]] | None = None,
    resampling: Resampling = DEFAULT,
) -> Effects:
    """Run the same batches without and with each intervention, in evaluation mode and without gradients.

    Each case weighs the same, however many sequences and tokens it has. Source: the cluster bootstrap of paired
    differences, Davison & Hinkley (1997), section 3.8.

    Args:
        answer: gives an answer, of anything that can be compared, for each row of a batch: model.generate, decoded.

    Raises:
        MoEAdapterError: no batch, a batch without labels, or a row without a case; as `intervene`.
    """
    named = {name: each if isinstance(each, Sequence) else [each] for name, each in interventions.items()}
    groups: dict[str, str] = {}
    sums: dict[str, np.ndarray] = {}  # by case: (1 + interventions, 4), see _runs
    with evaluating(model), torch.no_grad():
        for batch in batches:
            runs = np.stack(list(_runs(model, batch, list(named.values()), answer)), axis=1)
            for case, group, values in zip(batch.case_ids, batch.groups, runs, strict=True):
                if groups.setdefault(case, group) != group:
                    raise MoEAdapterError(f"case {case!r} is in the groups {groups[case]!r} and {group!r}; give one.")
                sums[case] = sums.get(case, 0) + values
    if not sums:
        raise MoEAdapterError("got no batch; give at least one CaseBatch.")
    measures = ["loss", "answers"] if answer else ["loss"]
    values_NIM = np.stack([values[:, 0::2] / values[:, 1::2] for values in sums.values()])[..., : len(measures)]
    return _effects(values_NIM, groups, list(named), measures, resampling)


def _effects(
    values_NIM: np.ndarray, groups: Mapping[str, str], names: list[str], measures: list[str], resampling: Resampling
) -> Effects:
    """From each case's measures, without an intervention first."""
    change_NIM = values_NIM[:, 1:] - values_NIM[:, :1]
    parts = [change_NIM, np.broadcast_to(values_NIM[:, :1], change_NIM.shape), np.ones_like(change_NIM)]
    sums = CaseSums(
        by=("intervention", "measure"),
        cells=tuple(itertools.product(names, measures)),
        units=tuple(groups.items()),
        values_NCV=np.stack(parts, axis=-1).reshape(len(change_NIM), -1, len(parts)),
    )
    found = [estimate_cells(sums, ("intervention", "group", "measure"), means, resampling)]
    cells = list(found[0].cells)
    if len(set(groups.values())) > 1:
        found.append(estimate_cells(sums, sums.by, means, resampling))
        cells += [(name, OVERALL, measure) for name, measure in found[1].cells]
    order = sorted(range(len(cells)), key=lambda number: names.index(cells[number][0]))
    change, baseline = (
        Estimate(*(np.concatenate(part)[order] for part in zip(*each, strict=True)))
        for each in zip(*(one.each() for one in found), strict=True)
    )
    return Effects(
        cells=tuple(cells[number] for number in order),
        cases_C=np.concatenate([one.cases_C for one in found])[order],
        baseline_C=baseline.value,
        change_C=change,
    )


def _runs(
    model: nn.Module, batch: CaseBatch, interventions: Sequence[Sequence[Intervention]], answer: Callable | None
) -> Iterator[np.ndarray]:
    """(B, 4) without an intervention and with each: summed loss, label tokens, answers that differ, answers."""
    labels = batch.inputs.get("labels")
    if not isinstance(labels, torch.Tensor):
        raise MoEAdapterError("a batch has no labels; give (B, S), -100 where a token is not of the answer.")
    if not len(labels) == len(batch.case_ids) == len(batch.groups):
        raise MoEAdapterError(
            f"a batch has {len(labels)} rows, {len(batch.case_ids)} case ids and {len(batch.groups)} groups; give "
            "one of each per row."
        )
    plain: Sequence[Any] | None = None
    for each in ((), *interventions):
        with intervene(model, *each) if each else nullcontext():
            loss_B, tokens_B = _loss(model, batch.inputs)
            answers = [None] * len(loss_B) if answer is None else answer(model, batch.inputs)
        plain = answers if plain is None else plain
        differs_B = [float(given != before) for given, before in zip(answers, plain, strict=True)]
        yield np.stack([loss_B, tokens_B, differs_B, np.ones(len(loss_B))], axis=1)


def _loss(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Equation (5) of each row, summed over its label tokens, and their number."""
    given = {name: value for name, value in inputs.items() if name != "labels"}
    logits_BSV, labels_BS = model(**given).logits[:, :-1], inputs["labels"][:, 1:]
    kept_BS = labels_BS != IGNORED_LABEL
    losses = F.cross_entropy(logits_BSV[kept_BS].float(), labels_BS[kept_BS], reduction="none")
    row = kept_BS.nonzero()[:, 0].cpu().numpy()
    sums, tokens = (np.bincount(row, weights=w, minlength=len(labels_BS)) for w in (losses.cpu().numpy(), None))
    if not tokens.all():
        raise MoEAdapterError(f"row {int(tokens.argmin())} of a batch has no label token, so its case has no loss.")
    return sums, tokens


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode; after it each module is in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
