"""A deterministic generator of ultrasound phantoms of seven organs, with reports that state what they show."""

from __future__ import annotations

from examples.echovlm.phantom.attributes import ORGANS
from examples.echovlm.phantom.generate import CASES, generate_cases

__all__ = ["CASES", "ORGANS", "generate_cases"]
