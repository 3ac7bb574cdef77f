"""Tokens of English and Chinese text: words and numbers of Latin script, and of Chinese its characters or its words."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from examples.echovlm.corpus.deduplication.errors import DeduplicationError

DICTIONARY = Path(__file__).parent / "ultrasound_zh.txt"
_RUN = re.compile(r"[a-z0-9]+|[\u3400-\u9fff]+")


def normalized(text: str) -> str:
    """Lower case, one form of each character: a full-width １４㎜ is 14mm (Unicode NFKC)."""
    return unicodedata.normalize("NFKC", text).lower()


def by_character(text: str) -> list[str]:
    """rouge-score's words of a-z and 0-9, and a token per Chinese character; as `metrics.py` scores answers."""
    tokens: list[str] = []
    for run in _RUN.findall(normalized(text)):
        tokens.extend([run] if run.isascii() else run)
    return tokens


def by_word(text: str) -> list[str]:
    """The same words of Latin script, and Chinese words by jieba with `ultrasound_zh.txt` on top of its dictionary."""
    tokens: list[str] = []
    for run in _RUN.findall(normalized(text)):
        tokens.extend([run] if run.isascii() else _chinese_words(run))
    return tokens


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"character": by_character, "jieba": by_word}


def tokenizer(name: str) -> Callable[[str], list[str]]:
    """The tokenizer of this name. Raises: DeduplicationError if there is none, or jieba is not installed."""
    if name not in TOKENIZERS:
        raise DeduplicationError(f"tokenizer: got {name!r}; expected one of {', '.join(TOKENIZERS)}")
    if name == "jieba":
        _jieba()
    return TOKENIZERS[name]


def describe(name: str) -> dict[str, str]:
    """What decides on the tokens, for the manifest."""
    if name != "jieba":
        return {"tokenizer": name}
    dictionary = f"{DICTIONARY.name} {hashlib.sha256(DICTIONARY.read_bytes()).hexdigest()[:12]}"
    return {"tokenizer": name, "jieba": importlib.metadata.version("jieba"), "dictionary": dictionary}


@lru_cache(maxsize=1 << 16)  # reports repeat their clauses
def _chinese_words(run: str) -> tuple[str, ...]:
    return tuple(_jieba().cut(run, HMM=False))  # the model of unknown words would join what no dictionary holds


@lru_cache(maxsize=1)
def _jieba():
    try:
        import jieba
    except ImportError as error:
        raise DeduplicationError(
            'tokenizer: got "jieba", which is not installed; run pip install "moe-adapter[echovlm]"'
        ) from error
    jieba.setLogLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()
    tokenizer.load_userdict(str(DICTIONARY))
    return tokenizer
