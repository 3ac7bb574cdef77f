"""The run's cases: the user's own file or phantoms rendered on the spot, and real frames to answer for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from examples.echovlm import ranks
from examples.echovlm.account import Account
from examples.echovlm.cases import Case, CaseError, read_cases
from examples.echovlm.config import RecipeConfig
from examples.echovlm.dicom import CASES as OPEN_CASES
from examples.echovlm.dicom import open_dicom_cases
from examples.echovlm.phantom import CASES, generate_cases
from examples.echovlm.tasks import Example, report_example


@dataclass(frozen=True, kw_only=True)
class Data:
    """Cases by split; image paths are relative to `folder`. `shown` pairs each show case with its question."""

    folder: Path
    train: tuple[Case, ...]
    test: tuple[Case, ...]
    shown: tuple[tuple[Case, Example], ...]


def load_data(config: RecipeConfig, cases_file: Path | None, out: Path, account: Account, *, made: bool) -> Data:
    """Read the user's cases, or render phantoms into `out`; add the open DICOM frames to what is shown.

    `made`: all that is written here lies in `out` already. Otherwise the main process makes it and the others wait.

    Raises: CaseError if the file is not right, or has no training or no test case.
    """
    path = cases_file or out / "cases" / CASES
    if not made and cases_file is None:
        _render(config, out / "cases", account)
    cases = read_cases(path)
    by_split = {split: tuple(case for case in cases if case.split == split) for split in ("train", "test", "show")}
    for split in ("train", "test"):
        if not by_split[split]:
            raise CaseError(f"{path}: got no case of split {split!r}, expected at least one; set 'split' on some")
    _tell(by_split["train"], by_split["test"], account)
    if not made and ranks.is_main():
        open_dicom_cases(out / "dicom")
    ranks.wait()
    opened = read_cases(out / "dicom" / OPEN_CASES)
    account.say(f"{len(opened)} real ultrasound files that ship with pydicom are read as cases to answer for")
    shown = [(case, path.parent) for case in by_split["show"]] + [(case, out / "dicom") for case in opened]
    return Data(
        folder=path.parent,
        train=by_split["train"],
        test=by_split["test"],
        shown=tuple((case, report_example(case, folder)) for case, folder in shown),
    )


def _render(config: RecipeConfig, out: Path, account: Account) -> None:
    phantoms = config.phantoms
    assert phantoms is not None, "checked before the run"
    account.keep()
    with tqdm(desc="phantoms", leave=False, disable=not ranks.is_main()) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if ranks.is_main():
            generate_cases(
                out,
                cases_per_organ=phantoms.cases_per_organ,
                test_share=phantoms.test_share,
                frames=phantoms.frames,
                size=phantoms.size,
                seed=config.seed,
                progress=show,
            )
    ranks.wait()
    account.say(f"rendered phantoms, {phantoms.frames} frames of {phantoms.size} pixels a side each, into {out}")


def _tell(train: Sequence[Case], test: Sequence[Case], account: Account) -> None:
    languages = Counter(case.language for case in train)
    account.say(
        f"{len(train)} training and {len(test)} held-out cases (no patient in both) of "
        f"{len({case.organ for case in train})} organs; training reports: "
        + ", ".join(f"{count} {language}" for language, count in languages.most_common())
    )
