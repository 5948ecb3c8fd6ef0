"""What every command does before its own work."""

import platform
import subprocess
import sys

import pytest

TOUCHING = """
import resource
import torch
from blade.cli.command import keep_freed_memory
torch.set_num_threads(1)
if {keeps}:
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**23), torch.ones(2**22)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_is_freed_is_used_again_without_the_kernel():
    faults = [
        int(
            subprocess.run(
                [sys.executable, "-c", TOUCHING.format(keeps=keeps)], capture_output=True, check=True
            ).stdout
        )
        for keeps in (False, True)
    ]
    assert faults[1] < faults[0] / 2
