"""The methods beside the paper's: what trains, what is left alone, and that what was trained comes back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from echovlm.recipe_parts import collator, example, small_config, tokenizer
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from examples.echovlm.account import Account
from examples.echovlm.config import RecipeConfig, StageConfig, load_preset
from examples.echovlm.families import build_model
from examples.echovlm.methods import METHODS, choose_trained, count_parameters, inject, moe_arguments
from examples.echovlm.stages import add_lora, finished_stage, stage1, stage2
from examples.echovlm.trainer import RecipeTrainer
from moe_adapter import MoEAdapterError, dual_path_layers, plan_injection
from moe_adapter.lora import plain_name

# What trains in stage II, by parts of parameters' names; nothing else may.
TRAINED = {
    ("dual-path", ()): ("lora_", "router", "experts", "shared_expert", "alpha_logit", "lam_logit"),
    ("dual-path", ("router",)): ("lora_", "experts", "shared_expert", "alpha_logit", "lam_logit"),
    ("dual-path", ("alpha", "lambda")): ("lora_", "router", "experts", "shared_expert"),
    ("dense", ()): ("lora_", "shared_expert", "alpha_logit", "lam_logit"),
    ("plain", ()): ("lora_",),
    ("full", ()): ("",),
}


def _config(method: str, frozen: tuple[str, ...] = (), **run: float) -> RecipeConfig:
    run = {"learning_rate": 1e-2, **run}
    return small_config(run=run, method=method, frozen=frozen)


def _base(config: RecipeConfig) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config, tokenizer())


def _train(config: RecipeConfig, folder: Path) -> nn.Module:
    """The method's stages on four copies of one example; without preserving the base's output, so that all can move."""
    model, account = _base(config), Account()
    for stage in METHODS[config.method].stages:
        with account.step(str(stage)):
            train = {1: stage1, 2: stage2}[stage]
            data = [example()] * 4
            model = train(model, data, collator(), config, folder / str(stage), account, fresh=lambda: None)
    return model


@pytest.mark.parametrize(("method", "frozen"), TRAINED)
def test_what_a_method_trains_moves_comes_back_and_is_all_that_moves(
    tmp_path: Path, method: str, frozen: tuple[str, ...]
) -> None:
    config = _config(method, frozen)
    config = dataclasses.replace(config, moe={**config.moe, "preserve_base": False})
    trained = _train(config, tmp_path)
    parts = TRAINED[method, frozen]
    named = dict(trained.named_parameters())
    learning = {name for name, p in named.items() if p.requires_grad}
    assert learning == {name for name in named if "static_expert" not in name and any(part in name for part in parts)}
    assert count_parameters(trained)["trainable"] == sum(named[name].numel() for name in learning)

    start = _base(config)
    inject(start, config)
    before = {_core(name): p for name, p in start.named_parameters()}
    still = {name for name in named if _core(name) in before and torch.equal(named[name], before[_core(name)])}
    # The visual towers' rows that no picture reaches, and LoRA's, aren't in `before`; of the rest all else has moved.
    assert {name for name in named if name not in learning and "lora_" not in name} <= still
    assert len(still & learning) <= len(learning) // 10

    again = _base(config)
    for stage in METHODS[method].stages:
        again = finished_stage(stage, again, config, tmp_path / str(stage))
    back = dict(again.named_parameters())
    assert set(back) == set(named)
    for name, parameter in named.items():
        assert torch.equal(back[name], parameter), name
        assert back[name].requires_grad == parameter.requires_grad, name


def _core(name: str) -> str:
    return plain_name(name.removeprefix("base_model.model."))


def test_a_frozen_router_routes_at_random_and_its_experts_learn(tmp_path: Path) -> None:
    config = _config("dual-path", ("router",))
    model = _train(config, tmp_path)
    start = _base(config)
    inject(start, config)
    for layer, before in zip(dual_path_layers(model).values(), dual_path_layers(start).values(), strict=True):
        assert torch.equal(layer.router.weight, before.router.weight) and layer.router.weight.std() > 0
        assert not torch.equal(layer.experts.down_proj, before.experts.down_proj)


def _qwen2_vl(text: dict) -> nn.Module:
    heads = max(text["hidden_size"] // 128, 2)
    sizes = {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 512, **text}
    vision = {"depth": 1, "hidden_size": text["hidden_size"]}
    with torch.device("meta"):
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=sizes, vision_config=vision))


SIZES = {
    "paper": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 1},
    "small": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 1},
    "tiny": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 1},
}
NEW = {"paper": 3_391_496_248, "small": 693_805_112}  # small: 28·(3·1536·(2688 + 4·672) + 4·1536 + 2)


@pytest.mark.parametrize("preset", SIZES)
def test_dense_has_as_many_parameters(preset: str) -> None:
    config, model = load_preset(preset, {"method": "dense"}), _qwen2_vl(SIZES[preset])
    dense = moe_arguments(model, config)
    added, routed = (plan_injection(model, **moe).added for moe in (dense, config.moe))
    assert 28 * routed == NEW.get(preset, 28 * routed)  # one of 28 layers
    assert dense["num_experts"] == 0 and abs(added / routed - 1) <= 1e-3


def test_freezing_what_the_layers_havent_got_is_an_error() -> None:
    config = _config("dual-path", ("alpha",))
    config = dataclasses.replace(config, moe={**config.moe, "mixing": "token"})
    model = _base(config)
    inject(model, config)
    with pytest.raises(MoEAdapterError, match=r"frozen: got 'alpha', .* expected one of router"):
        choose_trained(model, 1, config)


@pytest.mark.parametrize("method", ["plain", "full"])
def test_a_method_without_dual_path_resumes_to_the_bit(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(method)
    stage: StageConfig = dataclasses.replace(config.stage2, save_steps=1)
    config = dataclasses.replace(config, stage2=stage)
    through = dict(_train(config, tmp_path / "through").named_parameters())

    step = RecipeTrainer.training_step

    def die(self: RecipeTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RecipeTrainer, "training_step", die)
        with pytest.raises(KeyboardInterrupt):
            _train(config, tmp_path / "killed")
    assert (tmp_path / "killed" / "2" / "checkpoint-2").is_dir()
    seen = []
    monkeypatch.setattr(RecipeTrainer, "training_step", lambda *a, **k: seen.append(1) or step(*a, **k))
    resumed = dict(_train(config, tmp_path / "killed").named_parameters())
    assert len(seen) == 2
    assert all(torch.equal(resumed[name], parameter) for name, parameter in through.items())


def test_lora_sits_on_the_same_modules_with_and_without_the_moe() -> None:
    config = _config("plain")
    tuned = add_lora(_base(config), config)
    other = _base(dataclasses.replace(config, method="dual-path"))
    inject(other, dataclasses.replace(config, method="dual-path"))
    assert tuned.base_model.targeted_module_names == add_lora(other, config).base_model.targeted_module_names
