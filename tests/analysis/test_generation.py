"""In a call of generate each token counts once, prompt apart from generated, whatever the cache and the batch."""

from __future__ import annotations

import pyarrow.compute as pc
import pytest
import torch

from moe_adapter import MoEAdapterError
from moe_adapter.analysis.record import RoutingRecord, record_routing

GREEDY = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
WAYS = {
    "cached": {},
    "uncached": dict(use_cache=False),
    "static cache": dict(cache_implementation="static"),
    "chunked prefill": dict(prefill_chunk_size=3),
}


@pytest.mark.parametrize("way", WAYS)
def test_generation_equals_one_forward_over_its_answer(vlm, text_batch, record, routes, way):
    """A forward over prompt and answer routes each token as generate did, last token aside."""
    batch = text_batch("left")
    answers = vlm.generate(**batch, **GREEDY)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 4)], dim=1)
    whole = routes(record(vlm, lambda: vlm(input_ids=answers[:, :-1], attention_mask=mask)))
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    expected = {
        (case, position, "generated" if position >= lengths[int(case)] else "prompt", *rest)
        for case, position, _, *rest in whole
    }
    assert routes(record(vlm, lambda: vlm.generate(**batch, **GREEDY, **WAYS[way]))) == expected


@pytest.mark.parametrize("given", ["whole", "new"])
def test_a_second_turn_over_the_first_ones_cache(vlm, text_batch, record, given):
    first = vlm.generate(**text_batch("left"), **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.full((3, 2), 9)], dim=1)
    mask = torch.cat([text_batch("left")["attention_mask"], torch.ones(3, 5 + 2, dtype=torch.long)], dim=1)

    def run():
        turn = ids if given == "whole" else ids[:, -3:]  # the first answer's last token is not in the cache
        vlm.generate(turn, attention_mask=mask, cache=first.cache, **GREEDY)

    rows = record(vlm, run).table(["position", "modality"], pc.field("case") == "0").to_pylist()[::4]
    assert [row["modality"] for row in rows] == ["prompt"] * 3 + ["generated"] * 4
    assert [row["position"] for row in rows] == list(range(7 + 4, 7 + 4 + 7))


@pytest.mark.parametrize("way", ["cached", "uncached"])
def test_images_in_the_prompt(vlm, image_batch, record, way):
    batch = image_batch("left")
    result = record(vlm, lambda: vlm.generate(**batch, **GREEDY, **WAYS[way]))
    per_token = 2 * 2  # layers × top-k
    counts = {
        tuple(row.values())[:2]: row["count"] // per_token for row in result.count(["case", "modality"]).to_pylist()
    }
    assert counts == {
        ("0", "prompt"): 8,
        ("0", "image"): 10,
        ("0", "generated"): 4,
        ("1", "prompt"): 5,
        ("1", "image"): 4,
        ("1", "generated"): 4,
    }


@pytest.mark.parametrize("way", ["cached", "uncached"])
@pytest.mark.parametrize("end", ["eos", "stopping rule"])
def test_what_follows_the_end_of_a_row_is_left_out(vlm, text_batch, record, way, end):
    def third_token_of_row_1_is_50(ids, scores):
        scores[:, 50] = -torch.inf
        if ids.shape[1] == 7 + 2:
            scores[1, 50] = torch.inf
        return scores

    ending = {
        "eos": dict(eos_token_id=50),
        "stopping rule": dict(
            stopping_criteria=[lambda ids, _, **__: ids[:, -1] == 50], pad_token_id=0, eos_token_id=2
        ),
    }
    options = dict(max_new_tokens=8, do_sample=False, logits_processor=[third_token_of_row_1_is_50])
    batch = text_batch("left")
    result = record(vlm, lambda: vlm.generate(**batch, **options, **WAYS[way], **ending[end]))
    counts = result.count(["case", "modality"], pc.field("modality") == "generated").to_pylist()
    # A row's last token is not fed back; the end-of-sequence token only because other rows go on.
    row_1 = {"eos": 2, "stopping rule": 3}[end]
    assert {row["case"]: row["count"] // 4 for row in counts} == {"0": 7, "1": row_1, "2": 7}


def test_rows_of_several_answers_belong_to_their_case(vlm, text_batch, record):
    batch = text_batch("left")
    result = record(vlm, lambda: vlm.generate(**batch, **GREEDY, num_beams=2), cases=["a", "b", "c"])
    counts = {tuple(row.values())[:2]: row["count"] // 4 for row in result.count(["case", "modality"]).to_pylist()}
    assert {case: counts[case, "generated"] for case in "abc"} == dict.fromkeys("abc", 8)
    assert {case: counts[case, "prompt"] for case in "abc"} == {"a": 2 * 7, "b": 2 * 5, "c": 2 * 3}


def test_names_of_batches(mixtral, text_batch, record, tmp_path):
    batch, path = text_batch("left"), tmp_path / "routing.parquet"
    with record_routing(mixtral, path, groups={"a": "liver", "b": "heart", "c": "liver"}) as recorder:
        recorder.batch(case_ids=["a", "b", "c"])
        cache = mixtral(**batch).cache
        mask = torch.cat([batch["attention_mask"], torch.ones(3, 1)], dim=1)
        mixtral(input_ids=torch.full((3, 1), 9), attention_mask=mask, cache=cache)  # a hand-written loop
        recorder.batch(case_ids=["d"], groups=["甲状腺"])
        mixtral.generate(torch.full((1, 4), 9), **GREEDY)
        with pytest.raises(MoEAdapterError, match=r"call record\.batch"):
            mixtral(**batch)
        recorder.batch(case_ids=["a", "b"])
        with pytest.raises(MoEAdapterError, match="2 case ids for a batch of 3 rows"):
            mixtral(**batch)
        with pytest.raises(MoEAdapterError, match="case 'e' has no group"):
            recorder.batch(case_ids=["e"])
        with pytest.raises(MoEAdapterError, match="1 case ids and 2 groups"):
            recorder.batch(case_ids=["a"], groups=["liver", "heart"])
    result = RoutingRecord.open(path)
    counts = {
        tuple(row.values())[:3]: row["count"] // 4 for row in result.count(["case", "group", "modality"]).to_pylist()
    }
    assert counts == {
        ("a", "liver", "prompt"): 7,
        ("a", "liver", "generated"): 1,
        ("b", "heart", "prompt"): 5,
        ("b", "heart", "generated"): 1,
        ("c", "liver", "prompt"): 3,
        ("c", "liver", "generated"): 1,
        ("d", "甲状腺", "prompt"): 4,
        ("d", "甲状腺", "generated"): 4,
    }
    assert result.facts.groups == ("liver", "heart", "甲状腺") and result.facts.cases == 4


def test_names_in_order(mixtral, text_batch, record):
    batch = text_batch("left")
    with pytest.raises(MoEAdapterError, match="met 3 sequences, and record_routing was given 2 case ids"):
        record(mixtral, lambda: mixtral(**batch), cases=["a", "b"])
    with pytest.warns(UserWarning, match="met 3 sequences of 4 case ids"):
        record(mixtral, lambda: mixtral(**batch), cases=["a", "b", "c", "d"])


def test_a_loop_that_keeps_the_prompts_types(vlm, record):
    ids = torch.tensor([[120, 5, 6, 120]])
    types = (ids == 120).int()

    def run():
        cache = vlm(input_ids=ids, mm_token_type_ids=types).cache
        vlm(input_ids=torch.tensor([[7, 120]]), mm_token_type_ids=types, cache=cache)

    modalities = record(vlm, run).table()["modality"].to_pylist()[::4]
    assert modalities == ["image", "prompt", "prompt", "image", "generated", "generated"]


def test_positions_without_a_mask(mixtral, record):
    def run():
        cache = mixtral(input_ids=torch.full((1, 4), 9)).cache
        mixtral(input_ids=torch.full((1, 2), 9), cache=cache)

    rows = record(mixtral, run).table(["position", "modality"]).to_pylist()[::4]
    assert [row["position"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["modality"] for row in rows] == ["prompt"] * 4 + ["generated"] * 2
