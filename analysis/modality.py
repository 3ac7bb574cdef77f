"""Which experts take which modality: image, video, prompt, generated text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moe_adapter.analysis.cases import case_loads
from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.resampling import DEFAULT, Estimate, Resampling, estimate_columns
from moe_adapter.analysis.statistics import shares
from moe_adapter.analysis.tables import expert_table


@dataclass(frozen=True, kw_only=True)
class ModalityPreference:
    """By layer, modality and expert, (L, M, E) each.

    `rate` is p(expert | modality), the share of a modality's routed tokens that the expert gets. `part` is
    p(modality | expert), of what the expert gets, by raw counts. `preference` is p(expert | modality) / p(expert):
    1 for no preference, whatever the modalities' numbers of tokens.
    """

    layers: tuple[int, ...]
    modalities: tuple[str, ...]
    rate: Estimate
    part: Estimate
    preference: Estimate

    def to_table(self) -> pa.Table:
        """layer, modality, expert, and rate, part, preference, each followed by its _low and _high."""
        cells = [(layer, modality) for layer in self.layers for modality in self.modalities]
        columns = estimate_columns(rate=self.rate, part=self.part, preference=self.preference)
        return expert_table(("layer", "modality"), cells, self.rate.value.shape[2], **columns)


def modality_preference(
    record: RoutingRecord, *, where: pc.Expression | None = None, resampling: Resampling = DEFAULT
) -> ModalityPreference:
    """How the modalities spread over the experts, layer by layer, with intervals over cases.

    `part` is what MoE-LLaVA (arXiv 2401.15947, figure 5) draws, without its rescaling of text by length; `preference`
    needs none.

    Raises:
        MoEAdapterError: the record holds no cases, no row is left, or layers have different numbers of experts.
    """
    sums = case_loads(record, ("layer", "modality"), where)
    layers, modalities = (tuple(sorted(set(names))) for names in zip(*sums.cells, strict=True))
    cells = [(layer, modality) for layer in layers for modality in modalities]
    (stratum,) = sums.strata(())
    cases, _, experts = stratum.values_NCV.shape
    counts_NCE = np.zeros((cases, len(cells), experts), np.int64)
    counts_NCE[:, [cells.index(cell) for cell in sums.cells]] = stratum.values_NCV
    shape = (-1, len(layers), len(modalities), experts)
    values = _measures(counts_NCE.sum(axis=0).reshape(shape[1:]))
    samples = _measures(resampling.bootstrap(counts_NCE.reshape(cases, -1)).reshape(shape))
    cases_LM = counts_NCE.any(axis=2).sum(axis=0).reshape(shape[1:3])
    rate, part, preference = (_intervals(*each, cases_LM, resampling) for each in zip(values, samples, strict=True))
    return ModalityPreference(layers=layers, modalities=modalities, rate=rate, part=part, preference=preference)


def _intervals(value_LME: np.ndarray, samples: np.ndarray, cases_LM: np.ndarray, resampling: Resampling) -> Estimate:
    found = Estimate(value_LME, np.empty(value_LME.shape), np.empty(value_LME.shape))
    for at in np.ndindex(cases_LM.shape):
        estimate = resampling.interval(value_LME[at], samples[:, *at], cases_LM[at])
        found.low[at], found.high[at] = estimate.low, estimate.high
    return found


def _measures(counts_LME: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """rate, part and preference, (…, L, M, E) each."""
    rate = shares(counts_LME)
    part = np.swapaxes(shares(np.swapaxes(counts_LME, -1, -2)), -1, -2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return rate, part, rate / shares(counts_LME.sum(axis=-2))[..., None, :]
