"""The CuTe kernels of the table compile for their architectures, called through the adapter, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from blade_kernels.block_sparse.cute_libraries import missing_library
from blade_kernels.block_sparse.cute_table import ROWS, kernels_of

SCRIPT = Path(__file__).with_name("cute_compile.py")
REPRESENTATIVES = [
    "cudnn forward sm_90 128 128x128",
    "cudnn backward sm_90 128 64x64",
    "cudnn forward sm_100 128 64x64",
    "cudnn backward sm_100 128 128x128",
    "flash forward sm_90 128 128x64",
]

pytestmark = pytest.mark.skipif(
    any(missing_library(name) is not None for name in ("cudnn", "flash")), reason="the extra `cute` is not installed"
)


def check(architecture: int, names: list[str]) -> None:
    """Compile kernels, and check that there is machine code of each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(architecture), *names]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not ended.returncode, ended.stderr[-3000:]
    reports = {report["kernel"]: report for report in map(json.loads, ended.stdout.splitlines())}
    assert sorted(reports) == sorted(names)
    for name, report in reports.items():
        direction = name.split()[1].capitalize()
        assert any(direction in function for function in report["compiled"]), report
        assert report["cubins"] and min(report["cubins"].values()) > 1000, report


@pytest.mark.slow
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_representatives_compile(name) -> None:
    check(int(name.split()[2].removeprefix("sm_")), [name])


@pytest.mark.long
@pytest.mark.parametrize("architecture", sorted({number for row in ROWS for number in row.architectures}))
def test_all_kernels_compile(architecture) -> None:
    check(architecture, [str(kernel) for kernel in kernels_of(architecture)])
