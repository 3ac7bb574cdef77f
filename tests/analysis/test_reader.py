"""Files that are no routing record say so."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from moe_adapter import MoEAdapterError
from moe_adapter.analysis.record import RoutingRecord
from moe_adapter.analysis.schema import METADATA_KEY, SCHEMA, LayerFacts, RecordFacts


def test_files_that_are_no_record(tmp_path):
    path = tmp_path / "file.parquet"
    with pytest.raises(MoEAdapterError, match=r"no routing record at .*file\.parquet; write one with record_routing"):
        RoutingRecord.open(path)
    path.write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(MoEAdapterError, match="is not a routing record"):
        RoutingRecord.open(path)
    for metadata in ({}, {METADATA_KEY: b"{"}, {METADATA_KEY: b"[]"}, {METADATA_KEY: b'{"version": 1}'}):
        pq.write_table(pa.table({"expert": [1]}).replace_schema_metadata(metadata), path)
        with pytest.raises(MoEAdapterError, match="is not a routing record"):
            RoutingRecord.open(path)


def test_newer_and_empty_records(tmp_path):
    path = tmp_path / "file.parquet"
    pq.write_table(pa.table({"new": [1]}).replace_schema_metadata({METADATA_KEY: b'{"version": 9, "new": 1}'}), path)
    with pytest.raises(MoEAdapterError, match=r"version 9 .* reads up to 1; upgrade moe-adapter"):
        RoutingRecord.open(path)
    facts = RecordFacts(model="m", layers=(), groups=(), cases=0, tokens=0)
    pq.write_table(SCHEMA.empty_table().replace_schema_metadata({METADATA_KEY: facts.to_json()}), path)
    with pytest.raises(MoEAdapterError, match="holds no routed token"):
        RoutingRecord.open(path)


def test_facts_survive_the_file():
    layer = LayerFacts(name="肝", num_experts=4, top_k=2, alpha=0.25, lam=None)
    facts = RecordFacts(model="m", layers=(layer,), groups=("甲状腺",), cases=1, tokens=2)
    assert RecordFacts.from_json(facts.to_json().encode()) == facts


def test_filters_and_counts(mixtral, record):
    options = dict(cases=["a", "b"], groups={"a": "liver", "b": "heart"}, row_group_rows=8)
    result = record(mixtral, lambda: mixtral(input_ids=torch.randint(3, 100, (2, 5))), **options)
    where = (pc.field("group") == "liver") & (pc.field("layer") == 1)
    assert set(result.table(where=where)["case"].to_pylist()) == {"a"}
    assert result.count(["case", "slot"], where).to_pylist() == [
        {"case": "a", "slot": 0, "count": 5},
        {"case": "a", "slot": 1, "count": 5},
    ]
    assert result.count(["group"], pc.field("group") == "spleen").to_pylist() == []
    with pytest.raises(MoEAdapterError, match=r"no column \['organ'\]; it has case, group"):
        result.count(["organ"])
