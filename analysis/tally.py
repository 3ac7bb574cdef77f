"""Counts where tokens go while a model trains: of constant size, to be read, written or reset at any time.

with count_routing(model) as counts:
    trainer.train()
expert_load(counts.record())
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from torch import nn

from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.record import RoutingRecorder
from moe_adapter.analysis.routers import find_routers
from moe_adapter.analysis.schema import COUNT_SCHEMA, METADATA_KEY, MODALITIES
from moe_adapter.analysis.sequences import SequenceNames
from moe_adapter.analysis.writer import RoutedTokens

__all__ = ["RoutingCounts", "count_routing"]


@contextmanager
def count_routing(
    model: nn.Module, *, groups: Mapping[str, str] | None = None, training: bool | None = None
) -> Iterator[RoutingCounts]:
    """Count routed tokens by group, modality, layer and expert, as `record_routing` would record them.

    Memory is of constant size, whatever runs inside the block. Gradients and recomputation are as without it;
    torch.compile is off. Of packed rows each sequence counts as one, and is one of a batch's names.

    Args:
        groups: the group of each case id that `counts.batch` is given; "all" without it.
        training: True counts forwards in training mode alone, False those in evaluation mode alone.

    Raises:
        MoEAdapterError: the model has no router.
    """
    blocks = find_routers(model)
    tally = RoutingTally(len(blocks))
    recorder = RoutingRecorder(model, blocks, tally, SequenceNames(None, groups), training=training)
    with recorder.watch():
        yield RoutingCounts(recorder, tally)


class RoutingCounts:
    """What `count_routing` yields: the counts so far."""

    def __init__(self, recorder: RoutingRecorder, tally: RoutingTally):
        self._recorder = recorder
        self._tally = tally

    def batch(self, *, case_ids: Sequence[str], groups: Sequence[str] | None = None) -> None:
        """Name the sequences of the next forward, see `RoutingRecorder.batch`."""
        self._recorder.batch(case_ids=case_ids, groups=groups)

    def record(self) -> RoutingRecord:
        """The counts as an aggregated record in memory, for `expert_load` and `figure5`.

        Raises:
            MoEAdapterError: nothing was counted since the last reset.
        """
        facts = self._recorder.facts(cases=self._tally.sequences, aggregated=True)
        return RoutingRecord(paths=(), facts=facts, dataset=ds.dataset(self._tally.table()))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the counts to a Parquet file, which `RoutingRecord.open` reads. Each process has a path of its own.

        Raises:
            MoEAdapterError: nothing was counted since the last reset.
        """
        path, facts = Path(path), self.record().facts
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        pq.write_table(self._tally.table().replace_schema_metadata({METADATA_KEY: facts.to_json()}), partial)
        os.replace(partial, path)

    def reset(self) -> None:
        """Start again from zero."""
        self._tally.reset()


class RoutingTally:
    """Takes tokens as a `RoutingWriter` does, and keeps counts by group, modality, layer and expert."""

    def __init__(self, layers: int):
        self.groups: dict[str, int] = {}
        self._counts_GMLE = np.zeros((0, len(MODALITIES), layers, 0), np.int64)
        self.reset()

    def reset(self) -> None:
        self.tokens = self.sequences = 0
        self._counts_GMLE[:] = 0

    def codes(self, named: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """The numbers that stand for the case and the group of each sequence of a batch; a case is not kept."""
        group_N = [self.groups.setdefault(group, len(self.groups)) for _, group in named]
        return np.zeros(len(named), int), np.array(group_N, int)

    def append(self, routed: RoutedTokens) -> None:
        self.tokens += len(routed)
        self.sequences += int((routed.position_T == 0).sum())
        self._grow(len(self.groups), int(routed.expert_TC.max(initial=-1)) + 1)
        group_T1, modality_T1 = routed.group_T[:, None], routed.modality_T[:, None]
        at = np.ravel_multi_index(
            (group_T1, modality_T1, np.array(routed.layer_C), routed.expert_TC), self._counts_GMLE.shape
        )
        np.add.at(self._counts_GMLE.reshape(-1), at.reshape(-1), 1)

    def table(self) -> pa.Table:
        """Rows of `COUNT_SCHEMA` for every count that is not zero."""
        group, modality, layer, expert = at = self._counts_GMLE.nonzero()
        names = [np.array(list(self.groups), object)[group], np.array(MODALITIES, object)[modality]]
        columns = [*names, layer, expert, self._counts_GMLE[at]]
        return pa.table([pa.array(c).cast(f.type) for c, f in zip(columns, COUNT_SCHEMA, strict=True)], COUNT_SCHEMA)

    def _grow(self, groups: int, experts: int) -> None:
        """Room for as many, or more where there is more."""
        missing = groups - self._counts_GMLE.shape[0], 0, 0, experts - self._counts_GMLE.shape[3]
        if max(missing) > 0:
            self._counts_GMLE = np.pad(self._counts_GMLE, [(0, max(0, more)) for more in missing])
