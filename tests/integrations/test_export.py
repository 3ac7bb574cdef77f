"""Exported models: loaded where moe_adapter is not, and loaded again where it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
import zoo
from export_cases import CASES, IDS, SIZES, TEXT, Case, cast
from reference import perturb
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from moe_adapter import (
    DualPathMoE,
    MoEAdapterError,
    balance_loss,
    dual_path_layers,
    eject_dual_path_moe,
    inject_dual_path_moe,
    set_stage,
)
from moe_adapter.integrations import modeling_dual_path_moe as remote
from moe_adapter.integrations.transformers import _activation_name, export_model

# Runs where there is no moe_adapter: loads each model, runs it, saves it, loads what it saved and runs that.
ELSEWHERE = """
import sys
sys.modules["moe_adapter"] = None
import torch, transformers
folder, results = sys.argv[1], {}
torch.set_num_threads(1)
for name, (auto, inputs, decoder) in torch.load(f"{folder}/cases.pt").items():
    path, again = f"{folder}/{name}", f"{folder}/{name}-again"
    for place in (path, again):
        model = getattr(transformers, auto).from_pretrained(place, trust_remote_code=True)
        with torch.no_grad():
            found = {"logits": model(**inputs, **decoder).logits, "class": type(model).__name__}
        if model.can_generate():
            found["generated"] = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        results[place] = found
        model.save_pretrained(again)
torch.save(results, f"{folder}/results.pt")
"""


def run_elsewhere(code: str, *arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, cwd=cache, text=True, capture_output=True, stdin=subprocess.DEVNULL)


AGAIN = ("qwen2_vl, exported again", "qwen2_vl, saved again")


def written_again(folder: Path, here: dict[str, dict]) -> None:
    """A model loaded by moe_adapter's own classes, trained on and written in both ways."""
    model = perturb(tf.AutoModelForImageTextToText.from_pretrained(folder / "qwen2_vl"), seed=11)
    export_model(model, folder / AGAIN[0])
    model.save_pretrained(folder / AGAIN[1])
    here |= dict.fromkeys(AGAIN, CASES["qwen2_vl"].answers(model))


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> tuple[Path, dict, dict]:
    """Every case exported, with its answers here and those of a process without moe_adapter."""
    folder = tmp_path_factory.mktemp("exported")
    here = {}
    for name, case in CASES.items():
        model = case.injected()
        export_model(model, folder / name)
        here[name] = case.answers(model)
    written_again(folder, here)
    cases = {name: CASES[name.partition(", ")[0]] for name in here}
    torch.save({name: (case.auto, case.inputs, case.decoder()) for name, case in cases.items()}, folder / "cases.pt")
    done = run_elsewhere(ELSEWHERE, str(folder), cache=tmp_path_factory.mktemp("cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, here, torch.load(folder / "results.pt")


@pytest.mark.parametrize("name", [*CASES, *AGAIN])
def test_a_process_without_moe_adapter_gives_the_same_answers_bit_for_bit(elsewhere, name):
    folder, here, there = elsewhere
    for place in (f"{folder}/{name}", f"{folder}/{name}-again"):
        found = there[place]
        assert found.pop("class").startswith("DualPath")
        assert found.keys() == here[name].keys()
        for key, expected in here[name].items():
            assert torch.equal(found[key], expected), (place, key)


@pytest.mark.parametrize("name", CASES)
def test_where_moe_adapter_is_imported_the_layers_are_its_own(elsewhere, name):
    folder, here, _ = elsewhere
    case = CASES[name]
    model = getattr(tf, case.auto).from_pretrained(folder / name)
    layers = dual_path_layers(model)
    assert list(layers) == list(dual_path_layers(case.injected()))
    assert all(isinstance(layer, DualPathMoE) for layer in layers.values())
    for key, answer in case.answers(model).items():
        assert torch.equal(answer, here[name][key]), key
    new = {id(p) for layer in layers.values() for p in layer.new_parameters().values()}
    assert all(p.requires_grad == (id(p) in new) for p in model.parameters())


@pytest.mark.parametrize("name", ["qwen2_vl", "llama", "gpt2", "bloom", "opt", "bart", "llama4"])
def test_the_headless_model_is_the_one_inside(elsewhere, name):
    folder = elsewhere[0] / name
    case = CASES[name]
    whole, inner = (auto.from_pretrained(folder) for auto in (getattr(tf, case.auto), tf.AutoModel))
    with torch.no_grad():
        expected = getattr(whole, "transformer" if hasattr(whole, "transformer") else "model")(
            **case.inputs, **case.decoder()
        ).last_hidden_state
        assert torch.equal(inner(**case.inputs, **case.decoder()).last_hidden_state, expected)
    assert len(dual_path_layers(inner)) == len(dual_path_layers(whole))


def twins(case: Case, tmp_path: Path) -> tuple[nn.Module, nn.Module]:
    """The injected model, and the exported one with the layers of the modeling file."""
    model = case.injected()
    export_model(model, tmp_path)
    cls = getattr(remote, f"DualPath{type(model).__name__}")
    found, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert not dual_path_layers(found)
    return model, found


VARIANTS = {
    "top-1": dict(top_k=1, router_softmax="all"),
    "top-all": dict(top_k=4),
    "softmax over all": dict(router_softmax="all"),
    "literal equation": dict(preserve_base=False),
    "alpha 0.9": dict(alpha_init=0.9),
    "no shared expert": dict(shared_expert_dim=0),
    "no routed experts": dict(num_experts=0),
    "token mixing": dict(mixing="token", router_softmax="all"),
    "token mixing, no shared expert": dict(mixing="token", shared_expert_dim=0),
    "token mixing, no routed experts": dict(mixing="token", num_experts=0),
    "odd sizes": dict(num_experts=3, expert_dim=7, shared_expert_dim=5),
    "shares of the FFN": dict(expert_dim=0.5, shared_expert_dim=0.25),
    "eager": dict(backend="eager"),
    "batched_mm": dict(backend="batched_mm"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("host", ["qwen2", "gpt2", "phi3", "bloom", "opt"])
def test_the_modeling_files_layers_are_those_of_moe_adapter(host, variant, dtype, tmp_path):
    """Gated and plain, with biases and without, Conv1D, packed gate_up, own residual, split: outputs and gradients."""
    base = CASES[host]
    case = Case(lambda: cast(base.build(), dtype), base.auto, balance_coef=0.0, **VARIANTS[variant])
    model, found = twins(case, tmp_path)
    set_stage(model, 1)
    outputs = [each(input_ids=IDS) for each in (model, found)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.logits.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in found.named_parameters()}
    for prefix, layer in dual_path_layers(model).items():
        for name, parameter in layer.new_parameters().items():
            tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(gradients[f"{prefix}.{name}"], parameter.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "activation",
    [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.functional.relu, nn.functional.mish],
    ids=["gelu", "gelu_tanh", "silu", "relu", "mish"],
)
def test_an_activation_that_no_ffn_holds_goes_by_its_name(activation):
    name = _activation_name(activation, nn.Linear(2, 2))
    x = torch.linspace(-4, 4, 64)
    assert torch.equal(remote.find_activation(name, nn.Linear(2, 2))(x), activation(x))


@pytest.mark.parametrize("backend", ["auto", "lean", "grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("host", ["qwen2", "gpt2", "qwen2_vl in bfloat16"])
def test_every_backend_goes_with_it(host, backend, tmp_path):
    case = CASES[host]
    model, found = twins(Case(case.build, case.auto, case.inputs, backend=backend), tmp_path)
    with torch.no_grad():
        assert torch.equal(found(**case.inputs).logits, model(**case.inputs).logits)


def test_a_backend_that_stays_behind_is_replaced(tmp_path):
    """The modeling file has no `megablocks`: its logits are equal to rounding."""
    case = Case(CASES["qwen2"].build, "AutoModelForCausalLM", backend="megablocks")
    model, found = twins(case, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(found(**TEXT).logits, model(**TEXT).logits, rtol=1e-4, atol=1e-5)


def test_a_router_stays_float32_however_the_model_is_cast(tmp_path):
    _, found = twins(CASES["qwen2_vl in bfloat16"], tmp_path)
    for model in (found, found.half(), type(found).from_pretrained(tmp_path, dtype=torch.float16)):
        kinds = {name: p.dtype for name, p in model.named_parameters()}
        wide = {name for name, dtype in kinds.items() if dtype == torch.float32}
        layers = [f"model.language_model.layers.{i}.mlp" for i in range(2)]
        assert wide == {f"{layer}.{part}" for layer in layers for part in ("router.weight", "alpha_logit", "lam_logit")}


def test_weights_lie_aligned_so_that_the_last_bit_does_not_depend_on_the_file(tmp_path):
    _, found = twins(CASES["odd sizes"], tmp_path)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in found.parameters())


def test_without_trust_in_the_code_nothing_loads(elsewhere, tmp_path):
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = run_elsewhere(code, str(elsewhere[0] / "qwen2"), cache=tmp_path)
    assert done.returncode != 0 and "trust_remote_code=True" in done.stderr


def test_the_directory_says_what_it_is(elsewhere):
    folder = elsewhere[0] / "qwen2_vl"
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "modeling_dual_path_moe.py")
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "dual_path_moe"
    assert config["architectures"] == ["DualPathQwen2VLForConditionalGeneration"]
    assert list(config["auto_map"])[:2] == ["AutoConfig", "AutoModel"]
    assert config["dual_path"]["sites"][0]["layers"] == [f"model.language_model.layers.{i}.mlp" for i in range(2)]


def test_the_loaded_models_loss_holds_the_balance_loss_and_its_layers_can_be_ejected(elsewhere):
    folder, _, _ = elsewhere
    model = tf.AutoModelForCausalLM.from_pretrained(folder / "qwen2").train()
    loss = model(**TEXT, labels=IDS).loss
    share = balance_loss(model)
    with torch.no_grad():
        assert torch.equal(loss, model.eval()(**TEXT, labels=IDS).loss + 1e-3 * share)
        eject_dual_path_moe(model)
        assert torch.equal(model(**TEXT).logits, zoo.build("qwen2")(**TEXT).logits)
    with pytest.raises(MoEAdapterError, match="no dual-path layers"):
        model.save_pretrained(folder / "ejected")


def lora_over(model: nn.Module) -> peft.PeftModel:
    config = peft.LoraConfig(r=2, target_modules=r".*self_attn\.(q|v)_proj", init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def test_a_lora_is_merged_first(tmp_path):
    wrapped = lora_over(CASES["qwen2"].injected())
    with pytest.raises(MoEAdapterError, match=r"LoRA.*merge_and_unload"):
        export_model(wrapped, tmp_path)
    merged = wrapped.merge_and_unload()
    export_model(merged, tmp_path)
    found = remote.DualPathQwen2ForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(found(**TEXT).logits, merged(**TEXT).logits)


def quantised(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith("q_proj"))
    return model


def on_meta(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        return inject_dual_path_moe(zoo.ZOO["qwen2"](), **SIZES)


def plain_torch(model: nn.Module) -> nn.Module:
    net = nn.ModuleDict({"ffn": nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))})
    return inject_dual_path_moe(net, "ffn", **SIZES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (eject_dual_path_moe, r"no dual-path layers: call inject_dual_path_moe"),
        (
            plain_torch,
            r"got a torch\.nn\.\S+ModuleDict, expected a model of a class that transformers has",
        ),
        (on_meta, r"is on the meta device; expected plain floating-point weights"),
        (quantised, r"q_proj\.weight is a \w*Int8\w* of .*; expected plain floating-point weights"),
    ],
)
def test_what_cannot_be_exported_says_why_and_writes_nothing(change, message, tmp_path):
    model = change(CASES["qwen2"].injected())
    with pytest.raises(MoEAdapterError, match=message):
        export_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    model = CASES["qwen2_vl"].injected()
    before = {name: (id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    config = model.config.to_dict()
    export_model(model, tmp_path)
    after = {name: (id(p), p.requires_grad, p) for name, p in model.named_parameters()}
    assert before.keys() == after.keys()
    assert all(before[name][:2] == after[name][:2] and torch.equal(before[name][2], after[name][2]) for name in before)
    assert model.config.to_dict() == config and len(dual_path_layers(model)) == 2


SERVE = """
import sys
sys.modules["moe_adapter"] = None
import torch
from transformers.cli.serving.model_manager import ModelManager
manager = ModelManager(device="cpu", trust_remote_code=True, force_model=sys.argv[1])
model, tokenizer = manager.load_model_and_processor(sys.argv[1])
inputs = tokenizer("a b c d", return_tensors="pt")
torch.save(model.generate(**inputs, max_new_tokens=6, do_sample=False), f"{sys.argv[1]}/generated.pt")
print(manager.get_model_modality(model).name)
"""


@pytest.mark.parametrize(("name", "modality"), [("qwen2", "LLM"), ("qwen2_vl", "MULTIMODAL")])
def test_transformers_serve_loads_it_and_knows_what_it_reads(name, modality, tmp_path):
    """Through the class with which `transformers serve` loads models and tokenizers."""
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefgh"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    model = CASES[name].injected()
    export_model(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    done = run_elsewhere(SERVE, str(tmp_path), cache=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    inputs = tokenizer("a b c d", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(torch.load(tmp_path / "generated.pt"), expected)
    assert done.stdout.split()[-1] == modality


def attention_of_a_server(module, query, key, value, attention_mask, **kwargs):
    """Stands for a server's attention with its own cache, which it registers under a name."""
    assert kwargs["server"] == "here"
    return tf.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


@pytest.mark.parametrize("name", ["qwen2_vl", "llama"])
def test_a_server_can_build_the_headless_model_and_bring_its_own_attention(elsewhere, name):
    """What vLLM's Transformers backend asks of a model: AutoModel from a config, an attention function by name."""
    tf.AttentionInterface.register("server", attention_of_a_server)
    config = tf.AutoConfig.from_pretrained(elsewhere[0] / name)
    config.get_text_config()._attn_implementation = "server"
    with torch.device("meta"):
        model = tf.AutoModel.from_config(config, dtype=torch.bfloat16)
    assert model.is_backend_compatible() and {p.device.type for p in model.parameters()} == {"meta"}
    plain = tf.AutoModel.from_pretrained(elsewhere[0] / name, attn_implementation="sdpa")
    served = tf.AutoModel.from_pretrained(elsewhere[0] / name, attn_implementation="server")
    assert served.config.get_text_config()._attn_implementation == "server"
    with torch.no_grad():
        expected = plain(input_ids=IDS, use_cache=False).last_hidden_state
        assert torch.equal(served(input_ids=IDS, use_cache=False, server="here").last_hidden_state, expected)
