"""The megablocks backend: its contract on the published kernels, what it says where they are missing, its page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "megablocks"
PUBLISHED = ROOT / "build" / "published"
PAGE = (ROOT / "docs" / "megablocks.md").read_text(encoding="utf-8")
WITHOUT = """
import sys; sys.modules["{missing}"] = None
import torch; from torch import nn; import moe_adapter as ma; from moe_adapter import backends
def routed(backend):
    torch.manual_seed(0)
    net = nn.ModuleDict({{"ffn": nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))}})
    ma.inject_dual_path_moe(net, target="ffn", expert_dim=8, shared_expert_dim=8, preserve_base=False, backend=backend)
    return net["ffn"](torch.ones(3, 8))
assert torch.allclose(routed("auto"), routed("eager"), atol=1e-6)
assert not any("goes on with eager" in said for said in backends._said), backends._said
assert torch.equal(routed("megablocks"), routed("eager"))
backends.load_backend("megablocks")
"""


def sources() -> list[str]:
    """The unpacked archives of MegaBlocks and what it imports; where there are none this skips, and fails in CI."""
    if find_spec("triton") is None or not PUBLISHED.is_dir():
        without = pytest.fail if os.environ.get("CI") else pytest.skip
        without(f"needs triton, and the sources that `make {PUBLISHED.relative_to(ROOT)}` fetches; see build/*.log")
    return [str(folder) for folder in PUBLISHED.iterdir() if folder.is_dir()]


def run_contract(**environment: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "contract.py")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_published_kernels_in_the_interpreter():
    path = os.pathsep.join([str(HERE), *sources()])
    out = run_contract(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=path)
    assert "skipped" not in out and int(re.search(r"(\d+) passed", out)[1]) > 60


@pytest.mark.gpu
def test_the_same_on_a_gpu():
    for package in ("megablocks", "grouped_gemm"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: see docs/megablocks.md")
    assert "skipped" not in run_contract(TRITON_INTERPRET="0")


@pytest.mark.parametrize("missing", ["megablocks", "grouped_gemm"])
def test_where_it_is_missing_auto_goes_on_and_the_error_says_what_to_install(missing):
    """`auto` is silent; asked for by name it goes on with eager and says so; loaded it raises."""
    code = WITHOUT.format(missing=missing)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("moe_adapter.errors.MoEAdapterError")
    for part in (
        'pip install "moe-adapter[megablocks]"',
        "pip install megablocks --no-build-isolation --no-deps",
        "docs/megablocks.md",
    ):
        assert part in error
    assert done.stderr.count("goes on with eager") == 1


def test_a_package_that_is_not_built_is_an_error_too():
    """The sources alone, without their compiled parts, as after an install for another torch."""
    code = "from moe_adapter import backends; backends.load_backend('megablocks')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sources())}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "No module named 'grouped_gemm_backend'" in done.stderr.splitlines()[-1]
    assert "docs/megablocks.md" in done.stderr.splitlines()[-1]


def test_the_page_names_the_pins_that_are_published():
    setup = next(Path(folder) / "setup.py" for folder in sources() if "megablocks" in folder).read_text()
    for pin in re.findall(r"'((?:torch|numpy|packaging)[<>=][^']+)'", setup):
        assert f"`{pin}`" in PAGE


def test_the_edit_on_the_page_takes_the_argument_out(tmp_path):
    """The page's own command, run on the published header."""
    published = next(Path(folder) / "csrc" / "cumsum.h" for folder in sources() if "megablocks" in folder)
    header = tmp_path / "megablocks-0.10.0" / "csrc" / "cumsum.h"
    header.parent.mkdir(parents=True)
    shutil.copy(published, header)
    assert re.search(r"stream,\s+debug_synchronous\)", header.read_text())
    command = re.search(r"^sed .*$", PAGE, re.MULTILINE)[0]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    edited = header.read_text()
    assert len(re.findall(r"stream\)\);", edited)) == 2
    assert not re.search(r"debug_synchronous\)", edited)
