"""Which tokens are padding, from masks of every shape that a stack of blocks is given."""

from __future__ import annotations

import logging

import pytest
import torch
import zoo

from moe_adapter import balance_loss, dual_path_layers, inject_dual_path_moe
from moe_adapter.masks import given_mask, token_mask

KEEP = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]).bool()  # left padding
RIGHT = KEEP.flip(1)
SIZE = KEEP.shape[1]
CAUSAL, ITSELF = torch.ones(SIZE, SIZE).tril().bool(), torch.eye(SIZE).bool()


def square(keep: torch.Tensor, causal: bool) -> torch.Tensor:
    seen = keep[:, None, None, :].expand(-1, 1, SIZE, SIZE)
    return seen & CAUSAL if causal else seen


def everything(seen: torch.Tensor) -> torch.Tensor:
    return seen | ~seen.any(-1, keepdim=True)


def itself(seen: torch.Tensor) -> torch.Tensor:
    return seen | (~seen.any(-1, keepdim=True) & ITSELF)


def closed(seen: torch.Tensor) -> torch.Tensor:
    return seen & seen.transpose(-1, -2)


SQUARES = {
    "padding queries see nothing": square(KEEP, True),
    "padding queries see everything": everything(square(KEEP, True)),
    "not causal": square(KEEP, False),
    "not causal, padding queries see everything": everything(closed(square(KEEP, False))),
    "without the heads' dimension": square(KEEP, True)[:, 0],
    "additive": torch.zeros(3, 1, SIZE, SIZE).masked_fill(~everything(square(KEEP, True)), torch.finfo().min),
}


@pytest.mark.parametrize("name", SQUARES)
def test_a_key_that_no_telling_query_sees_is_padding(name):
    assert torch.equal(token_mask(SQUARES[name], KEEP.shape), KEEP.reshape(-1))


def test_padding_queries_that_see_themselves():
    keep = KEEP[:2]  # one token alone looks as its padding does
    assert torch.equal(token_mask(itself(square(keep, True)), keep.shape), keep.reshape(-1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("fill", [lambda seen: seen, everything])
def test_right_padding(causal, fill):
    assert torch.equal(token_mask(fill(square(RIGHT, causal)), RIGHT.shape), RIGHT.reshape(-1))


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_no_padding_in_a_causal_mask(size):
    assert token_mask(CAUSAL[None, None, :size, :size], (1, size)).all()


def test_no_padding_in_an_image_that_sees_itself_before_causal_text():
    seen = CAUSAL.clone()
    seen[:3, :3] = True
    assert token_mask(seen[None, None], (1, SIZE)).all()


def test_queries_against_a_static_cache():
    seen = torch.zeros(2, 1, 2, 9, dtype=torch.bool)
    seen[0, 0, 0, :] = True  # a padding query made to see everything
    seen[0, 0, 1, 1:2] = True
    seen[1, 0] = torch.ones(2, 9).tril().bool()
    assert token_mask(seen, (2, 2)).tolist() == [False, True, True, True]
    assert token_mask(torch.ones(2, 1, 1, 9).bool(), (2, 1)).all()  # the cache is full


def test_longer_masks_count_by_their_last_columns():
    assert token_mask(KEEP.long(), (3, 2)).tolist() == [True, True, True, True, False, True]
    assert token_mask(KEEP.long(), (6,)).tolist() == [True, True, True, True, False, True]


def test_flat_hidden_states_whose_padding_is_out_already():
    mask = torch.ones(2, 8)
    mask[:, 6:] = 0
    assert token_mask(mask, (12,)) is None
    assert torch.equal(token_mask(mask, (16,)), mask.bool().reshape(-1))


def test_sequence_first():
    assert torch.equal(token_mask(KEEP.long(), (SIZE, 3)), KEEP.T.reshape(-1))


def test_a_mask_that_fits_nothing_is_told_once(caplog):
    with caplog.at_level(logging.WARNING):
        assert token_mask(torch.ones(3, 5), (2, 7)) is None
        assert token_mask(torch.ones(3, 5), (2, 7)) is None
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "a mask (3, 5) fits no hidden states (2, 7)"
    ]


def test_torchs_masks_mean_padding_where_true():
    additive = torch.zeros(KEEP.shape).masked_fill(~KEEP, float("-inf"))
    for padding in (~KEEP, additive):
        assert torch.equal(given_mask({"src": None, "src_key_padding_mask": padding}), KEEP)
    assert given_mask({"attention_mask": KEEP}) is KEEP
    assert given_mask({"attention_mask": None, "mask": CAUSAL}) is None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_sequences_told_by_their_position_ids_alone(attention):
    model = zoo.build("qwen2")
    model.set_attn_implementation(attention)
    ids = torch.randint(3, 100, (1, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    base = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    inject_dual_path_moe(model, expert_dim=8, shared_expert_dim=8)
    found = model.train()(input_ids=ids, position_ids=positions, labels=ids, use_cache=False)
    torch.testing.assert_close(found.logits, base)
    assert all(layer.routing.calls[0].mask_T.all() for layer in dual_path_layers(model).values())
    found.loss.backward()
    whole = balance_loss(model)

    tail = torch.zeros(1, 7, dtype=torch.long)  # as TRL's pad_to_multiple_of leaves it
    longer = dict(input_ids=torch.cat([ids, tail], 1), position_ids=torch.cat([positions, tail], 1))
    model(**longer, use_cache=False)
    torch.testing.assert_close(balance_loss(model), whole)


@pytest.mark.parametrize(
    ("positions", "rows", "kept"),
    [
        (torch.tensor([[0, 1, 2, 0, 1, 0, 0]]), 1, [[1, 1, 1, 1, 1, 0, 0]]),
        (torch.tensor([[0, 1, 0, 0], [0, 1, 2, 3]]), 2, [[1, 1, 0, 0], [1, 1, 1, 1]]),
        (torch.tensor([[0, 0, 0, 1, 2]]), 1, [[1, 1, 1, 1, 1]]),  # padding on the left, without a mask: not told
        (torch.tensor([[0, 0, 0]]), 1, [[1, 1, 1]]),
        (torch.tensor([[5, 6, 7]]), 1, [[1, 1, 1]]),
        (torch.stack([torch.tensor([[0, 1, 0, 0]]), *[torch.zeros(1, 4, dtype=torch.long)] * 3]), 1, [[1, 1, 0, 0]]),
        (torch.zeros(3, 1, 4, dtype=torch.long), 1, None),
        (torch.tensor([[0, 1, 2]]), 2, None),  # one row of positions for all rows: nothing is packed
        (torch.tensor([[7]]), 1, None),  # a step of decoding
        (None, 1, None),
    ],
)
@pytest.mark.parametrize("name", ["input_ids", "inputs_embeds"])
def test_the_tail_of_packed_rows(positions, rows, kept, name):
    columns = 4 if positions is None else positions.shape[-1]
    arguments = {name: torch.ones(rows, columns, *[8] * (name == "inputs_embeds")), "position_ids": positions}
    found = given_mask(arguments)
    assert found is None if kept is None else found.int().tolist() == kept
    mask = torch.ones(1, 4)
    assert given_mask({**arguments, "attention_mask": mask}) is mask
