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
compute what it computes. Where a block has more between its maps than an activation, experts are without it, and the
table says what: the block itself is kept as the static expert, whole; `expert_init="ffn_slice"` is then no exact
slice."""
MIXTURES = """\
## Models with experts of their own

`target="mlp"` is for dense blocks. A model whose language model routes tokens to experts already, in some of its
blocks or in all, is refused in a sentence that names the first such block and the dense parts that it has; so is any
other target that names a mixture of experts, its experts, or what holds them. They are told by structure: a list of
feed-forward blocks or stacked weights, and beside them a router with a row for each. Shared experts and the dense
blocks among the others can be named, and are treated as any feed-forward block:

    inject_dual_path_moe(model, r"mlp\\.shared_experts?")     # Qwen2-MoE, DeepSeek-V3
    inject_dual_path_moe(model, r"layers\\.0\\.feed_forward")  # a dense block of Jamba

The balance loss is then that of the new routers alone."""
OTHERS = """\
## Everything else

Vision towers, encoders and models without transformers take an explicit target: a regex, or a callable
`(name, module) -> bool`. Tested: the encoders and decoders of T5 and BART, Whisper's encoder, ViT, CLIP, SigLIP, BERT
(tests/test_explicit_targets.py); `nn.TransformerEncoder`, timm's ViT, a module of one's own
(tests/test_plain_torch.py). In a model of one's own that holds a language model beside a tower, `target="mlp"` is the
language model; where several parts could be it, an error names them.

- Torch takes other kernels for frozen weights in some models (T5, SigLIP, Jamba): injection freezes the base, which
  alone moves their outputs by about 1e-6. Beside the frozen base, step 0 is exact.
- An injected `nn.TransformerEncoder` no longer takes torch's fused inference kernel, which would go past the new
  layers: outputs agree to about 1e-6, and at padded positions, where the fused kernel gives zeros, not at all.
- A feed-forward block that adds its own input is split, so that α scales its maps alone.
- An activation called as a function is read off the forward; where that fails, one warning names the one taken.
- Hidden states that lie sequence first share a padding mask's shape only if B ≠ S; where B = S the mask is read as
  batch first, and padding then counts wrongly in the balance loss."""


def summary(outcomes: list[Outcome]) -> str:
    """The counts in one line."""
    count = Counter(outcome.status for outcome in outcomes)
    dense = count["passed"] + count["failed"]
    built = dense + count["not dense"]
    share = f" ({count['passed'] / dense:.1%})" if dense else ""
    noted = sum(outcome.status == "passed" and bool(outcome.reason) for outcome in outcomes)
    share += f", {noted} of them with a note" if noted else ""
    return f"{len(outcomes)} model types, {built} built, {dense} dense, {count['passed']} passed{share}"


def page(outcomes: list[Outcome]) -> str:
    """The whole page as Markdown, in the order of `outcomes`, without dates."""
    by = {status: [o for o in outcomes if o.status == status] for status in ("not dense", "not built")}
    dense = [outcome for outcome in outcomes if outcome.status in ("passed", "failed")]
    intro = INTRO.format(transformers=transformers.__version__, torch=torch.__version__.partition("+")[0])
    passing = [(f"`{o.model_type}`", o.ffn, _names(o.site), _result(o)) for o in dense]
    sections = [
        f"{TITLE}\n\n{intro}\n\n**{summary(outcomes)}.**",
        "## Dense\n\n" + _table(("model type", "feed-forward block", "where", "result"), passing),
        MIXTURES,
        OTHERS,
        "## Built, but not dense\n\n" + _table(("model type", "why"), _reasons(by["not dense"])),
        "## Not built\n\n"
        "Their default config makes no model at toy size, or no forward pass without an image's or a checkpoint's data."
        "\n\n" + _table(("model type", "why"), _reasons(by["not built"])),
    ]
    return "\n\n".join(sections) + "\n"


def _result(outcome: Outcome) -> str:
    if outcome.status == "failed":
        return f"**fails**: {outcome.reason}"
    return f"pass; {outcome.reason}" if outcome.reason else "pass"


def _reasons(outcomes: Iterable[Outcome]) -> list[tuple[str, str]]:
    return [(f"`{outcome.model_type}`", outcome.reason) for outcome in outcomes]


def _names(site: str) -> str:
    return ", ".join(f"`{name}`" for name in site.split(", ")) if site else ""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
