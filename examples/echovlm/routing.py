"""Where the held-out cases' tokens go: a routing record of stage II, and the paper's Figure 5 from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from examples.echovlm import ranks
from examples.echovlm.account import Account
from examples.echovlm.answering import answer
from examples.echovlm.collator import Collator
from examples.echovlm.config import RecipeConfig
from examples.echovlm.tasks import Example
from moe_adapter import dual_path_layers
from moe_adapter.analysis.figures import figure5
from moe_adapter.analysis.record import RoutingRecord, record_routing
from moe_adapter.analysis.statistics import expert_load, normalised_entropy

RECORD, FIGURE = "routing.parquet", "figure5"


def record_and_draw(
    model: PreTrainedModel,
    examples: Sequence[Example],
    collator: Collator,
    config: RecipeConfig,
    out: Path,
    account: Account,
) -> str | None:
    """Write `routing.parquet`, `figure5.png` and `figure5.pdf` into `out`; the PNG's name, or None: nothing routed.

    The main process follows all tokens, and the others wait.
    """
    if all(layer.router is None for layer in dual_path_layers(model).values()):
        account.say("no token is routed, since there are no routed experts: no record and no Figure 5")
        return None
    if ranks.is_main():
        _record_and_draw(model, examples, collator, config, out, account)
    ranks.wait()
    return f"{FIGURE}.png"


def _record_and_draw(
    model: PreTrainedModel,
    examples: Sequence[Example],
    collator: Collator,
    config: RecipeConfig,
    out: Path,
    account: Account,
) -> None:
    with record_routing(model, out / RECORD) as recorder:
        answer(model, examples, collator, config.evaluation, label="routing", record=recorder)
    record = RoutingRecord.open(out / RECORD)
    figure = figure5(record)
    for suffix in ("png", "pdf"):
        figure.savefig(out / f"{FIGURE}.{suffix}", dpi=200)
    load = expert_load(record)
    evenness = normalised_entropy(load.counts_CE)
    shares = ", ".join(f"{value:.2f}" for value in evenness)
    account.say(f"{record.facts.tokens} tokens of {record.facts.cases} cases; evenness of load by layer: {shares}")
