"""Tuning, with Triton's interpreter in place of a GPU and made-up times."""

import json
from dataclasses import replace

import pytest
import torch
from blade_kernels.block_sparse import launch_table, tuning
from blade_kernels.block_sparse.launch_table import BLOCK_SIZES, KERNELS, SHARED_MEMORY, launch_config
from blade_kernels.block_sparse.tuning import Trial, TuningCase, best, candidates, save, tune

pytest.importorskip("triton")
CASE = TuningCase(tokens=40, heads=1, head_dim=64, block_size=32, density=0.5, dtype=torch.float16, device="cpu")


@pytest.fixture(autouse=True)
def own_file(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    launch_table.measured_configs.cache_clear()
    yield
    launch_table.measured_configs.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off")
def test_the_fastest_configuration_is_kept_and_taken_from_then_on(monkeypatch):
    few = {kernel: list(candidates(kernel, "90", 64, 32))[:3] for kernel in KERNELS}
    monkeypatch.setattr(tuning, "candidates", lambda kernel, *_: few[kernel])
    times = iter(range(100, 0, -10))

    def measure(run):
        assert all(tensor.isfinite().all() for tensor in run())
        return float(next(times))

    seen = []
    trials = tune(CASE, measure=measure, on_trial=seen.append)
    assert trials == seen and {trial.kernel for trial in trials} == set(KERNELS)
    chosen = best(trials)
    save(chosen, CASE, launch_table.override_path())
    for kernel in KERNELS:
        assert chosen[kernel].config == [trial.config for trial in trials if trial.kernel == kernel][-1]
        assert launch_config(kernel, "90", 64, (32, 32), device="cpu") == chosen[kernel].config
        assert launch_config(kernel, "90", 64, (32, 32), device="another") != chosen[kernel].config


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off")
def test_what_fails_or_computes_something_else_is_not_chosen(monkeypatch):
    monkeypatch.setattr(tuning, "candidates", lambda kernel, *_: list(candidates(kernel, "90", 64, 32))[:1])

    def measure(run):
        raise RuntimeError("out of resources\nand more")

    trials = tune(CASE, measure=measure)
    assert all(trial.ms is None and trial.problem == "RuntimeError: out of resources" for trial in trials)
    assert best(trials) == {}
    monkeypatch.setattr(tuning, "_relative_change", lambda found, expected: 0.5)
    assert tune(CASE, measure=measure)[0].problem == "outputs differ by 0.5"


def test_a_gain_within_noise_changes_nothing_and_takes_an_older_choice_away():
    config = launch_config("forward", "90", 64, (32, 32))
    faster = replace(config, num_stages=4)
    shipped = Trial(kernel="forward", config=config, shipped=True, ms=1.0)
    other = Trial(kernel="forward", config=faster, shipped=False, ms=0.9)
    path = launch_table.override_path()
    save(best([shipped, other]), CASE, path)
    assert launch_config("forward", "90", 64, (32, 32), device="cpu") == faster
    save(best([shipped, replace(other, ms=0.99)]), CASE, path)
    assert launch_config("forward", "90", 64, (32, 32), device="cpu") == config
    assert json.loads(path.read_text()) == {"cpu": {"forward": {"64": {}}}}


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_candidates_divide_the_block_and_fit_into_shared_memory(arch):
    for kernel in KERNELS:
        for head_size in (64, 128):
            for block in BLOCK_SIZES:
                found = list(candidates(kernel, arch, head_size, block))
                assert len(found) == len(set(found)) >= 4
                assert all(block % config.block_m == block % config.block_n == 0 for config in found)


def test_an_unreadable_file_is_named():
    path = launch_table.override_path()
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"launch_table.json cannot be read .* run `blade-bench tune` again"):
        launch_config("forward", "90", 64, (32, 32), device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "`tokens` must be at least 1, got 0"),
        ({"head_dim": 96}, r"`head_dim` must be one of \(64, 128\), got 96"),
        ({"block_size": 8}, r"`block_size` must be one of \(16, 32, 64, 128\), got 8"),
        ({"density": 0.0}, r"`density` must be in \(0, 1\], got 0.0"),
        ({"dtype": torch.float32}, "`dtype` must be torch.bfloat16 or torch.float16, got torch.float32"),
    ],
)
def test_bad_cases_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CASE, **change)
