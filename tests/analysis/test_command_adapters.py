"""`moe-adapter inject` and `info`: what they write and say is what the library does."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
import zoo
from command_models import run

from moe_adapter import dual_path_layers, inject_dual_path_moe, load_adapter, plan_injection, save_adapter
from moe_adapter.integrations.peft import stage2_lora

SIZES = ("--expert-dim", "16", "--shared-expert-dim", "1/2", "--set", "num_experts=3")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    zoo.build("qwen2_vl").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(base: Path) -> tf.PreTrainedModel:
    return tf.AutoModelForImageTextToText.from_pretrained(base)


def said(capsys: pytest.CaptureFixture, *arguments: str | Path) -> dict:
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_inject_writes_what_the_library_would(base, tmp_path, capsys):
    assert run("inject", base, "-o", tmp_path / "new", *SIZES, "--seed", "5") == 0
    torch.manual_seed(5)
    model = inject_dual_path_moe(load(base), expert_dim=16, shared_expert_dim=0.5, num_experts=3)
    expected = plan_injection(load(base), expert_dim=16, shared_expert_dim=0.5, num_experts=3)
    out = capsys.readouterr().out
    assert str(expected) in out and str(tmp_path / "new") in out
    loaded = dual_path_layers(load_adapter(load(base), tmp_path / "new"))
    for name, layer in dual_path_layers(model).items():
        for key, parameter in layer.new_parameters().items():
            assert torch.equal(loaded[name].new_parameters()[key], parameter), (name, key)


def test_inject_as_json_says_what_was_added(base, tmp_path, capsys):
    found = said(capsys, "inject", base, "-o", tmp_path / "new", "--budget", "20k")
    expected = plan_injection(load(base), budget="20k")
    assert found["adapter"] == str(tmp_path / "new") and found["added"] == expected.added
    assert found["config"] == json.loads(json.dumps(expected.config.to_dict()))


def test_inject_leaves_what_is_there_alone(base, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert run("inject", base, "-o", tmp_path / "full", *SIZES) == 1
    assert "no empty directory" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_inject_tells_what_is_wrong_in_one_line(base, tmp_path, capsys):
    for arguments, told in (
        ((base, "--set", "top_k=9"), "top_k"),
        ((base, "--target", "nothing_like_it"), "matches no module"),
        ((tmp_path / "none",), "Expected a checkpoint's directory"),
    ):
        assert run("inject", *arguments, "-o", tmp_path / "new") == 1
        err = capsys.readouterr().err
        assert told in err and err.count("\n") == 1
        assert not (tmp_path / "new").exists()


def test_info_of_an_adapter_is_read_off_its_files(base, tmp_path, capsys):
    model = inject_dual_path_moe(load(base), expert_dim=16, shared_expert_dim=24, num_experts=3)
    for number, layer in enumerate(dual_path_layers(model).values()):
        layer.alpha_logit.data.fill_(0.3 + number)
    save_adapter(model, tmp_path / "adapter")
    found = said(capsys, "info", tmp_path / "adapter")
    assert [row["layer"] for row in found["layers"]] == list(dual_path_layers(model))
    for row, layer in zip(found["layers"], dual_path_layers(model).values(), strict=True):
        assert (row["experts"], row["top_k"], row["expert_dim"], row["shared_expert_dim"]) == (3, 2, 16, 24)
        assert row["alpha"] == pytest.approx(layer.alpha.item()) and row["lam"] == pytest.approx(0.5)
        assert row["parameters"] == sum(p.numel() for p in layer.new_parameters().values())
    assert found["parameters"] == sum(row["parameters"] for row in found["layers"])
    assert (found["base_parameters"], found["lora"], found["format_version"]) == (0, None, 1)
    assert found["base"] == {
        "class": "Qwen2VLForConditionalGeneration",
        "name": "base",
        "parameters": sum(p.numel() for p in load(base).parameters()),
    }
    assert run("info", tmp_path / "adapter") == 0
    out = capsys.readouterr().out
    assert "num_experts=3" in out and f"{layer.alpha.item():.3f}" in out


def test_info_tells_of_a_lora_of_token_mixing_and_of_trained_base_parameters(base, tmp_path, capsys):
    model = inject_dual_path_moe(load(base), expert_dim=16, shared_expert_dim=0, mixing="token")
    model = peft.get_peft_model(model, stage2_lora(model, r=4))
    norm = model.get_submodule("base_model.model.model.language_model.norm")
    norm.requires_grad_(True)
    save_adapter(model, tmp_path / "adapter")
    found = said(capsys, "info", tmp_path / "adapter")
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert (found["lora"]["r"], found["lora"]["parameters"]) == (4, lora)
    assert found["base_parameters"] == norm.weight.numel()
    assert {(row["alpha"], row["lam"], row["shared_expert_dim"]) for row in found["layers"]} == {(None, None, 0)}


def test_info_of_a_record_is_its_facts(written, drawn, capsys):
    rng = torch.Generator().manual_seed(0)
    experts = [torch.randint(4, (9, 2, 2), generator=rng).numpy() for _ in range(3)]
    record = written(experts, groups=["肝", "heart", "肝"])
    found = said(capsys, "info", record.paths[0])
    assert (found["cases"], found["tokens"], found["groups"]) == (3, 27, ["肝", "heart"])
    assert [(row["name"], row["num_experts"], row["top_k"]) for row in found["layers"]] == [
        ("layers.0", 4, 2),
        ("layers.1", 4, 2),
    ]
    assert run("info", record.paths[0]) == 0
    assert "肝, heart" in capsys.readouterr().out


def test_info_tells_what_is_no_adapter_and_what_is_damaged(base, tmp_path, capsys):
    assert run("info", tmp_path / "none") == 1
    assert "expected an adapter's directory" in capsys.readouterr().err
    assert run("info", base) == 1
    assert "holds no adapter" in capsys.readouterr().err
    assert run("info", base / "config.json") == 1
    assert "not a routing record" in capsys.readouterr().err
    save_adapter(inject_dual_path_moe(load(base), expert_dim=16, shared_expert_dim=24), tmp_path / "adapter")
    weights = next((tmp_path / "adapter").glob("weights-*"))
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run("info", tmp_path / "adapter") == 1
    assert "missing or damaged" in capsys.readouterr().err
