"""Everything that a report needs of a record, as tables."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from moe_adapter.analysis.balance import balance, load_shares
from moe_adapter.analysis.coactivation import coactivation
from moe_adapter.analysis.confidence import confidence, rank_load
from moe_adapter.analysis.modality import modality_preference
from moe_adapter.analysis.paths import path_weights
from moe_adapter.analysis.reader import RoutingRecord
from moe_adapter.analysis.resampling import DEFAULT, Resampling
from moe_adapter.analysis.schema import GENERATED, MODALITIES, PROMPT
from moe_adapter.analysis.specialisation import specialisation
from moe_adapter.analysis.statistics import expert_load
from moe_adapter.analysis.vocabulary import UNKNOWN, Tokenizer, token_specialisation

TEXT = [MODALITIES[PROMPT], MODALITIES[GENERATED]]
ALL_CELLS = ("layer", "group", "modality")  # whose sums are every load that figures and pages show


def summary(
    record: RoutingRecord, *, tokenizer: Tokenizer | None = None, top: int = 10, resampling: Resampling = DEFAULT
) -> dict[str, pa.Table]:
    """The record's statistics by name, each as its function's table.

    "load" (counts by layer, group and modality) and "paths" are there for every record; of one with cases, also
    "shares" and "balance" (by layer and group), "modality", "coactivation", "ranks"; "tokens" (the `top` of each
    expert, placeholders of images left out) where token ids are known; "specialisation" and "specialisation_groups"
    where there are two groups or more, one a case; "confidence" where no layer is top-1.

    Raises:
        MoEAdapterError: layers have different numbers of experts.
    """
    tables = {"load": expert_load(record, by=ALL_CELLS).to_table(), "paths": path_weights(record).to_table()}
    if record.aggregated:
        return tables
    tables |= {
        "shares": load_shares(record, by=("layer", "group"), resampling=resampling).to_table(),
        "balance": balance(record, by=("layer", "group"), resampling=resampling).to_table(),
        "modality": modality_preference(record, resampling=resampling).to_table(),
        "coactivation": coactivation(record).to_table(),
        "ranks": rank_load(record).to_table(),
    }
    text = pc.field("modality").isin(TEXT)
    if len(record.count(["token_id"], text & (pc.field("token_id") != UNKNOWN))):
        tables["tokens"] = token_specialisation(record, where=text).top(top).to_table(tokenizer)
    if all(layer.top_k != 1 for layer in record.facts.layers):
        tables["confidence"] = confidence(record, by=("layer", "group"), resampling=resampling).to_table()
    units = record.count(["case", "group"])
    if len(record.facts.groups) > 1 and len(units) == len(units["case"].unique()):
        found = specialisation(record, resampling=resampling)
        tables |= {"specialisation": found.to_table(), "specialisation_groups": found.groups_table()}
    return tables
