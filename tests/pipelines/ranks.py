"""Several processes at once that form one group, for scripts beside the tests."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
SECONDS = 600


def run_ranks(script, count, folder, *arguments):
    """Run a script in `count` processes of one thread each, which join with `join_ranks`.

    Args:
        script: its path.
        count: number of processes.
        folder: an empty folder for the file by which they find each other.
        arguments: given to each.

    Raises:
        AssertionError: if one fails, with what it printed.
    """
    (folder / "group").unlink(missing_ok=True)  # of an earlier group, which would be waited for
    paths = [str(TESTS.parent / part) for part in (".", "kernels", "pipelines", "tests/pipelines", "tests/kernels")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env={**environment, "RANK": str(rank), "WORLD_SIZE": str(count), "GROUP_FILE": str(folder / "group")},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, "\n".join(output[-3000:] for output in outputs)


def join_ranks():
    """Join the group of `run_ranks`; return this process's rank, and their number."""
    import torch
    import torch.distributed as dist

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['GROUP_FILE']}", rank=rank, world_size=count)
    torch.accelerator.device_count = lambda: 1  # Diffusers divides by it, and a CPU has none
    return rank, count


def leave_ranks():
    """End the process at once: threads of a gloo group now and then abort an ordinary exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
