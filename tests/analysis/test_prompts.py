"""The JSONL of cases: what a line may hold, and that a bad one is told with its number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from moe_adapter import MoEAdapterError
from moe_adapter.analysis.prompts import case_images, open_image, read_prompts


@pytest.fixture
def lines(tmp_path: Path):
    """lines(*objects or text): a JSONL file beside a small image, 1.png."""
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")

    def write(*objects) -> Path:
        texts = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in objects]
        path = tmp_path / "cases.jsonl"
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path

    return write


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_a_prompt_becomes_a_user_message_with_its_images_first(lines, tmp_path):
    (found,) = read_prompts(lines({"id": 7, "group": "肝", "prompt": "看", "images": ["1.png"], "more": 1}))
    assert (found.case, found.group, found.answer, found.line["more"]) == ("7", "肝", None, 1)
    assert found.messages == ({"role": "user", "content": [{"type": "image"}, text("看")]},)
    assert found.images == (tmp_path / "1.png",)


def test_messages_keep_their_turns_and_places(lines):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [text("before"), {"type": "image"}, text("after")]},
    ]
    (placed,) = read_prompts(lines({"messages": turns, "images": ["1.png"]}))
    assert placed.messages[0] == {"role": "system", "content": [text("Be brief.")]}
    assert placed.messages[1] == turns[1]
    (unplaced,) = read_prompts(lines({"messages": [turns[0], {"role": "user", "content": "q"}], "images": ["1.png"]}))
    assert unplaced.messages[1]["content"] == [{"type": "image"}, text("q")]


def test_fields_may_have_other_names_and_ids_may_be_absent(lines):
    path = lines({"organ": "liver", "findings": "Even."}, "", {"organ": "heart", "findings": "Dark."})
    found = read_prompts(path, group="organ", prompt="Report.", answer="findings")
    assert [(each.case, each.group, each.answer) for each in found] == [
        ("1", "liver", "Even."),
        ("3", "heart", "Dark."),
    ]
    assert all(each.messages[0]["content"] == [text("Report.")] for each in found)
    assert read_prompts(lines({"prompt": "q"}))[0].group == "all"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", r":2: not JSON"),
        ("[1]", r":2: got '\[1\]', expected a JSON object"),
        ({"id": "b"}, r":2: expected the field 'prompt' or 'messages'"),
        ({"prompt": 3}, r":2: field 'prompt': got 3"),
        ({"prompt": "q", "images": ["2.png"]}, r":2: field 'images': there is no file .*2\.png"),
        ({"prompt": "q", "images": "1.png"}, r':2: field \'images\': got "1\.png", expected a list'),
        ({"messages": "q"}, r":2: field 'messages': got \"q\""),
        ({"messages": [{"role": "doctor", "content": "q"}]}, r":2: field 'messages'.*expected a role"),
        ({"messages": [{"role": "assistant", "content": "q"}]}, r":2: field 'messages'.*the last one to be the user's"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r":2: .* places for 1 images, .* has 0"),
        ({"id": "a", "prompt": "q", "group": "heart"}, r":2: expected the field 'group'|:1: "),
    ],
    ids=str,
)
def test_a_bad_line_is_told_with_file_and_number(lines, line, told):
    with pytest.raises(MoEAdapterError, match=r"cases\.jsonl" + told):
        read_prompts(lines({"id": "a", "prompt": "q"}, line))


def test_what_a_whole_file_lacks_is_told(lines, tmp_path):
    with pytest.raises(MoEAdapterError, match=r":1: expected the field 'organ'"):
        read_prompts(lines({"prompt": "q"}), group="organ")
    with pytest.raises(MoEAdapterError, match=r":2: case 'a' is in group 'x' and in 'y'"):
        read_prompts(lines({"id": "a", "prompt": "q", "group": "x"}, {"id": "a", "prompt": "q", "group": "y"}))
    with pytest.raises(MoEAdapterError, match=r":1: field 'answer': got null"):
        read_prompts(lines({"prompt": "q"}), answer="answer")
    with pytest.raises(MoEAdapterError, match="No such file"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(MoEAdapterError, match="is empty"):
        read_prompts(lines(""))


def test_images_by_case(lines, tmp_path):
    found = case_images(lines({"id": "a", "images": ["1.png"]}, {"id": "b"}))
    assert found == {"a": (tmp_path / "1.png",), "b": ()}
    assert open_image(found["a"][0]).size == (4, 4)
    with pytest.raises(MoEAdapterError, match=r":2: case 'a' comes twice"):
        case_images(lines({"id": "a"}, {"id": "a"}))
    (tmp_path / "1.png").write_text("no image")
    with pytest.raises(MoEAdapterError, match="is not an image"):
        open_image(tmp_path / "1.png")
