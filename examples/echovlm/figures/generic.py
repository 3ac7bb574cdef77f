"""Figure 1: what the generic model says to a case, beside what the specialised one says."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.echovlm.cases import Case, read_cases
from examples.echovlm.figures import figure, save
from examples.echovlm.figures.marks import SYMBOLS, marks
from examples.echovlm.figures.runs import Run
from examples.echovlm.finding_scores import truth_of
from examples.echovlm.tasks import Example, report_example
from moe_adapter.analysis.lines import wrapped
from moe_adapter.errors import MoEAdapterError

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

LINE = 62  # cells of text in a column, in which a CJK character takes two
LINE_MM, FRAME_MM = 3.5, 48.0


def add(subparsers: Any) -> None:
    parser = figure(
        subparsers,
        "generic",
        run,
        help="Figure 1: the generic model's report beside the specialised one's",
        examples=[
            "generic runs/tiny -o figure1.pdf",
            "generic runs/tiny --case examples_rgb_color -o figure1.png",
        ],
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--case", metavar="ID", help="a held-out case, or a show case, which both are asked about now")


def run(options: argparse.Namespace) -> list[Path]:
    source = Run(options.run_folder)
    example, case = find_case(source, options.case)
    return save(generic(example, case, answers(source, example)), options.output)


def find_case(source: Run, id: str | None) -> tuple[Example, Case]:
    """The case of that id with its report's question; the first held-out one if none is named.

    Raises: MoEAdapterError if no held-out and no show case is called so.
    """
    own, shown = source.cases_file, source.folder / "dicom" / "dicom.jsonl"
    known = [(case, own.parent) for case in source.cases if case.split != "train"]
    known += [(case, shown.parent) for case in (read_cases(shown) if shown.is_file() else [])]
    for case, folder in sorted(known, key=lambda pair: pair[0].split != "test"):
        if id in (None, case.id):
            return report_example(case, folder), case
    raise MoEAdapterError(f"--case {id}: expected a held-out or a show case: {', '.join(c.id for c, _ in known[:8])}")


def answers(source: Run, example: Example) -> dict[str, str]:
    """The base's and the last stage's answers: the evaluation's where it asked, else the models' own now, greedy.

    Raises: MoEAdapterError if the evaluation has asked one model alone.
    """
    asked = [(e.case_id, e.prompt) for e in source.held_out("report")]
    if (example.case_id, example.prompt) in asked and (models := source.answers.get("report")):
        found = {model: said[asked.index((example.case_id, example.prompt))] for model, said in models.items()}
        if len(found) < 2:
            raise MoEAdapterError(
                f"{source.folder}: got answers of {', '.join(found)} alone; expected a trained model too"
            )
        return {"base": found.pop("base"), **dict(list(found.items())[-1:])}
    from examples.echovlm.answering import answer

    found = {}
    for name, trained in (("base", False), ("trained", True)):
        model, collator = source.load(trained=trained)
        found[name] = answer(model, [example], collator, source.config.evaluation, label=name)[0]
    return found


def generic(example: Example, case: Case, answers: dict[str, str]) -> Figure:
    """The frames and the question above, an answer a column below, with its findings marked where there is a truth."""
    from matplotlib.figure import Figure

    from moe_adapter.analysis import style

    truth = truth_of("report", example.answer, case)
    columns = {model: _column(said, truth, case) for model, said in answers.items()}
    told = wrapped(f"truth: {example.answer}" if example.answer else "There is no report of this case.", 2 * LINE)
    frames_mm = FRAME_MM + len(told) * LINE_MM
    answers_mm = (max(len(column) for column in columns.values()) + 2) * LINE_MM
    texts = [example.prompt, *told, *(line for column in columns.values() for line in column)]
    with style.style(texts):
        size = (style.DOUBLE_COLUMN_MM * style.MM, (frames_mm + answers_mm) * style.MM)
        drawn = Figure(figsize=size, layout="constrained")
        above, below = drawn.subfigures(2, 1, height_ratios=(frames_mm, answers_mm))
        _draw_frames(above, example)
        above.suptitle(f"{case.organ}: “{example.prompt}”", fontsize="medium", fontweight="bold")
        above.supxlabel("\n".join(told), fontsize="medium", x=0.006, ha="left")
        left, right = below.subplots(1, 2, width_ratios=(1, 1))
        heads = {"base": "generic model (base)"}
        for ax, (model, column) in zip((left, right), columns.items(), strict=True):
            ax.set_axis_off()
            ax.set_title(heads.get(model, f"specialised model ({model})"), fontweight="bold")
            ax.text(0, 0.98, "\n".join(column), va="top", linespacing=1.35)
    return drawn


def _column(said: str, truth: dict[str, str], case: Case) -> list[str]:
    lines = [*wrapped(said or "(nothing)", LINE), ""]
    for mark in marks(said, truth, case) if truth else ():
        but = f" (truth: {mark.truth})" if mark.stated and mark.truth not in ("", mark.stated) else ""
        lines.append(
            f"{SYMBOLS[mark.kind]} {mark.kind}: {mark.name.replace('_', ' ')} {mark.stated or mark.truth}{but}"
        )
    return lines


def _draw_frames(above: SubFigure, example: Example) -> None:
    frames: Sequence[Any] = example.frames()
    for ax, frame in zip(above.subplots(1, len(frames), squeeze=False).flat, frames, strict=True):
        ax.imshow(frame)
        ax.set_axis_off()
