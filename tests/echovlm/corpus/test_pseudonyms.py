"""Pseudonyms: the same for the same, nothing for who lacks the salt; and a split that stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.echovlm.corpus.pseudonyms import pseudonym, read_salt, split_of
from moe_adapter.errors import MoEAdapterError


def test_a_salt_is_drawn_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    salt = read_salt(tmp_path / "private", out=tmp_path / "out")
    assert len(salt) == 32 and read_salt(tmp_path / "private", out=tmp_path / "out") == salt
    assert (tmp_path / "private" / "salt").stat().st_mode & 0o077 == 0
    assert read_salt(tmp_path / "other", out=tmp_path / "out") != salt


def test_no_salt_in_what_is_handed_on(tmp_path: Path) -> None:
    with pytest.raises(MoEAdapterError, match="inside --out"):
        read_salt(tmp_path / "out" / "private", out=tmp_path / "out")


def test_a_short_salt(tmp_path: Path) -> None:
    (tmp_path / "salt").write_bytes(b"1234")
    with pytest.raises(MoEAdapterError, match="got 4 bytes, expected 16"):
        read_salt(tmp_path, out=tmp_path / "out")


def test_pseudonyms_hang_on_salt_kind_and_value() -> None:
    made = {pseudonym(salt, kind, value) for salt in (b"a", b"b") for kind in "pc" for value in ("1", "2")}
    assert len(made) == 8 and pseudonym(b"a", "p", "1") in made


def test_the_split_moves_nobody() -> None:
    """A patient's split hangs on nothing but the patient: more patients, or a larger share, move none to training."""
    patients = [f"p{i}" for i in range(4000)]
    tenth = {p for p in patients if split_of(p, test_share=0.1, seed=0) == "test"}
    assert 0.085 < len(tenth) / len(patients) < 0.115
    assert tenth <= {p for p in patients if split_of(p, test_share=0.2, seed=0) == "test"}
    assert tenth != {p for p in patients if split_of(p, test_share=0.1, seed=1) == "test"}
    assert {split_of(p, test_share=0.0, seed=0) for p in patients} == {"train"}
    assert {split_of(p, test_share=1.0, seed=0) for p in patients} == {"test"}
