"""The documents do what they say: Python blocks run, named make targets and modules exist."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    document
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "analysis/**/*.md", "integrations/**/*.md")
    for document in ROOT.glob(pattern)
)
BLOCK = re.compile(r"^(?P<skip><!-- no-run -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS_HUB_OR_GPU = re.compile(r"from_pretrained\(|load_dataset\(|cuda")
COMMAND = re.compile(r"(?:^|[`\s])(make|python -m) +([\w.-]+)", re.MULTILINE)

SOURCE_FILE = re.compile(r"`((?:moe_adapter|integrations|analysis|examples|tests|docs|benchmarks)/[^`\s*]+\.\w+)`")


def blocks(document: Path, *languages: str) -> list[tuple[int, re.Match[str]]]:
    """Each fenced block in one of `languages`, with the number of lines before its code."""
    text = document.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start("code")), match)
        for match in BLOCK.finditer(text)
        if match["language"] in languages
    ]


def commands(document: Path) -> set[tuple[str, str]]:
    """(`make`, target) and (`python -m`, module) in shell blocks and in code spans."""
    shell = [match["code"] for _, match in blocks(document, "bash", "sh", "shell", "console")]
    prose = BLOCK.sub("", document.read_text(encoding="utf-8"))
    spans = re.findall(r"`[^`\n]+`", prose)
    return {command for text in [*shell, *spans] for command in COMMAND.findall(text)}


def runs_as_a_module(name: str) -> bool:
    spec = find_spec(name)
    is_package = spec is not None and spec.submodule_search_locations is not None
    return find_spec(f"{name}.__main__") is not None if is_package else spec is not None


def document_id(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def test_the_readme_is_among_the_documents() -> None:
    assert ROOT / "README.md" in DOCUMENTS


@pytest.mark.parametrize("document", DOCUMENTS, ids=document_id)
def test_python_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__document__"}
    for line, match in blocks(document, "python", "py"):
        if match["skip"]:
            assert NEEDS_HUB_OR_GPU.search(match["code"]), f"{document}:{line}: runs anywhere, so run it"
        else:
            exec(compile("\n" * line + match["code"], document, "exec"), namespace)


@pytest.mark.parametrize("document", DOCUMENTS, ids=document_id)
def test_named_commands_exist(document: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for program, name in commands(document):
        if program == "make":
            assert name in targets, f"{document}: no `make {name}`"
        else:
            assert runs_as_a_module(name), f"{document}: no module `{name}`"


@pytest.mark.parametrize("document", DOCUMENTS, ids=document_id)
def test_named_source_files_exist(document: Path) -> None:
    named = SOURCE_FILE.findall(document.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).is_file()] == []
