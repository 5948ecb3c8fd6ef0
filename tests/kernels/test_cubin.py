"""Every shipped configuration compiles, without a GPU, into the code that it is meant to be."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from blade_kernels.block_sparse.launch_table import SHARED_MEMORY
from blade_kernels.cubin import ARCHITECTURES, FLOAT8_INSTRUCTIONS, INTEGER_INSTRUCTIONS, MATRIX_INSTRUCTIONS

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

SPILLS = {("key_gradient_kernel", "90", f"heads of 128, blocks of {block}, tiles of 64x64") for block in (64, 128)}
"""Backward configurations in which a few bytes spill: dk, dv, keys and values of 64 tokens fill the registers."""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_spills_and_the_matrix_units_are_used(arch, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "blade_kernels.cubin", arch, "--json"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    reports = [json.loads(line) for line in shown.splitlines()]
    assert len(reports) == (97 if arch in FLOAT8_INSTRUCTIONS else 90)
    for report in reports:
        place, code = (report["kernel"], arch, report["case"]), report["instructions"]
        spills = report["stack_bytes"] or code.get("LDL", 0) or code.get("STL", 0)
        assert bool(spills) == (place in SPILLS), report
        assert report["stack_bytes"] <= 32, report
        assert report["shared_bytes"] <= SHARED_MEMORY[arch] * 1024, report
        if report["kernel"] == "sampled_importance_kernel":
            assert code.get(MATRIX_INSTRUCTIONS[arch]) and code.get("LDGSTS"), report  # keys are loaded ahead
        if "tiles" in report["case"]:
            # a tile of 32 is too small for the matrix unit of a group of four warps
            newer, tiny = arch in ("90", "100"), "blocks of 16" in report["case"]
            small = newer and (tiny or "tiles of 32x32" in report["case"])
            assert code.get("HMMA" if small else MATRIX_INSTRUCTIONS[arch]), report
            integers = "IMMA" if small else INTEGER_INSTRUCTIONS[arch]
            floats = FLOAT8_INSTRUCTIONS.get(arch, "QMMA")
            assert bool(code.get(integers)) == ("8 bits" in report["case"] or "8-bit" in report["case"]), report
            assert bool(code.get(floats)) == ("8-bit floats" in report["case"] and not small), report
            # describing tensors costs the host more than it saves where programs are this short
            described = newer and not tiny and "alone" not in report["case"]  # pooled tokens are loaded without
            assert bool(code.get("UTMALDG")) == described, report


@pytest.mark.slow
@needs_triton
def test_the_interpreter_compiles_nothing(tmp_path):
    command = [sys.executable, "-m", "blade_kernels.cubin", "90"]
    shown = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert shown.returncode and "nothing is compiled while TRITON_INTERPRET=1 is set" in shown.stderr
