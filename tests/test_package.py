"""What installs, what `import moe_adapter` does, and where each package may be imported from."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {package: ROOT / folder for package, folder in PYPROJECT["tool"]["setuptools"]["package-dir"].items()}
DISTRIBUTIONS = packages_distributions()
CONTRACT = {
    "DualPathConfig",
    "DualPathMoE",
    "MoEAdapterError",
    "balance_loss",
    "dual_path_layers",
    "eject_dual_path_moe",
    "inject_dual_path_moe",
    "load_adapter",
    "plan_injection",
    "save_adapter",
    "set_stage",
    "static_only",
}
LEAN_IMPORT = """
import json, os, sys
import torch
environment, modules = dict(os.environ), set(sys.modules)
import moe_adapter
print(json.dumps({
    "names": moe_adapter.__all__,
    "undefined": [name for name in moe_adapter.__all__ if not hasattr(moe_adapter, name)],
    "imported": sorted({name.partition(".")[0] for name in set(sys.modules) - modules}),
    "environment": sorted(set(environment.items()) ^ set(os.environ.items())),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def run_python(
    *arguments: str, cwd: Path, path: Path | None = None, fails: bool = False
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, text=True, capture_output=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


def files_to_ship() -> dict[str, Path]:
    """Every source file under the package folders, by its path in the wheel."""
    return {
        f"{package.replace('.', '/')}/{file.relative_to(folder).as_posix()}": file
        for package, folder in FOLDERS.items()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built offline from a copy, so that an old build/ folder adds nothing to it."""
    source, out = tmp_path_factory.mktemp("source") / "project", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info"))
    build = ["-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out)]
    run_python(*build, cwd=source)
    return next(out.glob("*.whl"))


def test_every_package_on_disk_is_listed() -> None:
    on_disk = {
        path.removesuffix("/__init__.py").replace("/", ".") for path in files_to_ship() if path.endswith("/__init__.py")
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == on_disk


def test_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == set(files_to_ship())
    assert "moe_adapter/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_itself_imports(wheel: Path, tmp_path: Path) -> None:
    code = "import moe_adapter.analysis, moe_adapter.integrations; print(moe_adapter.__file__)"
    assert run_python("-c", code, cwd=tmp_path, path=wheel).stdout.startswith(str(wheel))


@pytest.mark.parametrize("package", sorted(FOLDERS))
def test_packages_import_from_the_root_and_from_elsewhere(package: str, tmp_path: Path) -> None:
    code = f"import moe_adapter, {package} as package; print(package.__file__)"
    for cwd in (ROOT, tmp_path):
        found = run_python("-c", code, cwd=cwd).stdout.strip()
        assert Path(found) == FOLDERS[package] / "__init__.py"


@pytest.mark.parametrize("folder", ["analysis", "integrations"])
def test_a_folder_imported_as_a_top_level_module_says_its_name(folder: str) -> None:
    stderr = run_python("-c", f"import {folder}", cwd=ROOT, fails=True).stderr
    assert re.fullmatch(rf"ImportError: .*moe_adapter\.{folder}.*", stderr.strip().splitlines()[-1])


def declared_libraries(extra: str) -> set[str]:
    """The distributions that pyproject.toml itself names for the core and an extra."""
    project = PYPROJECT["project"]
    names = set()
    for line in project["dependencies"] + project["optional-dependencies"][extra]:
        requirement = Requirement(line)
        if requirement.name == project["name"]:
            names |= set().union(*map(declared_libraries, requirement.extras))
        else:
            names.add(canonicalize_name(requirement.name))
    return names


def imported_libraries(folder: Path) -> set[str]:
    """The distributions that the Python files under `folder` import, the standard library left out."""
    modules = {
        (node.module or "" if isinstance(node, ast.ImportFrom) else alias.name).partition(".")[0]
        for file in folder.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    own = {path.stem for path in (*ROOT.iterdir(), *(ROOT / "tests").rglob("*"))}
    return {
        canonicalize_name(DISTRIBUTIONS.get(module, [module])[0])
        for module in modules - own - set(sys.stdlib_module_names)
    }


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("analysis", ["analysis", "transformers"]), ("examples/echovlm", ["echovlm", "ray", "chat"]), ("tests", ["dev"])],
)
def test_imported_libraries_are_declared(folder: str, extras: list[str]) -> None:
    assert imported_libraries(ROOT / folder) <= set().union(*map(declared_libraries, extras))


def test_import_is_lean(tmp_path: Path) -> None:
    done = run_python("-c", LEAN_IMPORT, cwd=tmp_path)
    seen = json.loads(done.stdout)
    assert done.stderr == ""
    assert set(seen["names"]) == CONTRACT and len(seen["names"]) == len(CONTRACT)
    assert seen["undefined"] == []
    assert seen["environment"] == []
    assert not seen["cuda"]
    declared = {Requirement(line).name for line in PYPROJECT["project"]["dependencies"]}
    assert set(seen["imported"]) - set(sys.stdlib_module_names) <= {"moe_adapter"} | declared


def dependency_tree(name: str, extra: str) -> set[str]:
    """The distributions that `name[extra]` needs here, found through the installed metadata."""
    todo, seen = {(name, ""), (name, extra)}, set()
    while todo:
        current, extra = node = todo.pop()
        seen.add(node)
        for requirement in map(Requirement, requires(current) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo |= {(requirement.name, wanted) for wanted in ("", *requirement.extras)} - seen
    return {canonicalize_name(current) for current, _ in seen}


def test_constraints_pin_the_whole_dependency_tree() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all([specifier.operator for specifier in pin.specifier] == ["=="] for pin in pins)
    tree = dependency_tree("moe-adapter", "dev") - {"moe-adapter"}
    assert tree <= {canonicalize_name(pin.name) for pin in pins}
