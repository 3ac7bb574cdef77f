"""`moe-adapter routing record`: the record is the library's, of the model's own template, images and greedy answers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.compute as pc
import pytest
import torch
import transformers as tf
import zoo
from command_models import (
    TEMPLATE,
    image_cases,
    mixtral,
    run,
    save_text_model,
    save_trained_adapter,
    save_vlm,
    write_lines,
)

from moe_adapter.analysis.record import RoutingRecord, record_routing

TEXT_CASES = [
    {"id": "a", "group": "liver", "prompt": "the liver is", "said": "even </s>"},
    {"id": "b", "group": "heart", "prompt": "where is the dark heart", "said": "the liver"},
    {"id": "c", "group": "liver", "prompt": "is", "said": "bright"},
]


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> Path:
    return save_text_model(mixtral(), tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> tuple[Path, Path]:
    """A vision-language model's directory, and an adapter's."""
    folder = tmp_path_factory.mktemp("vlm")
    base = save_vlm(folder / "base")
    return base, save_trained_adapter(base, folder / "adapter")


def test_generated_answers_are_greedy_and_recorded(text_model, tmp_path, routes, capsys):
    data = write_lines(tmp_path / "cases.jsonl", TEXT_CASES)
    out, answers = tmp_path / "new" / "r.parquet", tmp_path / "answers.jsonl"
    arguments = ("--data", data, "-o", out, "--max-new-tokens", "4", "--batch-size", "2", "--save-answers", answers)
    assert run("routing", "record", text_model, *arguments) == 0
    assert "of 3 cases in 2 layers" in capsys.readouterr().out
    model = tf.AutoModelForCausalLM.from_pretrained(text_model).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(text_model, padding_side="left")
    said = []
    with record_routing(model, tmp_path / "expected.parquet") as recorder, torch.no_grad():
        for case in TEXT_CASES:
            recorder.batch(case_ids=[case["id"]], groups=[case["group"]])
            inputs = tokenizer([case["prompt"]], return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            said.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    found, expected = RoutingRecord.open(out), RoutingRecord.open(tmp_path / "expected.parquet")
    assert routes(found) == routes(expected)
    assert found.count(["case", "group"]).equals(expected.count(["case", "group"]))
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert lines == [{**case, "answer": text} for case, text in zip(TEXT_CASES, said, strict=True)]


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (("--max-new-tokens", "0"), [case["prompt"] for case in TEXT_CASES]),
        (("--answers", "said"), [case["prompt"] + case["said"] for case in TEXT_CASES]),
    ],
    ids=["prompts", "answers"],
)
def test_without_generation_the_given_text_is_recorded(text_model, tmp_path, arguments, texts):
    data = write_lines(tmp_path / "cases.jsonl", TEXT_CASES)
    assert run("routing", "record", text_model, "--data", data, "-o", tmp_path / "r.parquet", *arguments) == 0
    tokenizer = tf.AutoTokenizer.from_pretrained(text_model)
    table = RoutingRecord.open(tmp_path / "r.parquet").table(where=(pc.field("layer") == 0) & (pc.field("slot") == 0))
    for case, text in zip(TEXT_CASES, texts, strict=True):
        own = table.filter(pc.field("case") == case["id"])
        assert own["token_id"].to_pylist() == tokenizer(text)["input_ids"]
        assert set(own["modality"].to_pylist()) == {"prompt"}


def test_the_chat_template_is_the_models_own(tmp_path):
    model = save_text_model(mixtral(), tmp_path / "chat", TEMPLATE)
    data = write_lines(tmp_path / "cases.jsonl", [{"prompt": "is the liver even", "said": "dark"}])
    tokenizer = tf.AutoTokenizer.from_pretrained(model)
    texts = {
        ("--max-new-tokens", "0"): "user : is the liver even assistant :",
        ("--answers", "said"): "user : is the liver even assistant : dark",
    }
    for number, (arguments, text) in enumerate(texts.items()):
        out = tmp_path / f"{number}.parquet"
        assert run("routing", "record", model, "--data", data, "-o", out, *arguments) == 0
        table = RoutingRecord.open(out).table(where=(pc.field("layer") == 0) & (pc.field("slot") == 0))
        assert table["token_id"].to_pylist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_vlm_with_its_adapter_reads_images_whatever_the_batch(vlm, tmp_path, routes):
    data = write_lines(tmp_path / "cases.jsonl", image_cases(tmp_path))
    found = []
    for size in ("1", "3"):
        out = tmp_path / f"{size}.parquet"
        arguments = ("--data", data, "-o", out, "--batch-size", size, "--max-new-tokens", "3", "--dtype", "float32")
        assert run("routing", "record", vlm[0], "--adapter", vlm[1], *arguments) == 0
        found.append(RoutingRecord.open(out))
    assert routes(found[0]) == routes(found[1])
    record = found[0]
    assert record.facts.groups == ("liver", "甲状腺")
    assert [layer.alpha is None for layer in record.facts.layers] == [False] * len(record.facts.layers)
    images = record.table(["case"], (pc.field("modality") == "image") & (pc.field("layer") == 0))
    slots = record.facts.layers[0].top_k
    assert Counter(images["case"].to_pylist()) == {"a": 2 * 4 * slots, "b": 4 * slots}
    generated = record.count(["case"], (pc.field("modality") == "generated") & (pc.field("layer") == 0))
    assert all(count <= 3 * slots for count in generated["count"].to_pylist())


def test_several_processes_record_a_share_each(text_model, tmp_path, routes, monkeypatch):
    data = write_lines(tmp_path / "cases.jsonl", [*TEXT_CASES, {**TEXT_CASES[0], "prompt": "dark"}])
    arguments = ("--data", data, "-o", tmp_path / "r.parquet", "--max-new-tokens", "0")
    assert run("routing", "record", text_model, *arguments) == 0
    whole = RoutingRecord.open(tmp_path / "r.parquet")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run("routing", "record", text_model, *arguments) == 0
    parts = RoutingRecord.open([tmp_path / f"r.{rank}-of-2.parquet" for rank in range(2)])
    assert parts.facts.cases == whole.facts.cases == 3
    by = ["case", "group", "layer", "expert", "token_id"]
    assert parts.count(by).equals(whole.count(by))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run("routing", "record", text_model, *arguments) == 1


def test_json_is_the_whole_of_stdout_and_nothing_but_errors_comes_beside_it(text_model, tmp_path, capfd):
    data = write_lines(tmp_path / "cases.jsonl", TEXT_CASES)
    arguments = ("--data", data, "-o", tmp_path / "r.parquet", "--max-new-tokens", "0", "--json")
    assert run("routing", "record", text_model, *arguments) == 0
    captured = capfd.readouterr()
    found = json.loads(captured.out)
    assert found["written"] == [str(tmp_path / "r.parquet")] and found["cases"] == 3
    assert found["groups"] == ["liver", "heart"]
    assert captured.err == ""


def test_an_old_record_is_kept_unless_told(text_model, tmp_path, capsys):
    data = write_lines(tmp_path / "cases.jsonl", TEXT_CASES)
    arguments = ("--data", data, "-o", tmp_path / "r.parquet", "--max-new-tokens", "0")
    (tmp_path / "r.parquet").write_text("old")
    assert run("routing", "record", text_model, *arguments) == 1
    assert "--overwrite" in capsys.readouterr().err and (tmp_path / "r.parquet").read_text() == "old"
    assert run("routing", "record", text_model, *arguments, "--overwrite") == 0
    assert RoutingRecord.open(tmp_path / "r.parquet").facts.cases == 3


def test_what_is_wrong_is_one_line_and_no_record(text_model, vlm, tmp_path, capsys):
    dense = save_text_model(zoo.build("qwen2"), tmp_path / "dense")
    bare = save_vlm(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    good = write_lines(tmp_path / "good.jsonl", TEXT_CASES)
    bad = write_lines(tmp_path / "bad.jsonl", [TEXT_CASES[0], {"id": "b", "group": "x"}])
    pictures = write_lines(tmp_path / "pictures.jsonl", image_cases(tmp_path))
    broken = write_lines(tmp_path / "broken.jsonl", [{"prompt": "q", "images": ["broken.png"]}])
    (tmp_path / "broken.png").write_text("no image")
    capsys.readouterr()
    for model, data, told, *more in (
        (text_model, bad, f"{bad}:2: expected the field 'prompt'"),
        (text_model, tmp_path / "none.jsonl", "No such file"),
        (text_model, pictures, "reads text alone"),
        (dense, good, "has no router"),
        (tmp_path / "nowhere", good, "Expected a checkpoint's directory"),
        (vlm[0], broken, "broken.png is not an image", "--adapter", vlm[1]),
        (bare, pictures, "has no chat template", "--adapter", vlm[1]),
        (text_model, good, "holds no adapter", "--adapter", text_model),
        (text_model, good, "no directory here", "--adapter", tmp_path / "nowhere"),
    ):
        assert run("routing", "record", model, "--data", data, "-o", tmp_path / "r.parquet", *more) == 1, told
        err = capsys.readouterr().err
        assert told in err and err.count("\n") == 1, err
        assert not (tmp_path / "r.parquet").exists()
