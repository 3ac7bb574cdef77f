"""Cases to run a model on, from a JSONL file: an id, a group, a prompt or messages, images, perhaps an answer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from moe_adapter.analysis.sequences import NO_GROUP
from moe_adapter.errors import MoEAdapterError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A case: `messages` with contents in parts, whose image parts are filled with `images` in order.

    `answer` is what the model is to have said, or None for a case that it answers itself; `line` is the line's own
    fields.
    """

    case: str
    group: str
    messages: tuple[Mapping[str, Any], ...]
    images: tuple[Path, ...]
    answer: str | None
    line: Mapping[str, Any]


def read_prompts(
    path: str | os.PathLike[str], *, group: str = "group", prompt: str | None = None, answer: str | None = None
) -> list[Prompt]:
    """The cases of a JSONL file, an object a line.

    Fields: "id", or the line's number; "prompt", or "messages" as chat templates take them, [{"role", "content"}];
    "images", paths from the file's folder, which go before the first user message's text unless the messages have
    places for them, {"type": "image"}. Others are left alone.

    Args:
        group: the field that names a case's group, such as "organ"; "all" for a file without it.
        prompt: for lines that have none.
        answer: the field of answers that are given.

    Raises:
        MoEAdapterError: with file and line, no JSON object, a field that is missing or of the wrong type, an image
            that isn't there, or a case in two groups.
    """
    path = Path(path)
    prompts: list[Prompt] = []
    groups: dict[str, str] = {}
    grouped: list[bool] = []
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        case, named = str(line.get("id", number)), str(line.get(group, NO_GROUP))
        grouped.append(group in line)
        if grouped[-1] != grouped[0] or (group != "group" and not grouped[0]):
            raise MoEAdapterError(f"{where}: expected the field {group!r}, which names a case's group, in every line.")
        if groups.setdefault(case, named) != named:
            raise MoEAdapterError(f"{where}: case {case!r} is in group {groups[case]!r} and in {named!r}; give one.")
        images = _images(line, path.parent, where)
        given = None if answer is None else _text(line, answer, where)
        messages = _messages(line, prompt, len(images), where)
        prompts.append(Prompt(case=case, group=named, messages=messages, images=images, answer=given, line=line))
    return prompts


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSONL file. Raises MoEAdapterError: no such file, no line, or no JSON object."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise MoEAdapterError(f"{path}: {reason}; expected a JSONL file, one JSON object a line.") from error
    if not text.strip():
        raise MoEAdapterError(f"{path} is empty; expected one JSON object a line.")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise MoEAdapterError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}.") from error
            if not isinstance(value, dict):
                raise MoEAdapterError(f"{path}:{number}: got {line[:40]!r}, expected a JSON object.")
            yield number, value


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Raises MoEAdapterError: it is no image that Pillow reads."""
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise MoEAdapterError(f"{path} is not an image that Pillow reads: {error}") from error


def case_images(path: str | os.PathLike[str]) -> dict[str, tuple[Path, ...]]:
    """The images of each case of a JSONL file, line by line; a case has one line.

    Raises:
        MoEAdapterError: as `read_prompts`, or a case that comes twice.
    """
    images: dict[str, tuple[Path, ...]] = {}
    for number, line in read_lines(path):
        where, case = f"{path}:{number}", str(line.get("id", number))
        if case in images:
            raise MoEAdapterError(f"{where}: case {case!r} comes twice; give its one line.")
        images[case] = _images(line, Path(path).parent, where)
    return images


def _images(line: Mapping[str, Any], folder: Path, where: str) -> tuple[Path, ...]:
    given = line.get("images") or []
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise MoEAdapterError(f"{where}: field 'images': got {_shown(given)}, expected a list of paths.")
    paths = tuple(folder / each for each in given)
    if missing := [path for path in paths if not path.is_file()]:
        raise MoEAdapterError(f"{where}: field 'images': there is no file {missing[0]}.")
    return paths


def _text(line: Mapping[str, Any], field: str, where: str) -> str:
    if not isinstance(line.get(field), str) or not line[field].strip():
        raise MoEAdapterError(f"{where}: field {field!r}: got {_shown(line.get(field))}, expected text.")
    return line[field]


def _messages(line: Mapping[str, Any], prompt: str | None, images: int, where: str) -> tuple[dict[str, Any], ...]:
    """The conversation up to the answer, with a place for each image."""
    if "messages" in line:
        messages = _checked(line["messages"], where)
    else:
        if "prompt" not in line and prompt is None:
            raise MoEAdapterError(f"{where}: expected the field 'prompt' or 'messages', or one prompt for all lines.")
        text = _text(line, "prompt", where) if "prompt" in line else prompt
        messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if not places:
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"] = [*({"type": "image"} for _ in range(images)), *first["content"]]
    elif places != images:
        raise MoEAdapterError(f"{where}: the messages have places for {places} images, and 'images' has {images}.")
    return tuple(messages)


def _checked(messages: Any, where: str) -> list[dict[str, Any]]:
    """Messages with contents in parts."""
    checked = []
    for message in messages if isinstance(messages, list) else [messages]:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if role not in ROLES or not isinstance(parts, list) or not parts or not all(map(_is_part, parts)):
            raise MoEAdapterError(
                f"{where}: field 'messages': got {_shown(message)}, expected a role ({', '.join(ROLES)}) and a "
                'content: text, or a list of {"type": "text", "text": …} and {"type": "image"}.'
            )
        checked.append({"role": role, "content": [dict(part) for part in parts]})
    if not checked or checked[-1]["role"] != "user":
        raise MoEAdapterError(f"{where}: field 'messages': expected the last one to be the user's, to be answered.")
    return checked


def _is_part(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, dict) else None
    return kind == "image" or (kind == "text" and isinstance(part.get("text"), str))


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]
