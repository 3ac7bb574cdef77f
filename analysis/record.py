"""Records where a model's tokens go: a context manager around any forward, generate or evaluation.

with record_routing(model, "routing.parquet") as record:
    for batch in batches:
        record.batch(case_ids=batch_ids, groups=batch_organs)
        model.generate(**batch)
record = RoutingRecord.open("routing.parquet")
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from moe_adapter.analysis.forwards import ForwardWatch, RouterCall
from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.routers import RoutedBlock, find_routers
from moe_adapter.analysis.schema import RecordFacts
from moe_adapter.analysis.sequences import SequenceNames
from moe_adapter.analysis.tokens import Forward, describe_tokens
from moe_adapter.analysis.writer import RoutedTokens, RoutingWriter
from moe_adapter.errors import MoEAdapterError

__all__ = ["RoutingRecord", "RoutingRecorder", "record_routing"]


@contextmanager
def record_routing(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    cases: Sequence[str] | None = None,
    groups: Mapping[str, str] | None = None,
    row_group_rows: int = 2**20,
) -> Iterator[RoutingRecorder]:
    """Record every token that the routers of the model's language model see, to a Parquet file at `path`.

    One row per token, layer and top-k slot (`schema.SCHEMA`). Padding is left out, and so is what a batch feeds
    after a sequence's end; in one call of `generate` each token of a row counts once, cached or not (beams are rows);
    recomputation under gradient checkpointing does not count. Text that was not generated, reference answers
    included, is "prompt".

    A row may hold several sequences one behind the other ("packed", "padding-free"), by position ids that start anew,
    `seq_idx` or `cu_seq_lens_q`, without an attention mask or a cache: each has its own case and positions from 0.
    Pad tokens alone at such a row's end are padding.

    The file appears when the block ends without an error and has recorded something. At most `row_group_rows` rows
    wait in memory. torch.compile is off inside the block. Each process of a distributed run records what it sees
    itself, to a path of its own; `RoutingRecord.open([…])` reads the paths as one record. A sampler that repeats
    cases to fill the last batch makes those count twice.

    Args:
        cases: ids of the sequences in the order in which the model meets them, as in a Trainer's evaluation; those
            of a packed row in their order in it. Else name each batch with `record.batch`; sequences without a name
            are numbered "0", "1", …, in a distributed run "rank:number".
        groups: the group of each case id (an organ, a hospital, …); "all" without it.

    Raises:
        MoEAdapterError: the model has no router, a sequence has no name or no group, or nothing was recorded.
    """
    blocks = find_routers(model)
    writer = RoutingWriter(Path(path), row_group_rows=row_group_rows)
    try:
        recorder = RoutingRecorder(model, blocks, writer, SequenceNames(cases, groups))
        with recorder.watch():
            yield recorder
        writer.close(recorder.facts(cases=len(writer.cases)))
    except BaseException:
        writer.discard()
        raise
    recorder.names.check_all_met()


class Writer(Protocol):
    """What takes the tokens: `RoutingWriter`, or `RoutingTally` where they are only counted."""

    groups: dict[str, int]
    tokens: int

    def codes(self, named: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]: ...

    def append(self, routed: RoutedTokens) -> None: ...


class RoutingRecorder:
    """What `record_routing` yields: names the sequences of each batch, and hands their tokens to a writer."""

    def __init__(
        self,
        model: nn.Module,
        blocks: list[RoutedBlock],
        writer: Writer,
        names: SequenceNames,
        training: bool | None = None,
    ):
        self._model = model
        self._blocks = blocks
        self._training = training
        self._sizes: dict[int, tuple[int, int]] = {}  # layer: (num_experts, top_k)
        configs = [module.config for module in model.modules() if hasattr(module, "config")]
        self._model_name = getattr(configs[0], "name_or_path", "") if configs else ""
        self._special_ids = [
            next((value for c in configs if (value := getattr(c, name, None)) is not None), None)
            for name in ("image_token_id", "video_token_id", "pad_token_id")
        ]
        self._watch = ForwardWatch(model, blocks, self._on_forward)
        self.writer = writer
        self.names = names

    def batch(self, *, case_ids: Sequence[str], groups: Sequence[str] | None = None) -> None:
        """Name the sequences of the next forward or generate; steps that go on from its cache keep the names.

        Args:
            case_ids: one id per sequence of the batch, which is a row of it, before generate expands it to beams. A
                packed row holds several: one id for each, row by row.
            groups: one group per id; else looked up in `record_routing(groups=…)`, else "all".

        Raises:
            MoEAdapterError: the lengths differ.
        """
        self.names.give(case_ids, groups)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """While entered, what the model does is recorded."""
        with torch.compiler.set_stance("force_eager"), self._watch:  # compiled code skips hooks
            yield

    def facts(self, *, cases: int, aggregated: bool = False) -> RecordFacts:
        """What has been recorded so far.

        Raises:
            MoEAdapterError: nothing.
        """
        if not self.writer.tokens:
            raise MoEAdapterError(
                "nothing was recorded: no router saw a token that is not padding. Run the model inside the block, "
                "with its dual-path layers enabled."
            )
        return RecordFacts(
            model=self._model_name or type(next(iter(self._watch.sources))).__name__,
            layers=tuple(block.facts(*self._sizes.get(i, (0, 0))) for i, block in enumerate(self._blocks)),
            groups=tuple(self.writer.groups),
            cases=cases,
            tokens=self.writer.tokens,
            aggregated=aggregated,
        )

    def _on_forward(self, forward: Forward, calls: list[RouterCall]) -> None:
        if self._training is not None and self._model.training != self._training:
            return
        batch, columns = forward.shape
        for call in calls:
            if len(call.index_TK) != batch * columns:
                raise MoEAdapterError(
                    f"the router of {self._blocks[call.layer].name} saw {len(call.index_TK)} tokens where the model "
                    f"was given {batch} × {columns}; only routers that see every token can be recorded."
                )
            self._sizes[call.layer] = (call.num_experts, call.index_TK.shape[-1])
        facts = describe_tokens(forward, *self._special_ids)
        case_N, group_N = self.writer.codes(self.names.of(forward, facts.sequences))
        keep_T = facts.keep_BS.reshape(-1)
        sequence_T = facts.sequence_BS.reshape(-1)[keep_T]
        slots = [(call.layer, slot) for call in calls for slot in range(call.index_TK.shape[-1])]
        layer_C, slot_C = zip(*slots, strict=True)
        routed = RoutedTokens(
            case_T=case_N[sequence_T],
            group_T=group_N[sequence_T],
            modality_T=facts.modality_BS.reshape(-1)[keep_T],
            position_T=facts.position_BS.reshape(-1)[keep_T],
            token_id_T=facts.token_id_BS.reshape(-1)[keep_T],
            expert_TC=_gather([call.index_TK for call in calls], torch.int16)[keep_T],
            weight_TC=_gather([call.weights_TK for call in calls], torch.float32)[keep_T],
            layer_C=layer_C,
            slot_C=slot_C,
        )
        self.writer.append(routed)


def _gather(parts: list[torch.Tensor], dtype: torch.dtype) -> np.ndarray:
    """(T, C) on the host, in one transfer where the layers share a device."""
    device = parts[0].device
    return torch.cat([part.to(device, dtype) for part in parts], dim=1).cpu().numpy()
