"""What an FFN is read to be: its activation, its gate, its residual, and what lies between its maps."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_adapter import dual_path_layers, eject_dual_path_moe, inject_dual_path_moe
from moe_adapter.ffn import NotAnFFN, describe, describe_split

D, WIDTH = 8, 24
SIZES = dict(expert_dim=1.0, shared_expert_dim=1.0, expert_init="ffn_slice", preserve_base=False, num_experts=2)


class Feed(nn.Module):
    """Two or three linear maps, and a forward that is given."""

    def __init__(self, forward, gated: bool = False, fused: bool = False):
        super().__init__()
        self.fc1 = nn.Linear(D, 2 * WIDTH if fused else WIDTH)
        self.fc2 = nn.Linear(WIDTH, D)
        self.drop = nn.Dropout(0.1)
        if gated:
            self.fc3 = nn.Linear(D, WIDTH)
        self.given = forward

    def forward(self, x, scale=1.0, mask=None):
        if mask is not None or x.shape[0] == 0:
            return x
        return self.given(self, x)


class Net(nn.Module):
    def __init__(self, ffn: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList([ffn])

    def forward(self, x):
        return self.blocks[0](x)


def swish(ffn, x):
    h = ffn.fc1(x)
    return ffn.fc2(h * torch.sigmoid(h))


def halves(ffn, x):
    gate, up = ffn.fc1(x).chunk(2, -1)
    return ffn.fc2(F.gelu(gate) * up)


INLINE = {
    "torch.relu": (lambda ffn, x: ffn.fc2(torch.relu(ffn.fc1(x))), {}),
    "a method": (lambda ffn, x: ffn.fc2(ffn.fc1(x).relu_()), {}),
    "options": (lambda ffn, x: ffn.fc2(F.gelu(ffn.fc1(x), approximate="tanh")), {}),
    "behind dropout": (lambda ffn, x: ffn.fc2(ffn.drop(F.silu(ffn.drop(ffn.fc1(x))))), {}),
    "squared relu": (lambda ffn, x: ffn.fc2(F.relu(ffn.fc1(x)).square()), {}),
    "a power": (lambda ffn, x: ffn.fc2(F.relu(ffn.fc1(x)) ** 2), {}),
    "written out": (swish, {}),
    "gated": (lambda ffn, x: ffn.fc2(F.gelu(ffn.fc1(x)) * ffn.fc3(x)), dict(gated=True)),
    "the gate registered last": (lambda ffn, x: ffn.fc2(ffn.fc1(x) * F.gelu(ffn.fc3(x))), dict(gated=True)),
    "gate and up in one map": (halves, dict(fused=True)),
}


@pytest.mark.parametrize("name", INLINE)
@torch.no_grad()
def test_experts_take_the_activation_that_the_forward_calls(name):
    forward, maps = INLINE[name]
    model = Net(Feed(forward, **maps)).eval()
    assert not describe(model.blocks[0]).guessed
    inject_dual_path_moe(model, r"blocks\.0", **SIZES)
    (layer,) = dual_path_layers(model).values()
    x = torch.randn(5, D)
    torch.testing.assert_close(layer.shared_expert(x), layer.static_expert(x))


def test_an_activation_that_is_guessed_is_said_once(caplog):
    class Sine(Feed):
        pass

    model = Net(Sine(lambda ffn, x: ffn.fc2(torch.sin(ffn.fc1(x)))))
    model.blocks.append(Sine(model.blocks[0].given))
    with caplog.at_level(logging.WARNING):
        inject_dual_path_moe(model, r"blocks\.\d", **SIZES)
    assert [record.getMessage().partition(" known")[0] for record in caplog.records] == [
        "Sine neither holds nor calls an activation that is"
    ]
    assert "GELU" in caplog.text and "act_fn" in caplog.text


ADDS = {
    "x + …": lambda ffn, x: x + ffn.fc2(ffn.fc1(x).relu()),
    "in place": lambda ffn, x: ffn.fc2(ffn.fc1(x).relu()).add_(x),
    "before a norm": lambda ffn, x: F.layer_norm(ffn.drop(ffn.fc2(ffn.fc1(x).relu())) + x, (D,)),
    "after a norm": lambda ffn, x: x + ffn.fc2(ffn.fc1(F.layer_norm(x, (D,))).relu()),
}


@pytest.mark.parametrize("name", ADDS)
@torch.no_grad()
def test_a_residual_that_the_ffn_adds_is_no_part_of_what_alpha_scales(name):
    with pytest.raises(NotAnFFN, match="adds its input"):
        describe(Feed(ADDS[name]))
    model = Net(Feed(ADDS[name])).eval()
    x = torch.randn(3, 5, D)
    base = model(x)
    inject_dual_path_moe(model, r"blocks\.0", expert_dim=8, shared_expert_dim=8)
    assert torch.equal(model(x), base)
    (layer,) = dual_path_layers(model).values()
    assert layer.ffn.split
    layer.alpha_logit.fill_(-50.0)  # α = 0: the residual alone is left
    left = x if name != "before a norm" else F.layer_norm(x, (D,))
    torch.testing.assert_close(model(x), left)
    eject_dual_path_moe(model)
    assert torch.equal(model(x), base)


class Normed(nn.Module):
    """A norm between activation and last map, as in BitNet and Kosmos-2."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.act, self.norm, self.down = (
            nn.Linear(D, width),
            nn.ReLU(),
            nn.LayerNorm(width),
            nn.Linear(width, D),
        )

    def forward(self, x):
        return self.down(self.norm(self.act(self.up(x))))


def test_a_norm_between_the_maps_is_part_of_the_static_expert():
    assert describe(Normed(WIDTH)).inner == ("norm.weight", "norm.bias")
    with pytest.raises(NotAnFFN, match=r"norm\.weight"):
        describe(Normed(D))  # D = F: it could as well lie outside the maps


def test_experts_made_of_slices_are_warned_of_such_a_norm():
    with pytest.warns(UserWarning, match=r"hold norm\.weight, norm\.bias between their maps"):
        inject_dual_path_moe(
            Net(Normed(WIDTH)), r"blocks\.0", expert_dim=8, shared_expert_dim=8, expert_init="ffn_slice"
        )


class Block(nn.Module):
    """Attention whose maps carry no telling name, beside an FFN."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D)

    def forward(self, x):
        x = x + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        return x + self.fc2(F.silu(self.fc1(x)))


def test_square_maps_beside_the_ffn_are_left_out():
    ffn = describe_split(Block())
    assert (ffn.up, ffn.down, ffn.activation) == ("fc1", "fc2", F.silu) and not ffn.guessed
