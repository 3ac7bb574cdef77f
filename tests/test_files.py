"""Adapter files: exact, atomic, and clear about every way to get them wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
import zoo
from reference import perturb
from safetensors.torch import load_file

from moe_adapter import (
    MoEAdapterError,
    dual_path_layers,
    eject_dual_path_moe,
    inject_dual_path_moe,
    load_adapter,
    save_adapter,
)

SIZES = dict(num_experts=4, expert_dim=16, shared_expert_dim=24)


def injected(seed: int = 7, **config) -> torch.nn.Module:
    return perturb(inject_dual_path_moe(zoo.build("qwen2"), **{**SIZES, **config}), seed=seed)


def new_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.{name}": parameter.detach().clone()
        for prefix, layer in dual_path_layers(model).items()
        for name, parameter in layer.new_parameters().items()
    }


def assert_equal_states(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, dict(mixing="token"), dict(layers=(1,)), dict(num_experts=0)], ids=str)
def test_round_trip_is_bit_exact(tmp_path, config, dtype):
    model = perturb(inject_dual_path_moe(zoo.build("qwen2").to(dtype), **{**SIZES, **config}))
    save_adapter(model, tmp_path)
    fresh = load_adapter(zoo.build("qwen2").to(dtype), tmp_path)
    assert_equal_states(new_state(fresh), new_state(model))
    again = load_adapter(
        perturb(inject_dual_path_moe(zoo.build("qwen2").to(dtype), **{**SIZES, **config}), seed=1), tmp_path
    )
    assert_equal_states(new_state(again), new_state(model))


def test_a_directory_holds_only_what_is_new(tmp_path):
    model = injected()
    save_adapter(model, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and names[0] == "moe_adapter.json" and names[1].endswith(".safetensors")
    assert load_file(tmp_path / names[1]).keys() == new_state(model).keys()


def test_trained_base_parameters_travel_too(tmp_path):
    model = injected()
    model.model.norm.weight.requires_grad_(True)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.5)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(zoo.build("qwen2"), tmp_path).model.norm.weight, model.model.norm.weight)


def test_saving_over_an_older_adapter_leaves_no_remains(tmp_path):
    save_adapter(injected(seed=1), tmp_path)
    model = injected(seed=2)
    save_adapter(model, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert_equal_states(new_state(load_adapter(zoo.build("qwen2"), tmp_path)), new_state(model))


def test_saving_leaves_alone_what_is_not_an_adapters(tmp_path):
    (tmp_path / "lora-baseline").mkdir()
    others = ["lora-baseline/notes.txt", "weights-best.safetensors", ".config.tmp", "weights-0123.safetensors"]
    for name in others:
        (tmp_path / name).write_text("mine")
    save_adapter(injected(seed=1), tmp_path)
    save_adapter(injected(seed=2), tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in others)
    assert len(list(tmp_path.iterdir())) == 2 + len(others)


@pytest.mark.parametrize("step", ["save_file", "os.replace:1", "os.replace:2"])
def test_a_kill_while_saving_leaves_the_old_adapter_whole(tmp_path, step):
    old = injected(seed=1)
    save_adapter(old, tmp_path)
    name, _, count = step.partition(":")
    target = "moe_adapter.directory.save_file" if name == "save_file" else name
    code = f"""
        import os, signal, sys
        sys.path[:0] = {sys.path!r}
        from unittest import mock
        import moe_adapter.directory
        import moe_adapter.files
        from test_files import injected
        calls = 0
        def kill(*args, **kwargs):
            global calls
            calls += 1
            if calls < {count or 1}:
                return original(*args, **kwargs)
            if "{name}" == "save_file":
                open(args[1], "wb").write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        original = {name if name != "save_file" else "moe_adapter.directory.save_file"}
        model = injected(seed=2)
        with mock.patch("{target}", kill):
            moe_adapter.files.save_adapter(model, {str(tmp_path)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert_equal_states(new_state(load_adapter(zoo.build("qwen2"), tmp_path)), new_state(old))
    save_adapter(injected(seed=3), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "the remains of the killed save are gone"


def edit(folder, **changes):
    file = folder / "moe_adapter.json"
    index = json.loads(file.read_text())
    index.update(changes)
    file.write_text(json.dumps(index))


def relayer(folder, layers):
    base = next(iter(json.loads((folder / "moe_adapter.json").read_text())["base"].values()))
    edit(folder, layers=layers, base={layer: base for layer in layers})


def truncate(folder):
    file = next(folder.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size // 2)


DAMAGE = {
    "no adapter": (lambda folder: (folder / "moe_adapter.json").unlink(), "holds no adapter"),
    "truncated weights": (truncate, "truncated or damaged"),
    "missing weights": (lambda folder: next(folder.glob("*.safetensors")).unlink(), "is missing"),
    "broken JSON": (lambda folder: (folder / "moe_adapter.json").write_text('{"format_version": '), "damaged"),
    "newer format": (lambda folder: edit(folder, format_version=99), "format version 99.*upgrade"),
    "no format": (lambda folder: edit(folder, format_version=None), "format_version is None"),
    "unknown field": (lambda folder: edit(folder, speed=1), "unknown or missing fields: speed"),
    "unknown config field": (lambda folder: edit(folder, config={"topk": 2}), "no field topk"),
    "layers of another model": (
        lambda folder: relayer(folder, ["model.layers.7.mlp"]),
        r"doesn't fit this base: Qwen2ForCausalLM has no module model\.layers\.7\.mlp \(1 such\), where a "
        "Qwen2ForCausalLM has an FFN. Load the base",
    ),
    "weights of another shape": (lambda folder: edit(folder, config={"expert_dim": 8}), "the model expects.*load the"),
    "fewer layers in the index": (lambda folder: relayer(folder, ["model.layers.0.mlp"]), "hasn't got: load the base"),
    "no description of the base": (lambda folder: edit(folder, base={}), "don't describe the base of 2 layers. Copy"),
    "half a description of the base": (
        lambda folder: edit(folder, base={"model.layers.0.mlp": {}, "model.layers.1.mlp": {}}),
        "don't describe the base",
    ),
    **{
        f"{field} null": (
            lambda folder, field=field: edit(folder, **{field: None}),
            f"is damaged: {field} is None, expected a {kind}. Copy the adapter again",
        )
        for field, kind in dict(config="dict", layers="list", weights="str", base="dict", model="dict").items()
    },
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_refused_and_the_model_left_alone(tmp_path, damage):
    break_it, message = DAMAGE[damage]
    save_adapter(injected(), tmp_path)
    break_it(tmp_path)
    model = zoo.build("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(MoEAdapterError, match=message):
        load_adapter(model, tmp_path)
    assert_equal_states(model.state_dict(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


BASES = {
    "other weights": (lambda: zoo.build("qwen2", seed=5), "weights of model.layers.0.mlp differ"),
    "other architecture": (lambda: zoo.build("gpt2"), "doesn't fit this base"),
}


@pytest.mark.parametrize("base", BASES)
def test_a_wrong_base_is_refused(tmp_path, base):
    build, message = BASES[base]
    save_adapter(injected(), tmp_path)
    model = build()
    with pytest.raises(MoEAdapterError, match=message):
        load_adapter(model, tmp_path)
    assert not dual_path_layers(model)


def test_the_base_is_recognised_in_another_dtype(tmp_path):
    save_adapter(injected(), tmp_path)
    load_adapter(zoo.build("qwen2").bfloat16(), tmp_path)


def test_an_injected_model_of_another_config_is_refused(tmp_path):
    save_adapter(injected(), tmp_path)
    model = injected(top_k=1, router_softmax="all")
    with pytest.raises(MoEAdapterError, match="another top_k, router_softmax"):
        load_adapter(model, tmp_path)


def test_the_base_parameters_of_an_earlier_adapter_leave_with_it(tmp_path):
    model = injected(seed=1)
    model.model.norm.weight.requires_grad_(True)
    torch.nn.init.constant_(model.model.norm.weight, 1.5)
    save_adapter(model, tmp_path / "with")
    save_adapter(injected(seed=2), tmp_path / "without")
    model = load_adapter(zoo.build("qwen2"), tmp_path / "with")
    assert load_adapter(model, tmp_path / "without").model.norm.weight.eq(1).all()


def test_a_dense_model_has_no_adapter_to_save(tmp_path):
    with pytest.raises(MoEAdapterError, match="inject_dual_path_moe"):
        save_adapter(eject_dual_path_moe(injected()), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_weights_on_the_meta_device_are_not_saved(tmp_path):
    model = inject_dual_path_moe(zoo.build("qwen2").to("meta"), **SIZES)
    with pytest.raises(MoEAdapterError, match="meta device"):
        save_adapter(model, tmp_path / "new")
