"""The page of results: counts, the dense architectures, and why the others are not among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
import transformers

from tests.matrix.checks import Outcome

TITLE = "# Architectures"
INTRO = """\
`target="mlp"` on every model type of transformers' causal-LM and image-text-to-text mappings, each built from its
own default config at toy size. Written by `python -m tests.matrix --write docs/architectures.md`; transformers
{transformers}, torch {torch}.

An architecture is dense if its decoder's blocks hold feed-forward blocks and no routed experts. It passes if the plan
has one layer for each block with a feed-forward block and none outside the language model; if the injected model
equals the base bit for bit at step 0, under `static_only` and after eject (same module objects, same flags); if its
logits change and every new parameter, and no other, gets a gradient once the output projections are not zero; if an
adapter file makes a fresh base answer the same bit for bit; and if experts made of the whole feed-forward block
compute what it computes."""


def summary(outcomes: list[Outcome]) -> str:
    """The counts in one line."""
    count = Counter(outcome.status for outcome in outcomes)
    dense = count["passed"] + count["failed"]
    built = dense + count["not dense"]
    share = f" ({count['passed'] / dense:.1%})" if dense else ""
    return f"{len(outcomes)} model types, {built} built, {dense} dense, {count['passed']} passed{share}"


def page(outcomes: list[Outcome]) -> str:
    """The whole page as Markdown, in the order of `outcomes`, without dates."""
    by = {status: [o for o in outcomes if o.status == status] for status in ("not dense", "not built")}
    dense = [outcome for outcome in outcomes if outcome.status in ("passed", "failed")]
    intro = INTRO.format(transformers=transformers.__version__, torch=torch.__version__.partition("+")[0])
    passing = [(f"`{o.model_type}`", o.ffn, _names(o.site), o.reason or "pass") for o in dense]
    sections = [
        f"{TITLE}\n\n{intro}\n\n**{summary(outcomes)}.**",
        "## Dense\n\n" + _table(("model type", "feed-forward block", "where", "result"), passing),
        "## Built, but not dense\n\n" + _table(("model type", "why"), _reasons(by["not dense"])),
        "## Not built\n\n"
        "Their default config makes no model at toy size, or no forward pass without an image's or a checkpoint's data."
        "\n\n" + _table(("model type", "why"), _reasons(by["not built"])),
    ]
    return "\n\n".join(sections) + "\n"


def _reasons(outcomes: Iterable[Outcome]) -> list[tuple[str, str]]:
    return [(f"`{outcome.model_type}`", outcome.reason) for outcome in outcomes]


def _names(site: str) -> str:
    return ", ".join(f"`{name}`" for name in site.split(", ")) if site else ""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
