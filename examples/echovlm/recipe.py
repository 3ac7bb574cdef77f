"""The recipe in the order in which it runs: cases, base, stage I, stage II, evaluation, routing, report."""

from __future__ import annotations

from pathlib import Path

from examples.echovlm.account import Account
from examples.echovlm.answering import answer
from examples.echovlm.base import load_base, make_base
from examples.echovlm.config import PresetError, RecipeConfig
from examples.echovlm.data import load_data
from examples.echovlm.evaluation import Evaluator, most_common_reports
from examples.echovlm.report import Results, write_results
from examples.echovlm.routing import record_and_draw
from examples.echovlm.stages import path_weights, stage1, stage2
from examples.echovlm.tasks import examples_of
from moe_adapter import static_only


def run(config: RecipeConfig, *, cases_file: Path | None, base: Path | None, out: Path) -> Path:
    """The whole recipe into the folder `out`; returns the path of its report.

    Raises: MoEAdapterError for a case file, checkpoint or preset that cannot be used.
    """
    _check_complete(config, cases_file, base)
    account = Account()
    loaded = load_base(base, config) if base else None  # first, since it may be refused
    with account.step("Cases"):
        data = load_data(config, cases_file, out, account)
    with account.step("Base model"):
        base = base or make_base(config, data, out / "base", account)
        model, collator = loaded or load_base(base, config)
    evaluator = Evaluator(data, collator, config, account)
    with account.step("Evaluate the base"):
        most_common = evaluator.score("most common report", most_common_reports(data.train, data.test))
        scored = [most_common, evaluator.evaluate("base", model)]

    with account.step("Stage I: parameter-isolated pre-training"):
        pairs = examples_of(data.train, data.folder, ("report",))
        stage1(model, pairs, collator, config, out / "stage1", account)
    with account.step("Evaluate stage I"):
        scored.append(evaluator.evaluate("stage I", model))

    with account.step("Stage II: cooperative instruction fine-tuning"):
        times = config.instructions.items()
        instructions = [e for task, n in times for e in examples_of(data.train, data.folder, (task,)) * n]
        model = stage2(model, instructions, collator, config, out / "stage2", account)
    with account.step("Evaluate stage II"):
        scored.append(evaluator.evaluate("stage II", model))
        shuffled = evaluator.evaluate_shuffled("stage II", model)
        with static_only(model):
            static_loss = evaluator.general_loss(model)

    with account.step("Routing (Figure 5)"):
        figure = record_and_draw(model, evaluator.examples, collator, config, out, account)
    with account.step("Show cases"):
        cases, questions = zip(*data.shown, strict=True)
        shown = answer(model, questions, collator, config.evaluation, label="show cases")
    results = Results(
        scored=scored,
        shuffled=shuffled,
        static_loss=static_loss,
        weights=path_weights(model),
        figure=figure,
        shown=list(zip(cases, questions, shown, strict=True)),
    )
    return write_results(out, data, results, account)


def _check_complete(config: RecipeConfig, cases_file: Path | None, base: Path | None) -> None:
    if cases_file is None and config.phantoms is None:
        raise PresetError("this preset renders no cases: give your own with --cases")
    if base is None and config.base is None:
        raise PresetError("this preset makes no base model: give a checkpoint directory with --base")
