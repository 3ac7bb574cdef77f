"""Which case and group each sequence of a batch is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from moe_adapter.analysis.tokens import Forward, Generation
from moe_adapter.errors import MoEAdapterError

NO_GROUP = "all"


class SequenceNames:
    """Names sequences from a batch's given ids, else from a list in the order met, else by number.

    In a distributed run numbers begin with the rank, so that the parts of a record have no case in common: "1:0".
    """

    def __init__(self, cases: Sequence[str] | None, groups: Mapping[str, str] | None):
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._prefix = f"{dist.get_rank()}:" if distributed else ""
        self._cases = cases
        self._groups = groups
        self._met = 0
        self._given: list[tuple[str, str]] | None = None
        self._by_batch = False
        self._current: list[tuple[str, str]] = []
        self._generation: Generation | None = None

    def give(self, case_ids: Sequence[str], groups: Sequence[str] | None) -> None:
        """Names for the next call of the model."""
        if self._cases is not None:
            raise MoEAdapterError(
                "record_routing was given cases=…, so batches have names already; use one of the two."
            )
        if groups is None:
            groups = [self._group(case) for case in case_ids]
        if len(groups) != len(case_ids):
            raise MoEAdapterError(
                f"got {len(case_ids)} case ids and {len(groups)} groups; give one of each per sequence."
            )
        self._given = [(str(case), str(group)) for case, group in zip(case_ids, groups, strict=True)]
        self._by_batch = True

    def of(self, forward: Forward, sequences: int) -> list[tuple[str, str]]:
        """(case, group) of each sequence. A step of the same generate, or one with a filled cache, keeps its names."""
        if not sequences:  # packed rows of padding alone
            return []
        generation = forward.generation
        goes_on = generation is self._generation if generation else forward.past > 0 and bool(self._current)
        if not goes_on:
            rows = generation.rows if generation else forward.shape[0]
            self._current = self._next(rows, generation.rows if generation else sequences)
        self._generation = generation
        if sequences % len(self._current):
            raise MoEAdapterError(
                f"a step of {sequences} rows goes on from a batch of {len(self._current)}; keep a batch's rows "
                "together."
            )
        copies = sequences // len(self._current)  # beams, or several answers to a prompt
        return [name for name in self._current for _ in range(copies)]

    def check_all_met(self) -> None:
        """Warn if ids are left over: then the model did not run on the cases in their order."""
        if self._cases is not None and self._met < len(self._cases):
            warnings.warn(
                f"the model met {self._met} sequences of {len(self._cases)} case ids; check that cases are in the "
                "order in which the model runs on them.",
                stacklevel=4,
            )

    def _next(self, rows: int, sequences: int) -> list[tuple[str, str]]:
        if self._given is not None:
            given, self._given = self._given, None
            if len(given) != sequences:
                packed = f" holding {sequences} sequences" if sequences != rows else ""
                raise MoEAdapterError(
                    f"got {len(given)} case ids for a batch of {rows} rows{packed}; give one per "
                    + ("sequence, row by row." if packed else "row.")
                )
            return given
        if self._by_batch:
            raise MoEAdapterError(
                "a batch without names; call record.batch(case_ids=…) before each forward or generate."
            )
        start, self._met = self._met, self._met + sequences
        if self._cases is None:
            cases = [f"{self._prefix}{number}" for number in range(start, self._met)]
        elif self._met > len(self._cases):
            raise MoEAdapterError(
                f"the model met {self._met} sequences, and record_routing was given {len(self._cases)} case ids; "
                "give one for each sequence, in the order in which the model runs on them."
            )
        else:
            cases = [str(case) for case in self._cases[start : self._met]]
        return [(case, self._group(case)) for case in cases]

    def _group(self, case: str) -> str:
        if self._groups is None:
            return NO_GROUP
        if case not in self._groups:
            raise MoEAdapterError(f"case {case!r} has no group; give groups= an entry for every case id.")
        return self._groups[case]
