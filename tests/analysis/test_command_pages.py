"""`moe-adapter report` and `gradcam`: the page's cases and the heat maps are the library's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import transformers as tf
from command_models import image_cases, run, save_trained_adapter, save_vlm, write_lines
from PIL import Image

from moe_adapter import load_adapter
from moe_adapter.analysis import style
from moe_adapter.analysis.gradcam import find_phrase, grad_cam, gradcam_figure
from moe_adapter.analysis.overlays import patch_experts
from moe_adapter.analysis.reader import RoutingRecord

FAST = ("--resamples", "20", "--permutations", "99")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A folder with a model, its adapter, cases, and what `routing record` wrote of them."""
    folder = tmp_path_factory.mktemp("recorded")
    save_trained_adapter(save_vlm(folder / "model"), folder / "adapter")
    data = write_lines(folder / "cases.jsonl", image_cases(folder))
    out = ("-o", folder / "r.parquet", "--save-answers", folder / "answers.jsonl", "--max-new-tokens", "4")
    assert run("routing", "record", folder / "model", "--adapter", folder / "adapter", "--data", data, *out) == 0
    return folder


def page_data(path: Path) -> dict:
    (found,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(found)


def test_the_page_has_the_cases_with_frames_experts_and_texts(recorded, tmp_path, capsys):
    arguments = ("--cases", recorded / "answers.jsonl", "--model", recorded / "model", "--title", "甲 & <b>", *FAST)
    assert run("report", recorded / "r.parquet", "-o", tmp_path / "page.html", *arguments) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert "甲 &amp; &lt;b&gt;" in (tmp_path / "page.html").read_text()
    content = page_data(tmp_path / "page.html")
    cases = {case["id"]: case for case in content["cases"]}
    assert [len(cases[name]["frames"]) for name in "abc"] == [2, 1, 0]
    record = RoutingRecord.open(recorded / "r.parquet")
    expected = patch_experts(record, "a", [(2, 2), (2, 2)], layer=0)
    assert cases["a"]["frames"][1]["experts"]["0"] == expected[1].ravel().tolist()
    lines = [json.loads(line) for line in (recorded / "answers.jsonl").read_text().splitlines()]
    assert cases["b"]["texts"] == {name: lines[1][name] for name in ("prompt", "answer", "reference")}
    tokenizer = tf.AutoTokenizer.from_pretrained(recorded / "model")
    tokens = content["tables"]["tokens"]
    words = [tokens["token"]["values"][code] for code in tokens["token"]["codes"]]
    assert words and words == [tokenizer.decode([number]) for number in tokens["token_id"]]


def test_a_page_needs_neither_cases_nor_a_model(recorded, tmp_path, capsys):
    assert run("report", recorded / "r.parquet", "-o", tmp_path / "page.html", *FAST) == 0
    assert page_data(tmp_path / "page.html")["cases"] == []
    assert run("report", recorded / "r.parquet", "-o", tmp_path / "p.html", "--cases", recorded / "cases.jsonl") == 1
    assert "name the --model" in capsys.readouterr().err
    texts = write_lines(tmp_path / "texts.jsonl", [{"id": "a", "note": "mine", "prompt": "q"}])
    assert run("report", recorded / "r.parquet", "-o", tmp_path / "p.html", "--cases", texts, "--texts", "note") == 0
    assert page_data(tmp_path / "p.html")["cases"][0]["texts"] == {"note": "mine"}


def test_cases_that_were_not_recorded_stay_out_of_the_page(recorded, tmp_path, capsys):
    cases = write_lines(tmp_path / "cases.jsonl", [{"id": "z", "prompt": "q"}])
    assert run("report", recorded / "r.parquet", "-o", tmp_path / "page.html", "--cases", cases) == 1
    assert "has none of the cases" in capsys.readouterr().err
    write_lines(cases, [{"id": "z", "prompt": "q"}, {"id": "a", "prompt": "q"}])
    assert run("report", recorded / "r.parquet", "-o", tmp_path / "page.html", "--cases", cases, *FAST) == 0
    assert "1 of the 2 cases were not recorded" in capsys.readouterr().err
    assert [case["id"] for case in page_data(tmp_path / "page.html")["cases"]] == ["a"]


def gradcam(folder: Path, *arguments: str | Path) -> tuple[str | Path, ...]:
    images = ("--image", folder / "0.png", folder / "2.png")
    return ("gradcam", folder / "model", "--adapter", folder / "adapter", *images, "--prompt", "描述。", *arguments)


@pytest.mark.parametrize(
    ("arguments", "chosen", "layer"),
    [
        (("--answer", "无回声囊肿，大小约14mm", "--phrase", "囊肿"), "囊肿", "merger"),
        (("--answer", "An anechoic cyst.", "--token", "0", "1", "--layer", "vision.0"), [0, 1], "vision.0"),
        (("--max-new-tokens", "4", "--layer", "vision.-1"), None, "vision.-1"),
    ],
    ids=["phrase", "tokens", "own answer"],
)
def test_the_heat_maps_are_the_librarys(recorded, tmp_path, capsys, arguments, chosen, layer):
    out = ("-o", tmp_path / "cam.png", "-o", tmp_path / "cam.pdf")
    assert run(*gradcam(recorded, *arguments, *out, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["written"] == [str(tmp_path / "cam.png"), str(tmp_path / "cam.pdf")]
    model = load_adapter(
        tf.AutoModelForImageTextToText.from_pretrained(recorded / "model"), recorded / "adapter"
    ).eval()
    processor = tf.AutoProcessor.from_pretrained(recorded / "model")
    frames = [Image.open(recorded / name).convert("RGB") for name in ("0.png", "2.png")]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "描述。"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[frames], return_tensors="pt")
    if chosen is None:
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
        ids = ids[:-1] if ids[-1] == processor.tokenizer.eos_token_id else ids
    else:
        ids = processor.tokenizer(arguments[1], add_special_tokens=False)["input_ids"]
    positions = find_phrase(processor.tokenizer, ids, chosen) if isinstance(chosen, str) else chosen
    maps = grad_cam(model, inputs, ids, positions, layer=layer)
    assert found["positions"] == (positions or list(range(len(ids))))
    assert found["answer"] == processor.tokenizer.decode(ids, skip_special_tokens=True)
    for given, expected in zip(found["maps"], maps, strict=True):
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-7)
    if isinstance(chosen, str):
        (expected,) = style.save_figure(gradcam_figure(frames, maps, phrase=chosen), tmp_path / "expected", ["png"])
        assert np.array_equal(*(np.asarray(Image.open(path)) for path in (tmp_path / "cam.png", expected)))


def test_gradcam_says_where_the_heat_is(recorded, tmp_path, capsys):
    assert run(*gradcam(recorded, "--answer", "A cyst.", "-o", tmp_path / "cam")) == 0
    out = capsys.readouterr().out
    assert "answer: A cyst." in out and "0:'A'" in out
    assert re.search(r"2\.png: largest in row \d of 2, column \d of 2", out)
    assert (tmp_path / "cam.pdf").exists() and (tmp_path / "cam.png").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--answer", "A cyst.", "--phrase", "stone"), "has no phrase 'stone'"),
        (("--answer", "A cyst.", "--token", "99"), "positions [99]"),
        (("--answer", "A cyst.", "--layer", "elsewhere"), "layer 'elsewhere'"),
        (("--answer", "A cyst.", "--layer", "0"), "language_model.layers.0 reaches the chosen tokens"),
    ],
)
def test_gradcam_tells_what_is_wrong(recorded, tmp_path, capsys, arguments, told):
    assert run(*gradcam(recorded, *arguments, "-o", tmp_path / "cam.png")) == 1
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
    assert not (tmp_path / "cam.png").exists()
