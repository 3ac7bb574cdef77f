"""The base of every error that moe-adapter raises on purpose."""

from __future__ import annotations


class MoEAdapterError(Exception):
    """Raised for bad input: says what was got, what was expected and what to do."""
