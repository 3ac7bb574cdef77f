"""Figures 7 to 13: held-out cases with their frames, each model's answer beside the truth, and its findings marked."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from examples.echovlm.figures import figure
from examples.echovlm.figures.marks import MEANING, SYMBOLS, Mark, marks
from examples.echovlm.figures.runs import Run
from examples.echovlm.finding_scores import truth_of
from moe_adapter.errors import MoEAdapterError

if TYPE_CHECKING:
    from examples.echovlm.cases import Case
    from examples.echovlm.tasks import Example

PAGE = Path(__file__).with_name("cases.html")


def add(subparsers: Any) -> None:
    parser = figure(
        subparsers,
        "cases",
        run,
        help="Figures 7 to 13: answers beside the truth, as a page",
        examples=["cases runs/tiny -o cases.html", "cases grid/qwen2-vl grid/dual-path --organ liver -o figure9.html"],
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a run's folder; of several on the same cases, the last model"
    )
    parser.add_argument("--organ", nargs="+", metavar="ORGAN", help="these alone (default: all)")
    parser.add_argument("--per-organ", type=int, default=1, metavar="N", help="the first N cases of each (default: 1)")
    parser.add_argument("--case", nargs="+", metavar="ID", help="these cases instead")


def run(options: argparse.Namespace) -> list[Path]:
    runs = [Run(folder) for folder in options.runs]
    chosen = choose(runs[0].cases, organs=options.organ, per_organ=options.per_organ, ids=options.case)
    how = (
        "Cases chosen by name."
        if options.case
        else f"Held-out cases in the file's order, {options.per_organ} of each organ."
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page(runs, chosen, f"{how} Answers are greedy."), encoding="utf-8")
    return [options.output]


def choose(
    cases: Sequence[Case], *, organs: Sequence[str] | None, per_organ: int, ids: Sequence[str] | None
) -> list[Case]:
    """The first held-out cases of each organ in the file's order, or those named; never by how they were answered.

    Raises: MoEAdapterError if there is no such held-out case or organ.
    """
    held_out = {case.id: case for case in cases if case.split == "test"}
    by_organ: dict[str, list[Case]] = {}
    for case in held_out.values():
        by_organ.setdefault(case.organ, []).append(case)
    for what, given, known in (("--case", ids, held_out), ("--organ", organs, by_organ)):
        if unknown := [name for name in given or () if name not in known]:
            raise MoEAdapterError(f"{what} {unknown[0]}: none is held out; expected of {', '.join(list(known)[:8])}")
    if ids:
        return [held_out[id] for id in ids]
    return [case for organ in organs or sorted(by_organ) for case in by_organ[organ][:per_organ]]


def page(runs: Sequence[Run], cases: Sequence[Case], told: str) -> str:
    """A page without scripts and without anything from elsewhere; all text of the data is escaped.

    Raises: MoEAdapterError if the runs' answers are not to the same questions.
    """
    answered = _answered(runs)
    organs = list(dict.fromkeys(case.organ for case in cases))
    folder = runs[0].cases_file.parent
    content = []
    for number, organ in enumerate(organs):
        content.append(f'<h2 id="organ-{number}">{escape(organ)}</h2>')
        content += [_case(case, folder, answered) for case in cases if case.organ == organ]
    models = dict.fromkeys(model for asked in answered.values() for model in asked[1])
    links = "".join(f'<a href="#organ-{number}">{escape(organ)}</a>' for number, organ in enumerate(organs))
    key = "".join(
        f'<li class="{kind}"><b>{SYMBOLS[kind]}</b> {kind}: {meaning}</li>' for kind, meaning in MEANING.items()
    )
    parts = {"title": escape(f"Case studies: {', '.join(models)}"), "told": escape(told), "key": key, "links": links}
    return Template(PAGE.read_text(encoding="utf-8")).substitute(parts, content="\n".join(content))


def _answered(runs: Sequence[Run]) -> dict[str, tuple[list[Example], dict[str, list[str]]]]:
    """task → the questions, and each model's answers: all of one run's models, or the last of each of several."""
    first = runs[0]
    found = {task: (first.held_out(task), dict(models)) for task, models in first.answers.items()}
    if len(runs) == 1:
        return found
    for task, (questions, models) in found.items():
        models.clear()
        for run in runs:
            if run.held_out(task) != questions and [_asked(e) for e in run.held_out(task)] != list(
                map(_asked, questions)
            ):
                raise MoEAdapterError(
                    f"{run.folder}: got other questions than {first.folder}; give runs on the same cases"
                )
            if last := list(run.answers.get(task, {}).items())[-1:]:
                models[run.folder.name] = last[0][1]
    return found


def _asked(example: Example) -> tuple[str, str, str]:
    return example.case_id, example.prompt, example.answer


def _case(case: Case, folder: Path, answered: Mapping[str, tuple[list[Example], dict[str, list[str]]]]) -> str:
    from moe_adapter.analysis.page import data_uri

    frames = "".join(
        f'<img src="{data_uri(folder / image)}" alt="frame {number}">' for number, image in enumerate(case.images, 1)
    )
    tables = [
        _table(task, example, case, {model: answers[index] for model, answers in models.items()})
        for task, (questions, models) in answered.items()
        for index, example in enumerate(questions)
        if example.case_id == case.id
    ]
    return (
        f'<section><h3>{escape(case.id)}</h3><div class="frames">{frames}</div>'
        f'<p class="quiet">hospital {escape(case.hospital or "unknown")}, language {case.language}</p>'
        f"{''.join(tables)}</section>"
    )


def _table(task: str, example: Example, case: Case, answers: Mapping[str, str]) -> str:
    truth = truth_of(task, example.answer, case)
    rows = [_row("truth", example.answer, (f"<li>{_named(name, value)}</li>" for name, value in truth.items()), case)]
    rows += [_row(model, said, map(_mark, marks(said, truth, case)), case) for model, said in answers.items()]
    rows[0] = rows[0].replace("<tr>", '<tr class="truth">')
    return (
        f'<div class="scroll"><table><caption>{task}: <strong lang="{case.language}">{escape(example.prompt)}</strong>'
        f"</caption><tr><th scope=col></th><th scope=col>answer</th><th scope=col>findings</th></tr>{''.join(rows)}"
        "</table></div>"
    )


def _row(head: str, text: str, items: Iterable[str], case: Case) -> str:
    listed = "".join(items)
    findings = f"<ul>{listed}</ul>" if listed else '<span class="quiet">none that is read</span>'
    said = escape(text) or '<span class="quiet">(nothing)</span>'
    return f'<tr><th scope=row>{escape(head)}</th><td lang="{case.language}">{said}</td><td>{findings}</td></tr>'


def _mark(mark: Mark) -> str:
    """The symbol, the attribute, and the truth where it is another; the kind in words for who doesn't see them."""
    value = mark.stated or mark.truth
    but = f" (truth: {escape(mark.truth)})" if mark.stated and mark.truth not in ("", mark.stated) else ""
    symbol = f'<b role="img" aria-label="{mark.kind}" title="{mark.kind}">{SYMBOLS[mark.kind]}</b>'
    return f'<li class="{mark.kind}">{symbol} {_named(mark.name, value)}{but}</li>'


def _named(name: str, value: str) -> str:
    return f"{escape(name.replace('_', ' '))}: {escape(value)}"
