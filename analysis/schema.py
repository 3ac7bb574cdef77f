"""What a routing record holds: its columns, and the facts about the run in its footer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import pyarrow as pa

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
    """What was recorded: the model, its layers in order, and how much of it. `groups` in order of appearance."""

    model: str
    layers: tuple[LayerFacts, ...]
    groups: tuple[str, ...]
    cases: int
    tokens: int

    def to_json(self) -> str:
        return json.dumps({"version": SCHEMA_VERSION, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: bytes) -> RecordFacts:
        fields = json.loads(text)
        del fields["version"]
        layers = tuple(LayerFacts(**layer) for layer in fields.pop("layers"))
        return cls(layers=layers, groups=tuple(fields.pop("groups")), **fields)
