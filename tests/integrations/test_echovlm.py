"""The released key layout and formula, on a small synthetic checkpoint, against float64 written out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers as tf
import zoo
from safetensors.torch import load_file, save_file
from torch import nn

from moe_adapter import MoEAdapterError, dual_path_layers
from moe_adapter.integrations.echovlm import load_released_echovlm

HIDDEN, FFN, EXPERTS, TOP_K, EXPERT_DIM, SHARED_DIM = 32, 48, 4, 2, 16, 24
IDS = torch.tensor([[5, 122, *[120] * 4, 123, 7, 8]])
IMAGE = dict(image_grid_thw=torch.tensor([[1, 4, 4]]), mm_token_type_ids=(IDS == 120).long())
# As transformers 4.4x wrote it: the text model's fields at the top.
CONFIG = dict(
    architectures=["Qwen2VLMOEForConditionalGeneration"],
    model_type="qwen2_vl",
    hidden_size=HIDDEN,
    intermediate_size=FFN,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=zoo.VOCAB,
    hidden_act="silu",
    rms_norm_eps=1e-6,
    max_position_embeddings=256,
    rope_theta=10000.0,
    rope_scaling=dict(type="mrope", mrope_section=[1, 1, 2]),
    image_token_id=120,
    video_token_id=121,
    vision_start_token_id=122,
    vision_end_token_id=123,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
    torch_dtype="float32",
    vision_config=dict(zoo.QWEN_VISION, in_chans=3, model_type="qwen2_vl", spatial_patch_size=14),
    num_experts=EXPERTS,
    num_experts_per_tok=TOP_K,
    norm_topk_prob=False,
    moe_intermediate_size=EXPERT_DIM,
    shared_expert_intermediate_size=SHARED_DIM,
    output_router_logits=False,
    router_aux_loss_coef=0.001,
)


def base_model() -> tf.PreTrainedModel:
    return zoo.build("qwen2_vl", rms_norm_eps=CONFIG["rms_norm_eps"])


def mlp(prefix: str, width: int) -> dict[str, tuple[int, int]]:
    sizes = dict(gate_proj=(width, HIDDEN), up_proj=(width, HIDDEN), down_proj=(HIDDEN, width))
    return {f"{prefix}.{name}.weight": size for name, size in sizes.items()}


def released_tensors() -> dict[str, torch.Tensor]:
    """A base model's weights under the names of transformers 4.4x, and the release's own parts."""
    base = base_model().state_dict()
    tensors = {
        re.sub(r"^model\.(visual\.)", r"\1", re.sub(r"^model\.language_model\.", "model.", name)): tensor
        for name, tensor in base.items()
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        shapes = mlp(f"{block}.moe.shared_expert", SHARED_DIM)
        shapes |= {f"{block}.moe.gate.weight": (EXPERTS, HIDDEN), f"{block}.moe.shared_expert_gate.weight": (1, HIDDEN)}
        shapes |= {f"{block}.coefficient.weight": (2, HIDDEN), f"{block}.coefficient.bias": (2,)}
        for expert in range(EXPERTS):
            shapes |= mlp(f"{block}.moe.experts.{expert}", EXPERT_DIM)
        tensors |= {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    return tensors


def write(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 3, **changes) -> Path:
    """The checkpoint as it is published: shards that cut through blocks, an index, config.json."""
    names, where = list(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = dict(metadata=dict(total_size=total), weight_map=where)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {name: value for name, value in {**CONFIG, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return released_tensors()


class ReleasedLayer(nn.Module):
    """h = c₀·moe(x) + c₁·FFN(x) as the release computes it, in float64, straight from the checkpoint's keys."""

    def __init__(self, tensors: dict[str, torch.Tensor], block: str, top_k: int, renormalise: bool):
        super().__init__()
        self.weights = {name.removeprefix(block + "."): t.double() for name, t in tensors.items() if block in name}
        self.top_k, self.renormalise = top_k, renormalise

    def swiglu(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        gate, up, down = (self.weights[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        z = x @ gate.T
        return (z / (1 + torch.exp(-z)) * (x @ up.T)) @ down.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weights
        probabilities = torch.softmax(x @ w["moe.gate.weight"].T, dim=-1)
        top, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.renormalise:
            top = top / top.sum(-1, keepdim=True)
        experts = torch.stack([self.swiglu(x, f"moe.experts.{e}") for e in range(EXPERTS)], dim=-2)
        picked = experts.gather(-2, chosen[..., None].expand(*chosen.shape, HIDDEN))
        moe = (top[..., None] * picked).sum(-2)
        gate = 1 / (1 + torch.exp(-(x @ w["moe.shared_expert_gate.weight"].T)))
        moe = moe + gate * self.swiglu(x, "moe.shared_expert")
        c = torch.softmax(x @ w["coefficient.weight"].T + w["coefficient.bias"], dim=-1)
        return c[..., 0:1] * moe + c[..., 1:2] * self.swiglu(x, "mlp")


def reference(tensors: dict[str, torch.Tensor], top_k: int = TOP_K, renormalise: bool = False) -> nn.Module:
    """Today's Qwen2-VL in float64 with the released layer for its MLPs."""
    model = base_model().double()
    for index, block in enumerate(model.model.language_model.layers):
        block.mlp = ReleasedLayer(tensors, f"model.layers.{index}", top_k, renormalise)
    return model


def logits(model: nn.Module, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        return model(input_ids=IDS, pixel_values=pixels.to(dtype), **IMAGE).logits


@pytest.mark.parametrize("shards", [1, 3])
def test_logits_are_those_of_the_released_formula(tensors, tmp_path, shards):
    model = load_released_echovlm(write(tmp_path, tensors, shards))
    assert type(model) is tf.Qwen2VLForConditionalGeneration and not model.training
    expected = logits(reference(tensors))
    torch.testing.assert_close(logits(model, torch.float32).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model.double()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("changes", [dict(num_experts_per_tok=1), dict(norm_topk_prob=True)], ids=str)
def test_the_configs_routing_is_followed(tensors, tmp_path, changes):
    model = load_released_echovlm(write(tmp_path, tensors, **changes)).double()
    other = reference(tensors, changes.get("num_experts_per_tok", TOP_K), changes.get("norm_topk_prob", False))
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-10, atol=1e-10)
    assert (logits(model) - logits(reference(tensors))).abs().max() > 1e-3


def test_a_config_without_the_releases_fields_falls_back_on_its_defaults(tensors, tmp_path):
    fields = dict.fromkeys(("num_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size"))
    model = load_released_echovlm(write(tmp_path, tensors, **fields)).double()
    torch.testing.assert_close(logits(model), logits(reference(tensors)), rtol=1e-10, atol=1e-10)


def test_layers_hold_the_checkpoints_weights_in_the_contracts_places(tensors, tmp_path):
    model = load_released_echovlm(write(tmp_path, tensors))
    layers = list(dual_path_layers(model).values())
    assert len(layers) == CONFIG["num_hidden_layers"]
    for index, layer in enumerate(layers):
        moe = f"model.layers.{index}.moe"
        assert torch.equal(layer.router.weight, tensors[f"{moe}.gate.weight"])
        assert torch.equal(layer.experts.gate_up_proj[3, :EXPERT_DIM], tensors[f"{moe}.experts.3.gate_proj.weight"])
        assert torch.equal(layer.experts.gate_up_proj[3, EXPERT_DIM:], tensors[f"{moe}.experts.3.up_proj.weight"])
        assert torch.equal(layer.experts.down_proj[1], tensors[f"{moe}.experts.1.down_proj.weight"])
        assert layer.static_scale == 1 and layer.alpha_logit is None
        trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
        assert trainable == set(layer.new_parameters())


@pytest.mark.parametrize("asked", [None, torch.float16])
def test_dtype_is_the_checkpoints_or_the_one_asked_for(tensors, tmp_path, asked):
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    model = load_released_echovlm(write(tmp_path, half, torch_dtype="bfloat16"), dtype=asked)
    layer = next(iter(dual_path_layers(model).values()))
    assert layer.router.weight.dtype == torch.float32
    assert {p.dtype for name, p in model.named_parameters() if "router" not in name} == {asked or torch.bfloat16}
    expected = logits(reference({name: tensor.float() for name, tensor in half.items()}))
    assert (logits(model, model.dtype).double() - expected).norm() / expected.norm() < 0.1


def test_greedy_generation_runs_from_the_checkpoints_generation_config(tensors, tmp_path):
    folder = write(tmp_path, tensors)
    (folder / "generation_config.json").write_text(json.dumps(dict(max_new_tokens=4, do_sample=False, eos_token_id=2)))
    model = load_released_echovlm(folder)
    text = IDS[:, -2:]
    assert model.generate(input_ids=text).shape[1] <= text.shape[1] + 4
    assert model.generation_config.max_new_tokens == 4


def without(key):
    return lambda tensors: tensors.pop(key)


def plus(key):
    return lambda tensors: tensors.__setitem__(key, torch.zeros(2))


def narrowed(key):
    return lambda tensors: tensors.__setitem__(key, tensors[key][:-1].clone())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.layers.1.moe.experts.2.up_proj.weight"), r"layers\.1\.moe\.experts\.2\.up_proj.*is missing"),
        (without("model.layers.0.coefficient.bias"), r"layers\.0\.coefficient\.bias is missing"),
        (without("visual.patch_embed.proj.weight"), r"visual\.patch_embed\.proj\.weight is missing"),
        (plus("model.layers.0.moe.experts.4.up_proj.weight"), r"experts\.4\.up_proj\.weight has no place"),
        (plus("model.layers.0.lora.weight"), r"layers\.0\.lora\.weight has no place in the model"),
        (narrowed("model.layers.1.moe.gate.weight"), r"moe\.gate\.weight is \(3, 32\), expected \(4, 32\)"),
        (narrowed("lm_head.weight"), r"lm_head\.weight is \(127, 32\), expected \(128, 32\)"),
        (without("model.layers.0.moe.gate.weight"), r"no released EchoVLM checkpoint: it lacks .*moe\.gate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_key_has_its_place(tensors, tmp_path, change, message):
    change(tensors)
    with pytest.raises(MoEAdapterError, match=message):
        load_released_echovlm(write(tmp_path, tensors))


def truncate(folder: Path) -> None:
    file = next(folder.glob("*-00002-*"))
    file.write_bytes(file.read_bytes()[:-100])


def rewrite_shard(folder: Path) -> None:
    file = next(folder.glob("*-00002-*"))
    save_file(dict(list(load_file(file).items())[:-1]), file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: next(folder.glob("*-00002-*")).unlink(), r"00002.*can't be read.*download it again"),
        (truncate, r"00002.*can't be read.*download it again"),
        (rewrite_shard, r"00002.*disagree on 1 keys"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json can't be read"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json can't be read"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), r"model\.safetensors can't be read"),
    ],
    ids=["shard missing", "shard truncated", "shard of another download", "no config", "broken config", "no index"],
)
def test_a_damaged_download_is_a_clear_error(tensors, tmp_path, damage, message):
    damage(write(tmp_path, tensors))
    with pytest.raises(MoEAdapterError, match=message):
        load_released_echovlm(tmp_path)
