"""Averages of runs: every parameter by weight, LoRAs by what they do to the base, and a reason where there is none."""

from __future__ import annotations

import hashlib
import json

import peft
import pytest
import torch
import zoo
from reference import perturb
from safetensors.torch import load_file, save_file
from test_adapters import SIZES, trained

from moe_adapter import MoEAdapterError, inject_dual_path_moe, load_adapter, save_adapter
from moe_adapter.adapters import merge_adapters


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("weights-*.safetensors")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_averages_every_parameter_by_weight(dtype, tmp_path):
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        save_adapter(perturb(inject_dual_path_moe(zoo.build("qwen2").to(dtype), **SIZES), seed=seed), tmp_path / name)
    merge_adapters([tmp_path / name for name in "abc"], [1, 2, 5], tmp_path / "merged")
    parts = [weights_of(tmp_path / name) for name in "abc"]
    merged = weights_of(tmp_path / "merged")
    assert merged.keys() == parts[0].keys()
    for name, tensor in merged.items():
        expected = sum(share / 8 * part[name].double() for share, part in zip((1, 2, 5), parts, strict=True))
        assert tensor.dtype == parts[0][name].dtype
        torch.testing.assert_close(tensor, expected.to(tensor.dtype))
    load_adapter(zoo.build("qwen2").to(dtype), tmp_path / "merged")


def test_runs_that_differ_only_in_start_values_or_speed_are_merged(tmp_path):
    save_adapter(trained(1), tmp_path / "a")
    save_adapter(trained(2, expert_init="ffn_slice", lam_init=0.3, init_std=0.1, balance_coef=0.1), tmp_path / "b")
    merge_adapters([tmp_path / "a", tmp_path / "b"], [1, 1], tmp_path / "merged")
    load_adapter(zoo.build("qwen2"), tmp_path / "merged")


def update(folder) -> dict[str, torch.Tensor]:
    """ΔW of a LoRA by module, computed by peft's own merging into the base."""
    model = peft.PeftModel.from_pretrained(zoo.build("qwen2"), folder).merge_and_unload()
    base = dict(zoo.build("qwen2").named_parameters())
    return {name: (p - base[name]).detach() for name, p in model.named_parameters() if "_proj" in name}


def test_merging_averages_what_loras_do_to_the_base(tmp_path):
    loras = (dict(r=4), dict(r=2, lora_alpha=32, use_rslora=True))
    for name, lora in zip("ab", loras, strict=True):
        save_adapter(trained(ord(name), lora=lora), tmp_path / name)
    merge_adapters([tmp_path / "a", tmp_path / "b"], [3.0, 1.0], tmp_path / "merged")
    a, b, merged = (update(next((tmp_path / name).glob("lora-*"))) for name in ("a", "b", "merged"))
    assert any(part.abs().max() > 0.01 for part in a.values())
    for name, part in merged.items():
        torch.testing.assert_close(part, 0.75 * a[name] + 0.25 * b[name], rtol=1e-4, atol=1e-5)
    load_adapter(zoo.build("qwen2"), tmp_path / "merged")


def rescale(folder) -> None:
    """Make one tensor of an adapter another shape, hash and all."""
    index = json.loads((folder / "moe_adapter.json").read_text())
    tensors = weights_of(folder)
    tensors["model.layers.0.mlp.router.weight"] = torch.zeros(3, 32)
    (folder / index["weights"]).unlink()
    save_file(tensors, folder / "new")
    index["weights"] = f"weights-{hashlib.sha256((folder / 'new').read_bytes()).hexdigest()[:16]}.safetensors"
    (folder / "new").rename(folder / index["weights"])
    (folder / "moe_adapter.json").write_text(json.dumps(index))


UNMERGEABLE = {
    "other config": (
        lambda f: save_adapter(trained(2, top_k=1, router_softmax="all"), f),
        "config.top_k, config.router",
    ),
    "other layers": (lambda f: save_adapter(trained(2, layers=(0,)), f), "differ in layers"),
    "other base": (
        lambda f: save_adapter(perturb(inject_dual_path_moe(zoo.build("qwen2", seed=4), **SIZES)), f),
        "differ in base; expected runs of one config on one base",
    ),
    "a LoRA beside one of them": (lambda f: save_adapter(trained(2, lora={}), f), "holds no LoRA and others do"),
    "a trained norm beside one of them": (
        lambda f: save_adapter(trained(2, norm=1.5), f),
        "model.norm.weight is absent",
    ),
    "other shapes": (lambda f: (save_adapter(trained(2), f), rescale(f)), r"is \(4, 32\) in the one and \(3, 32\) in"),
    "no adapter": (lambda f: f.mkdir(), "holds no adapter"),
}


@pytest.mark.parametrize("case", UNMERGEABLE)
def test_adapters_that_cannot_be_averaged_say_why_and_nothing_is_written(case, tmp_path):
    make, message = UNMERGEABLE[case]
    save_adapter(trained(1), tmp_path / "a")
    make(tmp_path / "b")
    with pytest.raises(MoEAdapterError, match=message):
        merge_adapters([tmp_path / "a", tmp_path / "b"], [1, 1], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (dict(target_modules=r".*self_attn\.(k|v)_proj"), "LoRAs on different modules"),
        (dict(use_dora=True), "more than plain A and B"),
        (dict(rank_pattern={"q_proj": 2}), "more than plain A and B"),
    ],
)
def test_loras_that_cannot_be_averaged_say_why(lora, message, tmp_path):
    save_adapter(trained(1, lora={}), tmp_path / "a")
    save_adapter(trained(2, lora=lora), tmp_path / "b")
    with pytest.raises(MoEAdapterError, match=message):
        merge_adapters([tmp_path / "a", tmp_path / "b"], [1, 1], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "got 1 weights for 2 adapters"),
        ([0, 0], "not all of them 0"),
        ([2, -1], "numbers ≥ 0"),
        ([1, float("nan")], "≥ 0"),
        ("ab", "got weights 'ab', expected one number"),
        (["1", "2"], r"got weights \['1', '2'\], expected one number"),
        (None, "got weights None, expected one number"),
    ],
)
def test_weights_that_make_no_average_are_refused(weights, message, tmp_path):
    with pytest.raises(MoEAdapterError, match=message):
        merge_adapters([tmp_path, tmp_path], weights, tmp_path)
