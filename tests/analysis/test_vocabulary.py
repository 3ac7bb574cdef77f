"""Which token ids an expert gets, against the rows, and named by a real tokenizer."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow.compute as pc
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from moe_adapter import MoEAdapterError
from moe_adapter.analysis.vocabulary import token_specialisation


@pytest.fixture
def words(written, drawn):
    """Ids 0 to 9; in layer 1 id 3 always goes to expert 2."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 10, size) for size in (80, 120)]
    experts = [drawn(rng, np.zeros(4), (len(case), 2)) for case in ids]
    for case, token_id in zip(experts, ids, strict=True):
        case[token_id == 3, 1] = [2, 0]
    return written(experts, token_ids=ids)


def test_shares_against_the_rows(words):
    rows = words.table().to_pylist()
    tokens = Counter((row["layer"], row["token_id"]) for row in rows if row["slot"] == 0)
    chose = Counter((row["layer"], row["expert"], row["token_id"]) for row in rows)
    found = token_specialisation(words, min_count=0).to_table().to_pylist()
    assert {(r["layer"], r["expert"], r["token_id"]): round(r["share"] * r["count"]) for r in found} == chose
    assert all(row["count"] == tokens[row["layer"], row["token_id"]] for row in found)
    order = [(row["layer"], row["expert"], -row["share"]) for row in found]
    assert order == sorted(order)


def test_rare_tokens_and_the_top(words):
    found = token_specialisation(words, min_count=20)
    assert found.count_R.min() >= 20 and set(found.token_id_R) < set(range(10))
    top = token_specialisation(words, min_count=0).top(3).to_table().to_pylist()
    assert len(top) == 2 * 4 * 3
    best = next(row for row in top if (row["layer"], row["expert"]) == (1, 2))
    assert (best["token_id"], best["share"]) == (3, 1.0)


def test_words(words):
    vocabulary = {
        word: number for number, word in enumerate(["肝", "囊肿", "cyst", "低回声", "a", "b", "c", "d", "e", "f"])
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")))
    table = token_specialisation(words, where=pc.field("layer") == 1).top(1).to_table(tokenizer).to_pylist()
    assert [row["token"] for row in table if row["expert"] == 2] == ["低回声"]


def test_embeddings_have_no_id(written):
    ids = [np.array([-1, 5, -1])]
    found = token_specialisation(written([np.zeros((3, 1, 1), int)], token_ids=ids), min_count=1)
    assert found.to_table().to_pylist() == [{"layer": 0, "expert": 0, "token_id": 5, "count": 1, "share": 1.0}]
    with pytest.raises(MoEAdapterError, match=r"no token of .* has an id"):
        token_specialisation(written([np.zeros((3, 1, 1), int)], token_ids=[np.full(3, -1)]))
