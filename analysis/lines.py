"""Text in lines for figures: a CJK character is two cells wide and may be parted from its neighbours."""

from __future__ import annotations

import unicodedata


def wrapped(text: str, cells: int) -> list[str]:
    """Lines of at most so many cells, broken at spaces and beside CJK characters; a longer word stays whole."""
    lines = [""]
    for word in _words(text):
        if _cells(lines[-1] + word.rstrip()) > cells and lines[-1]:
            lines.append("")
        lines[-1] += word if lines[-1] else word.lstrip()
    return [line.rstrip() for line in lines]


def _cells(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _words(text: str) -> list[str]:
    """Pieces that stay whole: a word with the space before it, or one CJK character."""
    words: list[str] = []
    for before, character in zip(" " + text, text, strict=False):
        if character.isspace() or 2 in (_cells(before), _cells(character)) or not words:
            words.append("")
        words[-1] += " " if character.isspace() else character
    return words
