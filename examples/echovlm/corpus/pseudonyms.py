"""Salted pseudonyms, and a split by patient that later cases do not change."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from moe_adapter.errors import MoEAdapterError

SALT = "salt"
DIGITS = 16  # 64 bits: two of a million names meet with probability 3e-8


def read_salt(private: Path, *, out: Path) -> bytes:
    """The secret in the folder `private`, drawn on its first use: who holds it can tell whose pseudonym is whose.

    Raises MoEAdapterError if `private` lies in `out`, which is handed on, or holds a salt that is too short.
    """
    if private.resolve().is_relative_to(out.resolve()):
        raise MoEAdapterError(f"--private {private}: got a folder inside --out, which is handed on; keep it elsewhere")
    private.mkdir(parents=True, exist_ok=True)
    path = private / SALT
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        salt = path.read_bytes()
        if len(salt) < 16:
            raise MoEAdapterError(
                f"{path}: got {len(salt)} bytes, expected 16 or more; remove it to draw one"
            ) from None
        return salt
    with os.fdopen(handle, "wb") as file:
        file.write(salt := secrets.token_bytes(32))
    return salt


def pseudonym(salt: bytes, kind: str, value: str) -> str:
    """The same for the same `value` of a kind ("patient"); without the salt nothing leads back (HMAC-SHA256)."""
    return hmac.new(salt, f"{kind}\0{value}".encode(), "sha256").hexdigest()[:DIGITS]


def split_of(patient: str, *, test_share: float, seed: int) -> str:
    """ "train" or "test" by a hash of patient and seed alone, so that adding cases moves nobody."""
    drawn = int.from_bytes(hashlib.sha256(f"{seed}:{patient}".encode()).digest()[:8]) / 2**64
    return "test" if drawn < test_share else "train"
