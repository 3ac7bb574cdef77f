"""The command line as a user meets it: help, exit codes, JSON, and what `plan` and `doctor` say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import scale
import torch
import zoo

from moe_adapter import plan_injection
from moe_adapter.analysis import cli
from moe_adapter.backends import BACKENDS

SIZES = ("--expert-dim", "16", "--shared-expert-dim", "1/2")
STEP = ("--tokens", "64")
VOCABULARY = 4096
HEAVY = ("transformers", "peft", "deepspeed", "pyarrow", "matplotlib")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory that holds a Qwen2-VL's config."""
    zoo.qwen2_vl(vocab_size=VOCABULARY).config.save_pretrained(tmp_path)
    return tmp_path


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


def usage(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        run(*arguments)
    return left.value.code  # pyright: ignore


@pytest.mark.parametrize("name", ["plan", "doctor"])
def test_help_names_the_commands_and_gives_examples(name, capsys):
    assert usage("--help") == 0
    assert name in capsys.readouterr().out
    assert usage(name, "--help") == 0
    assert f"examples:\n  moe-adapter {name}" in capsys.readouterr().out


def test_help_loads_no_library_that_a_command_needs():
    code = f"""import sys
from moe_adapter.analysis import cli
try:
    cli.main(["plan", "--help"])
except SystemExit:
    pass
print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_version_is_the_packages(capsys):
    assert usage("--version") == 0
    assert capsys.readouterr().out.split() == ["moe-adapter", "0.1.0"]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("dance",),
        ("plan",),
        ("plan", "m", "--zero", "2", "--fsdp"),
        ("plan", "m", "--offload"),
        ("plan", "m", "--set", "top_k"),
        ("plan", "m", "--expert-dim", "wide"),
        ("plan", "m", "--expert-dim", "1/0"),
        ("plan", "m", "--gpus", "0"),
        ("plan", "m", "--lora-r", "0"),
        ("plan", "m", "--images", "-1"),
        ("plan", "m", "--tokens", "many"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    assert usage(*arguments) == 2
    assert "usage: moe-adapter" in capsys.readouterr().err


def test_an_error_is_one_line_on_stderr_and_a_traceback_under_debug(checkpoint, capsys):
    assert run("plan", checkpoint, "--set", "layers=[9]") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moe-adapter: error: layers=(9,)") and captured.err.count("\n") == 1
    with pytest.raises(Exception, match="layers"):
        run("plan", checkpoint, "--set", "layers=[9]", "--debug")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "colour=red"), "DualPathConfig has no field colour"),
        (("--set", "top_k=9"), "top_k"),
        (("--budget", "plenty"), "budget"),
        (("--target", "nothing"), "nothing"),
        (("--attention", "nonsense"), "with nonsense attention: "),
        (("--images", "1", "--image-side", "20"), "expected a side of 28 pixels or more"),
        (("--images", "9"), "9 images of 392×392 take 1782 tokens, expected fewer than 64"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_the_user_got_wrong_is_one_line(arguments, message, checkpoint, capsys):
    sizes = () if "--budget" in arguments else SIZES
    assert run("plan", checkpoint, *sizes, *STEP, *arguments) == 1
    *notes, error = capsys.readouterr().err.splitlines()
    assert error.startswith("moe-adapter: error: ") and message in error and "Traceback" not in "".join(notes)


def test_a_model_that_cannot_be_found_offline_says_what_is_expected(tmp_path, capsys):
    assert run("plan", "nobody/nothing") == 1
    assert "nobody/nothing: " in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="unheard_of")))
    assert run("plan", tmp_path) == 1
    assert "Expected a directory that holds config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "big"}, "error for field 'hidden_size'"),
        ({"hidden_act": "gulu"}, "gulu"),
        ({"num_attention_heads": 7}, "does not run|head"),
        (
            {"model_type": "bert", "is_decoder": True, "max_position_embeddings": 32},
            "64 tokens does not run .*--tokens",
        ),
    ],
)
def test_a_config_that_cannot_be_is_one_line(changes, message, tmp_path, capsys):
    config = dict(model_type="qwen2", hidden_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=100)
    config |= dict(intermediate_size=128, num_key_value_heads=4)
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    assert run("plan", tmp_path, *STEP, *SIZES, "--gpus", "2") == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("moe-adapter: error: ") and re.search(message, said[-1])


def test_plan_prints_the_plan_and_the_memory(checkpoint, capsys):
    assert run("plan", checkpoint / "config.json", *SIZES, *STEP, "--gpus", "8", "--zero", "2") == 0
    out = capsys.readouterr().out
    assert (
        str(plan_injection(zoo.qwen2_vl(vocab_size=VOCABULARY).bfloat16(), expert_dim=16, shared_expert_dim=0.5)) in out
    )
    assert "GiB per GPU, predicted: 8 GPUs, ZeRO-2; stage 1, 1 × 64 tokens" in out


def plan(capsys: pytest.CaptureFixture, *arguments: str | Path) -> dict:
    capsys.readouterr()
    assert run("plan", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_plan_as_json_adds_up(checkpoint, capsys):
    found = plan(capsys, checkpoint, *SIZES, *STEP, "--set", "num_experts=8", "--set", "router_softmax=all")
    assert found["plan"]["config"]["num_experts"] == 8 and found["plan"]["config"]["router_softmax"] == "all"
    assert found["plan"]["added"] == sum(row["added"] for row in found["plan"]["rows"])
    sizes = found["bytes_per_gpu"]
    assert sizes.pop("total") == sum(sizes.values())
    frozen = sum(p.numel() for p in zoo.qwen2_vl(vocab_size=VOCABULARY).parameters())
    assert (
        0 <= sizes["weights"] - 2 * frozen - 4 * found["plan"]["added"] < 1000
    )  # and the buffers of rotary embeddings
    assert 0 <= sizes["optimizer"] - 8 * found["plan"]["added"] < 1000  # and a counter each


def test_what_plan_takes_changes_what_it_says(checkpoint, capsys):
    def total(*arguments: str) -> int:
        return plan(capsys, checkpoint, *SIZES, *arguments)["bytes_per_gpu"]["total"]

    base = total(*STEP)
    assert total("--tokens", "256") > total("--tokens", "256", "--loss", "chunked") > base
    assert total("--tokens", "256", "--no-checkpointing") > total("--tokens", "256")
    assert total(*STEP, "--stage", "2", "--images", "2", "--image-side", "56") > base
    assert total(*STEP, "--precision", "fp32") > base
    eight = (*STEP, "--gpus", "8")
    assert total(*eight) > total(*eight, "--zero", "2") > total(*eight, "--zero", "2", "--offload")
    assert total(*eight, "--fsdp") > total(*STEP, "--gpus", "32", "--fsdp")


def test_images_that_a_model_does_not_take_are_refused(tmp_path, capsys):
    zoo.build("qwen2").config.save_pretrained(tmp_path)
    assert run("plan", tmp_path, *SIZES, *STEP, "--images", "1") == 1
    assert "takes no images" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["chunked", "full"])
def test_the_page_of_scale_holds_what_plan_says(loss):
    page = Path(__file__).parents[2] / "docs" / "scale.md"
    assert scale.table(loss) in page.read_text(encoding="utf-8")


def test_doctor_tells_versions_devices_and_why_a_backend_is_missing(capsys):
    assert run("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert set(found["backends"]) == set(BACKENDS) and found["backends"]["lean"] == "available"
    assert ("cuda:0" in found["devices"]) == torch.cuda.is_available()
    assert run("doctor") == 0
    assert "grouped_mm" in capsys.readouterr().out
