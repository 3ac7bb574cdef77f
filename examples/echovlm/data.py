"""The run's cases: the user's own file or phantoms rendered on the spot, and real frames to answer for."""

from __future__ import annotations

import random
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
from moe_adapter import MoEAdapterError


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
    by_split["train"] = _keep(by_split["train"], config)
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


def _keep(cases: Sequence[Case], config: RecipeConfig) -> tuple[Case, ...]:
    """The cases of all patients but those that the preset's `sampling.keep` leaves out, at random.

    Raises: MoEAdapterError if it names an organ that has no case.
    """
    left_out: set[tuple[str, str]] = set()
    for organ, share in config.sampling.keep.items():
        patients = sorted({case.patient for case in cases if case.organ == organ})
        if not patients:
            organs = ", ".join(sorted({case.organ for case in cases}))
            raise MoEAdapterError(
                f"sampling.keep: got {organ!r}, which no training case is of; expected some of {organs}"
            )
        order = random.Random(f"{config.seed} {organ}").sample(patients, len(patients))
        left_out |= {(organ, patient) for patient in order[max(1, round(share * len(order))) :]}
    return tuple(case for case in cases if (case.organ, case.patient) not in left_out)


def _tell(train: Sequence[Case], test: Sequence[Case], account: Account) -> None:
    languages, organs = (Counter(getattr(case, name) for case in train) for name in ("language", "organ"))
    each = ", ".join(f"{count} {organ}" for organ, count in organs.most_common())
    account.say(
        f"{len(train)} training and {len(test)} held-out cases (no patient in both) of {len(organs)} organs"
        f"{f' ({each})' if len(set(organs.values())) > 1 else ''}; training reports: "
        + ", ".join(f"{count} {language}" for language, count in languages.most_common())
    )
