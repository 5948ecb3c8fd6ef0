"""Workers fit the machines, or the message says what would."""

from __future__ import annotations

import pytest

from blade.fleet.crew import Crew, Machine, plan_crew
from blade.fleet.options import FleetOptions

ADDRESS = "10.0.0.1:6379"


def plan(machines: list[tuple[int, int]], device: str | None = None, **options) -> Crew:
    """Return the crew for machines of so many CPUs and GPUs."""
    return plan_crew(FleetOptions(**options), [Machine(cpus=cpus, gpus=gpus) for cpus, gpus in machines], device)


@pytest.mark.parametrize(
    ("machines", "options", "expected"),
    [
        ([(8, 0)], {"workers": 2}, (2, 4, 0.0)),
        ([(8, 0)], {"workers": 3}, (3, 2, 0.0)),
        ([(8, 0)], {"workers": 2, "cpus_per_worker": 1}, (2, 1, 0.0)),
        ([(16, 4)], {"workers": 4}, (4, 4, 1.0)),
        ([(16, 4)], {"workers": 8, "gpus_per_worker": 0.5}, (8, 2, 0.5)),
        ([(16, 4)], {"workers": 4, "device": "cpu"}, (4, 4, 0.0)),
        ([(16, 8), (16, 8)], {"ray_address": ADDRESS}, (16, 2, 1.0)),
        ([(32, 2), (4, 2)], {"ray_address": ADDRESS}, (4, 2, 1.0)),  # as many CPUs as the smaller machine has
        ([(8, 0), (4, 0)], {"ray_address": ADDRESS}, (2, 4, 0.0)),  # one on each machine
        ([(3, 1)], {"workers": 3, "gpus_per_worker": 1 / 3}, (3, 1, 1 / 3)),
    ],
)
def test_workers_share_cpus_and_gpus(machines, options, expected) -> None:
    options = dict(options)
    crew = plan(machines, options.pop("device", None), **options)
    assert (crew.workers, crew.cpus, crew.gpus) == expected
    assert crew.device == ("cuda" if expected[2] else "cpu")


@pytest.mark.parametrize(
    ("machines", "device", "options", "message"),
    [
        (
            [(8, 2)], None, {"workers": 3},
            "`workers` must be at most 2 with 1 GPU each, got 3: this machine has 2 GPUs. With --gpus-per-worker 0.5 "
            "each GPU would be shared by 2, as far as its memory holds so many models.",
        ),
        ([(8, 1)], None, {"workers": 3}, "this machine has 1 GPU. With --gpus-per-worker 0.33 each"),
        (
            [(8, 1), (8, 1)], None, {"workers": 3, "ray_address": ADDRESS},
            "the cluster of 2 has 2 GPUs. With --gpus-per-worker 0.5",
        ),
        ([(2, 0)], None, {"workers": 3}, "`workers` must be at most 2 with 1 CPU each, got 3: this machine has 2"),
        ([(4, 0)], None, {"workers": 3, "cpus_per_worker": 2}, "`workers` must be at most 2 with 2 CPUs each, got 3"),
        ([(4, 0)], "cuda", {"workers": 1}, "`device` needs GPUs, but this machine has none."),
        ([(4, 0)], None, {"workers": 1, "gpus_per_worker": 0.5}, "`gpus_per_worker` needs GPUs, but this machine has"),
        ([(4, 1)], "cpu", {"workers": 1, "gpus_per_worker": 0.5}, "has none for `device` cpu."),
        ([(4, 2)], "cuda:1", {"workers": 1}, "`device` must be cpu or cuda with `workers`, which"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_what_would(machines, device, options, message) -> None:
    with pytest.raises(ValueError, match=r"^`") as raised:
        plan(machines, device, **options)
    assert message in str(raised.value)


def test_the_share_that_is_named_fits() -> None:
    for workers in range(3, 40):
        with pytest.raises(ValueError, match="--gpus-per-worker") as raised:
            plan([(64, 2)], workers=workers)
        share = float(str(raised.value).partition("--gpus-per-worker ")[2].split()[0])
        assert plan([(64, 2)], workers=workers, gpus_per_worker=share).workers == workers
