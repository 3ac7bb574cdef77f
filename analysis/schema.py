"""What a routing record holds: its columns, and the facts about the run in its footer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import pyarrow as pa

from moe_adapter.errors import MoEAdapterError

SCHEMA_VERSION = 1
METADATA_KEY = b"moe_adapter.routing"  # in the Parquet footer's key-value metadata

# The first four are the values 0 to 3 of transformers' mm_token_type_ids.
MODALITIES = ("prompt", "image", "video", "audio", "generated")
PROMPT, IMAGE, VIDEO, AUDIO, GENERATED = range(len(MODALITIES))

# One row per token, layer and top-k slot; the rows of a token are consecutive.
SCHEMA = pa.schema(
    [
        ("case", pa.dictionary(pa.int32(), pa.string())),
        ("group", pa.dictionary(pa.int32(), pa.string())),
        ("modality", pa.dictionary(pa.int32(), pa.string())),
        ("position", pa.int32()),  # in its sequence, from 0, padding left out
        ("token_id", pa.int32()),  # -1 where the model was given embeddings
        ("layer", pa.int16()),  # index into RecordFacts.layers
        ("slot", pa.int8()),  # 0 … K-1 in the router's own order
        ("expert", pa.int16()),
        ("weight", pa.float32()),
    ]
)

# An aggregated record: how many rows of the above there would be.
COUNT_SCHEMA = pa.schema([*map(SCHEMA.field, ("group", "modality", "layer", "expert")), ("count", pa.int64())])


def plain_type(name: str) -> pa.DataType:
    """A column's type without its dictionary, whose codes differ from batch to batch; int64 for one not recorded."""
    kind = SCHEMA.field(name).type if name in SCHEMA.names else pa.int64()
    return kind.value_type if pa.types.is_dictionary(kind) else kind


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """A layer of the record; num_experts and top_k are 0 if its router never ran.

    `alpha` and `lam` are a dual-path layer's α and λ when the record was closed, else None.
    """

    name: str
    num_experts: int
    top_k: int
    alpha: float | None = None
    lam: float | None = None


@dataclass(frozen=True, kw_only=True)
class RecordFacts:
    """What was recorded: the model, its layers in order, and how much of it. `groups` in order of appearance.

    `cases` counts ids; in an `aggregated` record, which keeps none, sequences.
    """

    model: str
    layers: tuple[LayerFacts, ...]
    groups: tuple[str, ...]
    cases: int
    tokens: int
    aggregated: bool = False

    def to_json(self) -> str:
        return json.dumps({"version": SCHEMA_VERSION, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: bytes) -> RecordFacts:
        fields = json.loads(text)
        del fields["version"]
        layers = tuple(LayerFacts(**layer) for layer in fields.pop("layers"))
        return cls(layers=layers, groups=tuple(fields.pop("groups")), **fields)


def merge_facts(parts: Sequence[RecordFacts]) -> RecordFacts:
    """The facts of one record in several files; a case in two of them counts twice.

    Raises:
        MoEAdapterError: the files' layers differ, or one holds tokens and another counts.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.aggregated != first.aggregated:
            raise MoEAdapterError("one of the records holds tokens and another counts alone; open them apart.")
        if [layer.name for layer in part.layers] != [layer.name for layer in first.layers]:
            raise MoEAdapterError(
                f"the records are not of one model: {first.model} with {len(first.layers)} layers and {part.model} "
                f"with {len(part.layers)}; open them apart, and set them side by side with compare(a, b)."
            )
    return replace(
        first,
        layers=tuple(map(_merge_layers, *(part.layers for part in parts))),
        groups=tuple(dict.fromkeys(group for part in parts for group in part.groups)),
        cases=sum(part.cases for part in parts),
        tokens=sum(part.tokens for part in parts),
    )


def _merge_layers(*layers: LayerFacts) -> LayerFacts:
    """A layer that ran in some of the files only has its sizes from those."""
    sizes = {(layer.num_experts, layer.top_k) for layer in layers} - {(0, 0)}
    if len({experts for experts, _ in sizes}) > 1:
        raise MoEAdapterError(
            f"layer {layers[0].name} has {sorted({experts for experts, _ in sizes})} experts in the records, which are "
            "not of one model; open them apart."
        )
    experts, top_k = max(sizes, default=(0, 0))
    return replace(layers[0], num_experts=experts, top_k=top_k)
