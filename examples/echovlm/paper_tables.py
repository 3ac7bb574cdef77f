"""Tables 1 to 8 of the paper, and those beyond it, of a grid: python -m examples.echovlm.paper_tables GRID -o DIR.

Table 1 holds the cases; 2 to 4 the three tasks, organ by organ, the five models side by side; 5 to 7 the ablations of
shared expert, top-k and number of experts; 8 the hyperparameters. The others are the ablations that the paper lacks.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from examples.echovlm.config import load_preset
from examples.echovlm.evaluation import BASELINE
from examples.echovlm.figures.runs import SHUFFLED, Run
from examples.echovlm.grid import GRID
from examples.echovlm.report import HEADINGS
from examples.echovlm.scoring import HeldOut
from examples.echovlm.significance import Difference
from examples.echovlm.table_files import NOTHING, Score, Table, write_tables
from moe_adapter import MoEAdapterError

REFERENCE = "dual-path"  # the arm that others are compared with
FINDINGS = "attributes"  # of the finding-level scores the one that tables show
MODELS = {  # the paper's columns, in its order
    "llava-onevision": "LLaVA-OneVision, zero-shot",
    "qwen2-vl": "Qwen2-VL, zero-shot",
    "llava-onevision-plain": "LLaVA-OneVision, fine-tuned",
    "qwen2-vl-plain": "Qwen2-VL, fine-tuned",
    "dual-path": "EchoVLM (dual path)",
}
TASKS = {"table-2": "report", "table-3": "diagnosis", "table-4": "vqa"}
ABLATIONS = {  # name → caption, and which of arms.yaml's tables it is
    "table-5": ("Table 5: the shared expert", "shared expert"),
    "table-6": ("Table 6: top-1 and top-2", "top-k"),
    "table-7": ("Table 7: the number of routed experts", "experts"),
    "controls": ("Beyond the paper: controls", "controls"),
    "alpha": ("Beyond the paper: α fixed, learned by layer, by token", "alpha"),
    "lambda": ("Beyond the paper: λ fixed, learned by layer, by token", "lambda"),
    "start": ("Beyond the paper: the literal equation (3) at the start, without the base preserved", "start"),
    "softmax": ("Beyond the paper: softmax over the selected or over all experts", "softmax"),
    "balance": ("Beyond the paper: balance over a micro-batch, or the step so far and all ranks", "balance"),
}
TAIL = ("Beyond the paper: the long tail, organs drawn as they are or all alike", "long tail")
REFERENCES = {"balance": "balance-micro", TAIL[1]: "long-tail"}  # of tables that compare two others
NOTES = Path(__file__).with_name("paper_notes.yaml")
READING = (
    "Average: the unweighted mean of the organs; findings: the attributes stated right, per cent, of all answers. In "
    "parentheses the difference from the arm without one, and its p of a paired randomisation over patients, of this "
    "comparison alone. Neither knows how another seed of training would differ."
)
HYPERPARAMETERS = {  # Table 8's rows, and where a preset has them
    "routed experts": "moe.num_experts",
    "top-k": "moe.top_k",
    "expert dim": "moe.expert_dim",
    "shared expert dim": "moe.shared_expert_dim",
    "γ of the balance loss": "moe.balance_coef",
    "LoRA rank": "lora.r",
    "LoRA α": "lora.alpha",
    "LoRA dropout": "lora.dropout",
    "engine": "engine.deepspeed",
    "learning rate, stage I": "stage1.learning_rate",
    "learning rate, stage II": "stage2.learning_rate",
    "schedule": "stage1.scheduler",
    "warm-up ratio": "stage1.warmup_ratio",
    "weight decay": "stage1.weight_decay",
    "epochs, stage I": "stage1.epochs",
    "epochs, stage II": "stage2.epochs",
    "batch per device, stage I": "stage1.batch_size",
    "batch per device, stage II": "stage2.batch_size",
    "longest sequence": "max_length",
    "image side, pixels": "image_side",
    "precision": "precision",
    "gradient checkpointing": "gradient_checkpointing",
}


class Grid:
    """What a grid's folder holds, with the differences between its arms, each found once."""

    def __init__(self, folder: Path) -> None:
        """Raises: MoEAdapterError if it is none, or lacks the arm that others are compared with."""
        try:
            self.arms: dict[str, dict[str, Any]] = json.loads((folder / GRID).read_text(encoding="utf-8"))["arms"]
        except (OSError, ValueError, KeyError) as error:
            raise MoEAdapterError(
                f"{folder}: got no grid ({error}); expected a folder that python -m examples.echovlm.grid --out wrote"
            ) from None
        if REFERENCE not in self.arms:
            got = ", ".join(self.arms) or "none"
            raise MoEAdapterError(f"{folder}: got the arms {got}; expected {REFERENCE} among them: let the grid go on")
        self.folder = folder
        self._differences: dict[tuple[str, tuple[str, str]], Mapping[str, Difference]] = {}

    @cached_property
    def tasks(self) -> list[str]:
        return list(self.scores(REFERENCE))

    @cached_property
    def metrics(self) -> list[str]:
        """The text metrics that every arm has."""
        results = [arm["results"]["metrics"] for arm in self.arms.values()]
        return [name for name in results[0] if all(name in found for found in results)]

    @cached_property
    def held_out(self) -> dict[str, HeldOut]:
        run = Run(self.folder / REFERENCE)
        return {task: HeldOut(task, run.held_out(task), run.cases) for task in self.tasks}

    def of(self, table: str) -> list[str]:
        """The arms of a table, `dual-path` first."""
        return sorted((name for name, arm in self.arms.items() if table in arm["tables"]), key=REFERENCE.__ne__)

    def model(self, arm: str) -> dict[str, Any]:
        """What the arm came to: its last stage, or the base of one that trains nothing."""
        return [model for model in self.arms[arm]["results"]["models"] if SHUFFLED not in model["name"]][-1]

    def scores(self, arm: str) -> dict[str, dict[str, Any]]:
        """task → by_organ, overall."""
        return self.model(arm)["tasks"]

    def organ(self, arm: str, task: str, organ: str, score: str) -> Score:
        return Score(value=_number(self.scores(arm)[task]["by_organ"][organ].get(score)))

    def blind(self, task: str) -> dict[str, Any]:
        """The scores of the most common answer, by organ and overall."""
        return self.arms[REFERENCE]["results"]["models"][0]["tasks"][task]

    def overall(self, arm: str, task: str, score: str, reference: str = REFERENCE) -> Score:
        """With its interval and its difference from the reference, another arm."""
        found = _estimate(self.scores(arm)[task]["overall"][score])
        return replace(found, difference=self._difference(task, (arm, reference), score))

    def _difference(self, task: str, arms: tuple[str, str], score: str) -> tuple[float, float, float, float] | None:
        if arms[0] == arms[1]:
            return None
        if (task, arms) not in self._differences:
            sums = (Run(self.folder / arm).sums(self.model(arm)["name"], task) for arm in arms)
            self._differences[task, arms] = self.held_out[task].differences(*sums)
        estimate, p = self._differences[task, arms][score]
        return (*map(float, estimate), float(p))


def paper_tables(grid: Grid) -> list[Table]:
    """All tables that the grid has arms for."""
    notes: dict[str, list[str]] = yaml.safe_load(NOTES.read_text(encoding="utf-8"))
    tables = [_cases(grid, notes["table-1"])]
    tables += [_models(grid, name, task, notes[name]) for name, task in TASKS.items() if task in grid.tasks]
    for name, (caption, table) in ABLATIONS.items():
        reference, arms = REFERENCES.get(table, REFERENCE), grid.of(table)
        if reference in arms and len(arms) > 1:
            tables.append(_ablation(grid, name, caption, arms, reference, notes.get(name, [])))
    if REFERENCES[TAIL[1]] in (arms := grid.of(TAIL[1])) and "report" in grid.tasks:
        tables.append(_tail(grid, arms))
    return [*tables, _hyperparameters(grid, notes["table-8"])]


def _cases(grid: Grid, notes: Iterable[str]) -> Table:
    """Table 1: what there is of each organ."""
    cases = Run(grid.folder / REFERENCE).cases
    organs = sorted({case.organ for case in cases})
    counts = {
        "training cases": Counter(c.organ for c in cases if c.split == "train"),
        "held-out cases": Counter(c.organ for c in cases if c.split == "test"),
        "images": Counter(c.organ for c in cases for _ in c.images),
        "reports, English": Counter(c.organ for c in cases if c.findings and c.language == "en"),
        "reports, Chinese": Counter(c.organ for c in cases if c.findings and c.language == "zh"),
        "questions": Counter(c.organ for c in cases for _ in c.questions),
    }
    rows = [(organ, *(of[organ] for of in counts.values())) for organ in organs]
    rows.append(("all", *(of.total() for of in counts.values())))
    head = ("organ", *counts)
    return Table(name="table-1", caption="Table 1: the cases", head=head, rows=tuple(rows), notes=tuple(notes))


def _models(grid: Grid, name: str, task: str, notes: Iterable[str]) -> Table:
    """Tables 2 to 4: organs and metrics as rows, models as columns."""
    arms, blind = [arm for arm in MODELS if arm in grid.arms], grid.blind(task)
    rows: list[tuple[object, ...]] = []
    for organ in grid.scores(REFERENCE)[task]["by_organ"]:
        rows += [
            (
                organ,
                label,
                Score(value=_number(blind["by_organ"][organ].get(score))),
                *_marked([grid.organ(arm, task, organ, score) for arm in arms]),
            )
            for score, label in _labels(grid)
        ]
    rows += [
        (
            "average",
            label,
            _estimate(blind["overall"][score]),
            *_marked([grid.overall(arm, task, score) for arm in arms]),
        )
        for score, label in _labels(grid)
    ]
    return Table(
        name=name,
        caption=f"Table {name[-1]}: {HEADINGS[task].lower()}, {len(grid.held_out[task].examples)} held-out questions",
        head=("organ", "metric", f"{BASELINE} (no image seen)", *(MODELS[arm] for arm in arms)),
        rows=tuple(rows),
        labels=2,
        notes=tuple(notes),
    )


def _ablation(grid: Grid, name: str, caption: str, arms: list[str], reference: str, notes: Iterable[str]) -> Table:
    """Tasks and metrics as rows, arms as columns; what each arm trains and forgets below."""
    rows = [
        (task, label, *_marked([grid.overall(arm, task, score, reference) for arm in arms]))
        for task in grid.tasks
        for score, label in _labels(grid)
    ]
    rows += [
        ("all", "general text, nats", *(Score(value=_number(grid.model(arm)["general_loss"])) for arm in arms)),
        ("all", "trainable parameters", *(_trainable(grid.arms[arm]) for arm in arms)),
    ]
    head = ("task", "metric", *arms)
    return Table(name=name, caption=caption, head=head, rows=tuple(rows), labels=2, notes=tuple(notes))


def _tail(grid: Grid, arms: list[str]) -> Table:
    """The report's scores of each organ, for the tail is what it is about, and of all."""
    organs, score = grid.scores(REFERENCE)["report"]["by_organ"], grid.metrics[0]
    kept = {arm: grid.arms[arm]["config"]["sampling"]["keep"] for arm in arms}
    rows: list[tuple[object, ...]] = []
    for shown, label in ((score, score), (FINDINGS, "findings")):
        rows += [
            (organ, label, *_marked([grid.organ(arm, "report", organ, shown) for arm in arms])) for organ in organs
        ]
        rows.append(
            ("average", label, *_marked([grid.overall(arm, "report", shown, REFERENCES[TAIL[1]]) for arm in arms]))
        )
    of_arms = "; ".join(f"{arm} trains on {_shares(keep)}" for arm, keep in kept.items())
    head = ("organ", "metric", *arms)
    return Table(name="tail", caption=TAIL[0], head=head, rows=tuple(rows), labels=2, notes=(of_arms,))


def _hyperparameters(grid: Grid, notes: Iterable[str]) -> Table:
    """Table 8: the paper's, which are the preset `paper`, beside this grid's."""
    columns = [asdict(load_preset("paper")), grid.arms[REFERENCE]["config"]]
    rows: list[tuple[object, ...]] = [
        (name, *(_value(values, path) for values in columns)) for name, path in HYPERPARAMETERS.items()
    ]
    config = grid.arms[REFERENCE]["config"]
    base, shared = config.get("base"), config["moe"].get("shared_expert_dim", 1)
    rows += [
        ("static expert dim", 18944, base["text"]["intermediate_size"] if base else "the base's"),
        ("shared experts", 1, int(bool(shared))),
        ("optimizer", "AdamW", "AdamW"),
        ("feature select layer", -1, "the base's"),
        ("patch merger", "2×2", "the base's"),
        ("GPUs", "H100-80G, 2×A100-80G", NOTHING),
    ]
    parameters = grid.arms[REFERENCE]["parameters"].values()
    for stage, paper, found in zip(("I", "II"), ("3.39", "3.40"), parameters, strict=True):
        ours = f"{found['trainable'] / 1e6:.2f} M of {found['total'] / 1e6:.2f} M"
        rows.append((f"trainable parameters, stage {stage}", f"{paper} B of 11.68 B", ours))
    caption = "Table 8: hyperparameters"
    head = ("", "paper", "this grid")
    return Table(name="table-8", caption=caption, head=head, rows=tuple(rows), notes=tuple(notes))


def _labels(grid: Grid) -> Iterator[tuple[str, str]]:
    """The scores that tables show, and what they call them."""
    yield from ((metric, metric) for metric in grid.metrics)
    yield FINDINGS, "findings"


def _marked(scores: list[Score]) -> Iterator[Score]:
    """The row with its best value set off, where they are not all alike."""
    known = {score.value for score in scores if not math.isnan(score.value)}
    for score in scores:
        yield replace(score, best=len(known) > 1 and score.value == max(known))


def notes_of_all(grid: Grid) -> list[str]:
    """How the tables are to be read, what made them, and how each score is computed."""
    results, seconds = grid.arms[REFERENCE]["results"], sum(arm["seconds"] for arm in grid.arms.values())
    made = f"{len(grid.arms)} arms, whose own times add up to {seconds / 60:.0f} minutes; arms.yaml says what they are."
    return [READING, made, *_implementations(results)]


def _implementations(results: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{name}: {how}" for name, how in results["metrics"].items())
    yield from (f"{name} is left out: it {lack}" for name, lack in results["metrics_left_out"].items())


def _trainable(arm: Mapping[str, Any]) -> int:
    """In the last stage."""
    return ([0] + [found["trainable"] for found in arm["parameters"].values()])[-1]


def _shares(keep: Mapping[str, float]) -> str:
    return ", ".join(f"{share:.0%} of {organ}" for organ, share in keep.items()) or "all"


def _value(values: Any, path: str) -> object:
    for name in path.split("."):
        values = values.get(name, NOTHING)
    return NOTHING if values is None else values


def _estimate(found: Mapping[str, float | None]) -> Score:
    value, low, high = (_number(found[name]) for name in ("value", "low", "high"))
    return Score(value=value, interval=(low, high))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def main(arguments: list[str] | None = None) -> int:
    """Write the tables; 2 with one clear line for what the user got wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.echovlm.paper_tables",
        description="The paper's Tables 1 to 8 and those beyond it, as Markdown, LaTeX and CSV.",
        epilog="example: python -m examples.echovlm.paper_tables runs/grid -o runs/grid/tables",
    )
    parser.add_argument("grid", type=Path, metavar="GRID", help="folder of python -m examples.echovlm.grid --out")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the three files")
    options = parser.parse_args(arguments)
    try:
        grid = Grid(options.grid)
        heading = f"The paper's tables, from {options.grid}"
        print(*write_tables(paper_tables(grid), options.output, heading, notes_of_all(grid)), sep="\n")
    except (MoEAdapterError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
