"""All arms behind the tables, each a run of the recipe: python -m examples.echovlm.grid --preset grid --out DIR.

An arm (`arms.yaml`) is the preset with some changes. All start from the same cases, and those of a family from the same
base. A grid that was interrupted goes on where it was when it is called again.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from examples.echovlm import ranks
from examples.echovlm.command_line import fail, load_recipe, processes
from examples.echovlm.config import BertScoreConfig, RecipeConfig, load_preset
from examples.echovlm.phantom import CASES
from moe_adapter import MoEAdapterError
from moe_adapter.directory import replace_file

ARMS = Path(__file__).with_name("arms.yaml")
GRID = "grid.json"


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Arm:
    """`start`: the name of the arm whose base this one starts from, its own if it makes or is given one."""

    tables: tuple[str, ...]
    start: str
    changes: dict[str, Any]


def read_arms(file: Path = ARMS, names: Iterable[str] | None = None) -> dict[str, Arm]:
    """The arms of a file in order: all, or those named and what they start from, which the first one always is.

    Raises: MoEAdapterError for an unknown name, or a file that is not right.
    """
    try:
        rows = yaml.safe_load(file.read_text(encoding="utf-8"))
        values = {name: {"start": row.pop("from", name), **row} for name, row in rows.items()}
        arms = TypeAdapter(dict[str, Arm]).validate_python(values)
    except (OSError, AttributeError, yaml.YAMLError, ValidationError) as error:
        raise MoEAdapterError(f"{file}: expected a mapping of arms as in {ARMS.name}, got: {error}") from None
    wanted = set(arms if names is None else names)
    for name in [*sorted(wanted), *(arm.start for arm in arms.values())]:
        if name not in arms:
            near = difflib.get_close_matches(name, arms) or list(arms)
            raise MoEAdapterError(f"no arm is called {name!r}, expected one of {', '.join(near)}")
    wanted |= {next(iter(arms)), *(arms[name].start for name in wanted)}
    ordered = sorted(arms, key=lambda name: arms[name].start != name)  # bases first
    return {name: arms[name] for name in ordered if name in wanted}


def configure(
    preset: str, arms: Mapping[str, Arm], bases: Mapping[str, Path], encoder: BertScoreConfig | None = None
) -> dict[str, RecipeConfig]:
    """Each arm's preset: the one of all, with the changes of the arm whose base it starts from, and its own.

    `encoder`: BERTScore's, where it is not the preset's.

    Raises: MoEAdapterError for a preset that cannot be used, or that makes no base where none is given.
    """
    lacking = [name for name, arm in arms.items() if arm.start == name and name not in bases]
    if lacking and load_preset(preset).base is None:
        raise MoEAdapterError(
            f"preset {preset!r} makes no base: give --base ARM=DIR for {', '.join(lacking)}, or --arms without"
        )
    configs = {}
    for name, arm in arms.items():
        changes = [arms[arm.start].changes, arm.changes]
        if arm.start in bases:  # which has no sizes to change
            changes = [{key: value for key, value in some.items() if key != "base"} for some in changes]
        if encoder:
            changes.append({"evaluation": {"bertscore": dataclasses.asdict(encoder)}})
        configs[name] = load_preset(preset, *changes)
    return configs


def run_grid(
    preset: str,
    arms: Mapping[str, Arm],
    out: Path,
    *,
    cases_file: Path | None = None,
    bases: Mapping[str, Path],
    train_encoder: bool = False,
    jobs: int = 1,
) -> Path:
    """Run the arms that are not done, each into its folder of `out`; returns the path of `grid.json`.

    `grid.json` holds for each arm its tables and changes, seconds, parameters by stage and what the run found.
    `bases`: a checkpoint directory for an arm that would make its base. `train_encoder`: one for BERTScore.
    `jobs`: how many arms run at once, each in a process of its own.

    Raises: MoEAdapterError for a preset or a checkpoint that cannot be used, or an arm that was begun otherwise.
    """
    from examples.echovlm.side_by_side import run_all
    from examples.echovlm.stand_in import stand_in

    if jobs > 1 and ranks.count() > 1:
        raise MoEAdapterError(f"--jobs: got {jobs} under a launcher, whose processes share each arm; expected 1")
    configure(preset, arms, bases)  # whether it can be, before anything is made
    settings = load_preset(preset)
    if train_encoder and settings.evaluation.bertscore:
        raise MoEAdapterError(f"--stand-in: preset {preset!r} names an encoder; expected none, or leave the option out")
    encoder = stand_in(out / "stand-in", settings.seed) if train_encoder else None
    configs = configure(preset, arms, bases, encoder)
    first, kept = next(iter(arms)), _read(out)
    done = [name for name in arms if name in kept and kept[name]["config"] == _plain(configs[name])]
    for name in done:
        print(f"\n==== {name}: done before, in {kept[name]['seconds']:.0f} s", flush=True)

    def start(name: str) -> dict[str, Any]:
        arm, log = arms[name], out / f"{name}.log" if jobs > 1 else None
        print(f"\n==== {name}" + (f": see {log}" if log else ""), flush=True)
        made = None if name == arm.start else out / arm.start / "base"
        if configs[name].evaluation == configs[arm.start].evaluation:
            _share_evaluation(out / arm.start, out / name)
        cases = cases_file or (None if name == first else out / first / "cases" / CASES)
        return dict(config=configs[name], log=log, cases_file=cases, base=bases.get(arm.start, made), out=out / name)

    needs = {name: {first, arm.start} - {name} for name, arm in arms.items()}
    for name in run_all(needs, start, done, jobs):
        _keep(out, name, arms[name], configs[name], order=list(arms))
    return out / GRID


def _share_evaluation(start: Path, folder: Path) -> None:
    """What a base is worth was found once; as a part of the arm's own evaluation it is taken over."""
    source, place = start / "evaluation" / "base", folder / "evaluation" / "base"
    if ranks.is_main() and source.is_dir() and not place.exists():
        part = place.with_name("part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part)
        os.replace(part, place)
    ranks.wait()


def _read(out: Path) -> dict[str, Any]:
    """The arms that are done."""
    file = out / GRID
    return ranks.from_main(json.loads(file.read_text())["arms"] if ranks.is_main() and file.is_file() else {})


def _keep(out: Path, name: str, arm: Arm, config: RecipeConfig, order: list[str]) -> None:
    """Add an arm to `grid.json`, in its place among the others."""
    done = _read(out)
    if ranks.is_main():
        results = json.loads((out / name / "results.json").read_text(encoding="utf-8"))
        done[name] = {
            "tables": arm.tables,
            "changes": arm.changes,
            "seconds": sum(results.pop("seconds").values()),
            "parameters": results.pop("parameters"),
            "results": results,
            "config": _plain(config),
        }
        done = {name: done[name] for name in dict.fromkeys([*order, *done]) if name in done}
        replace_file(out / GRID, json.dumps({"arms": done}, ensure_ascii=False, indent=1).encode())
    ranks.wait()


def _plain(config: RecipeConfig) -> dict[str, Any]:
    """A configuration in JSON's types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def main(arguments: list[str] | None = None) -> int:
    """Run the grid; 2 with one clear line for what the user got wrong."""
    options = _parser().parse_args(arguments)
    try:
        arms = read_arms(options.table, options.arms.split(",") if options.arms else None)
        bases = dict(_base(text, arms) for text in options.base)
        _check_out(options.out)
        load_recipe()
        with processes():
            given = dict(cases_file=options.cases, bases=bases, train_encoder=options.stand_in, jobs=options.jobs)
            print(run_grid(options.preset, arms, options.out, **given))
    except MoEAdapterError as error:
        return fail(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.echovlm.grid", description="The arms of all tables.")
    parser.add_argument("--preset", required=True, help="grid, tiny, small, paper, or the path of a YAML file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the grid; the same again to go on with it")
    parser.add_argument("--arms", help="names of arms, with commas between; all without it")
    parser.add_argument("--table", type=Path, default=ARMS, help="a file like arms.yaml")
    parser.add_argument("--cases", type=Path, help="your cases (docs/cases.md); phantoms are rendered without it")
    parser.add_argument(
        "--jobs", type=_jobs, default=1, metavar="N", help="arms at once, which share cores or GPU (default: 1)"
    )
    parser.add_argument(
        "--stand-in", action="store_true", help="BERTScore too, by a small encoder that is trained here: NOT COMPARABLE"
    )
    parser.add_argument(
        "--base", action="append", default=[], metavar="ARM=DIR", help="checkpoint of an arm that would make its base"
    )
    return parser


def _jobs(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of arms, at least 1")
    return int(text)


def _base(text: str, arms: Mapping[str, Arm]) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    making = [name for name, arm in arms.items() if arm.start == name]
    if name not in making or not (Path(folder) / "config.json").is_file():
        raise MoEAdapterError(
            f"--base {text}: expected ARM=DIR, an arm of {', '.join(making)} and a checkpoint's folder"
        )
    return name, Path(folder)


def _check_out(out: Path) -> None:
    """That nothing but a grid lies in `out`, where a grid begins by saying so."""
    if not (out / GRID).is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise MoEAdapterError(f"--out {out}: it holds something that is no grid; name a new folder")
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / GRID, json.dumps({"arms": {}}).encode())


if __name__ == "__main__":
    sys.exit(main())
