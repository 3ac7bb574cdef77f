"""The fused activations: the contract of their kernels, and where separate operators take their place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from moe_adapter import activations
from moe_adapter.activations import ACTIVATIONS, activate, activate_backward

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None and not os.environ.get("CI"), reason="needs Triton")


def run_contract(**environment: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "fused_contract.py")]
    done = subprocess.run(command, cwd=HERE.parent, env=os.environ | environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
def test_the_kernels_in_the_interpreter():
    out = run_contract(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert int(re.search(r"(\d+) passed", out)[1]) > 300 and "skipped" not in out


@pytest.mark.gpu
def test_the_same_on_a_gpu():
    assert "skipped" not in run_contract(TRITON_INTERPRET="0")


@needs_triton
@pytest.mark.parametrize(("kernel", "tensors", "stores"), [("_forward", 3, 1), ("_backward", 4, 2)])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_they_compile_for_a_gpu_and_touch_each_number_once(
    name, capability, kernel, tensors, stores, monkeypatch, tmp_path
):
    """An A100 and an H100, neither of which is needed: 16 bytes at a time, and bfloat16 rounded to nearest."""
    triton = pytest.importorskip("triton")  # of torch's wheel for Linux
    fused = pytest.importorskip("moe_adapter.fused")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(fused, kernel)
    numbers = range(2 * tensors + 1)  # pointers, steps between rows, the width
    kinds = ["*bf16" if i < tensors else "i32" if i in numbers else "constexpr" for i in range(len(function.arg_names))]
    source = triton.compiler.ASTSource(
        function,
        dict(zip(function.arg_names, kinds, strict=True)),
        constexprs=dict(NAME=name, BLOCK=fused.BLOCK),
        attrs={(i,): [["tt.divisibility", 16]] for i in numbers},
    )
    ptx = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", capability, 32)).asm["ptx"]
    loads = tensors - 1  # the gradient's memory is read and written
    assert re.findall(r"(?:ld|st)\.global\S*", ptx) == ["ld.global.v4.b32"] * loads + ["st.global.v4.b32"] * stores
    assert "cvt.rn.bf16x2.f32" in ptx or "cvt.rn.bf16.f32" in ptx


@pytest.fixture
def untried():
    activations._tried.cache_clear()
    yield
    activations._tried.cache_clear()


def test_where_a_kernel_fails_separate_operators_go_on_and_it_is_said_once(untried, caplog):
    """Triton has no kernel for a CPU."""
    gate, up = torch.randn(4, 16).chunk(2, dim=1)
    assert [activations.fused_for(gate, up) for _ in range(3)] == [None] * 3
    (record,) = caplog.records
    assert "torch.float32 on cpu take separate operators, for Triton gave: " in record.message


def test_without_triton(untried, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "moe_adapter.fused", raising=False)
    assert activations.fused_for(torch.ones(2, 2)) is None
    assert "triton" in caplog.text


def test_a_model_without_memory_takes_separate_operators(untried, caplog):
    """As when a run's memory is estimated: the tensors say that they are on a GPU, and hold nothing."""
    with FakeTensorMode():
        gate, up, da = (torch.empty(3, 4, device="cuda") for _ in range(3))
        shapes = [activate("silu", gate, up).shape, *(g.shape for g in activate_backward("silu", da, gate, up))]
    assert shapes == [(3, 4)] * 3 and not caplog.records


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_on_a_cpu_nothing_changes(name):
    """To the bit what the operators give one after another."""
    gate, up, da = torch.randn(3, 7, 33).unbind()
    function, derivative = ACTIVATIONS[name]
    expected = function(gate) * up, derivative(da * up, gate), function(gate) * da
    found = activate(name, gate, up), *activate_backward(name, da, gate, up)
    assert all(torch.equal(got, wanted) for got, wanted in zip(found, expected, strict=True))
