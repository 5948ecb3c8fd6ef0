"""The benchmark of a card: what it measures, that it is stopped by nothing, and what its report says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from blade.benchmarks.card import benchmark, checks, steps, suspects
from blade.benchmarks.card.benchmark import CardBenchmark, run_card_benchmark
from blade.benchmarks.card.report import compare, find_previous, markdown, report_files, tables, times, write_report
from blade.benchmarks.card.steps import PARTS, Step, card_steps
from blade.cli.bench import main
from blade.common.files import append_json_line

CPU = torch.device("cpu")
MACHINE = {"event": "machine", "machine": {"device": "a card"}, "versions": {"torch": "2.13"}}


@pytest.mark.slow
def test_everything_is_measured_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main(["gpu", "--device", "cpu", "--minutes", "3", "--output", str(tmp_path)])
        assert ended.value.code == 0, capsys.readouterr().err
    reports, pages = (sorted(tmp_path.glob(f"*.{kind}")) for kind in ("json", "md"))
    (before, now), page = reports, pages[1].read_text()
    plots = sorted(path.name.rpartition("-")[2] for path in tmp_path.glob(f"{now.stem}-*.png"))
    assert plots == ["quality.png", "speed.png", "tflops.png"] and len([*tmp_path.iterdir()]) == 10
    report = json.loads(now.read_text())
    assert {step["part"] for step in report["steps"]} == set(PARTS)
    for step in report["steps"]:
        assert step["state"] in ("done", "not here"), step
        assert step.get("reason") or "result" in step, step
    done = {step["name"]: step["result"] for step in report["steps"] if step["state"] == "done"}
    assert max(done["attention by cpu"]["errors"].values()) < checks.FACTOR
    assert done["crash: flash"]["size"]["tokens"] == 538
    assert done["250 tokens, density 0.2"]["cases"][0]["ms"]["cpu"].keys() == {"forward", "training", "whole"}
    assert [run["run"] for run in done["generation"]["runs"]] == ["dense, guidance", "sparse, guidance", "sparse"]
    assert done["an update of a distillation"]["seconds_update"] > 0
    assert report["compared"]["with"] == before.name and len(report["compared"]["times"]) > 5
    shown = capsys.readouterr().out
    for heading in ("Steps", "Attention: ", "Videos: Runs", "An update of a distillation", f"Against {before.name}"):
        assert f"## {heading}" in page and heading in shown


class ScriptedWorker:
    """A worker that writes lines into its journal as time passes, then ends."""

    def __init__(self, journal: Path, lines: list[tuple[float, dict[str, Any]]], code: int | None, clock) -> None:
        self.journal, self.lines, self.code, self.clock, self.killed = journal, lines, code, clock, False
        self.began = clock.now

    def poll(self) -> int | None:
        while self.lines and self.clock.now - self.began >= self.lines[0][0]:
            append_json_line(self.journal, self.lines.pop(0)[1])
        if self.killed:
            return -9
        return None if self.lines else self.code

    def kill(self) -> None:
        self.killed = True

    def wait(self) -> int:
        code = self.poll()
        assert code is not None
        return code


class Clock:
    """A time that passes when somebody waits."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds


def run_scripted(monkeypatch: pytest.MonkeyPatch, scripts: list[tuple[list, int | None]], minutes: float = 1.0):
    """Run steps a, b, c and d by workers that follow scripts; returns the report, and the names each was given."""
    made = [Step(name, "attention", lambda *_: {}, limit=20) for name in "abcd"]
    monkeypatch.setattr(benchmark, "card_steps", lambda device: made)
    clock, given = Clock(), []

    def start(device, journal, names, errors):
        given.append(list(names))
        lines, code = scripts.pop(0)
        errors.write_text("first\nlast words\n")
        return ScriptedWorker(journal, [(0.0, MACHINE), *lines], code, clock)

    reports: list[str] = []
    report = run_card_benchmark(
        CardBenchmark(minutes=minutes, device="cpu"),
        start=start,
        clock=clock,
        pause=clock.pause,
        on_report=lambda report: reports.append(json.dumps(report)),
    )
    assert json.loads(reports[-1]) == report and report["machine"] == {"device": "a card"}
    return {step["name"]: step for step in report["steps"]}, given


def event(kind: str, step: str, **values: Any) -> dict[str, Any]:
    return {"event": kind, "step": step, **values}


def test_a_crash_ends_one_step(monkeypatch) -> None:
    first = [(0, event("begin", "a")), (1, event("end", "a", seconds=1, result={"ms": 3})), (1, event("begin", "b"))]
    second = [(0, event("begin", "c")), (1, event("crashed", "c", seconds=1, reason="an illegal access"))]
    third = [(0, event("begin", "d")), (1, event("wrong", "d", seconds=1, reason="other values"))]
    found, given = run_scripted(monkeypatch, [(first, -11), (second, 3), (third, 0)])
    assert given == [["a", "b", "c", "d"], ["c", "d"], ["d"]]
    assert [step["state"] for step in found.values()] == ["done", "crashed", "crashed", "wrong"]
    assert found["a"]["result"] == {"ms": 3}
    assert found["b"]["reason"] == "the process ended with exit code -11: last words"
    assert found["c"]["reason"] == "an illegal access"


def test_a_step_that_hangs_is_left(monkeypatch) -> None:
    first = [(0, event("begin", "a")), (999, event("end", "a"))]
    second = [(0, event("begin", name)) for name in "b"] + [(1, event("end", "b")), (2, event("begin", "c"))]
    second += [(3, event("failed", "c", reason="ValueError: x")), (3, event("begin", "d")), (4, event("end", "d"))]
    found, given = run_scripted(monkeypatch, [(first, 0), (second, 0)])
    assert given == [["a", "b", "c", "d"], ["b", "c", "d"]]
    assert [step["state"] for step in found.values()] == ["hung", "done", "failed", "done"]
    assert found["a"]["reason"] == "it took more than 20 s"


def test_when_the_time_is_over_what_was_found_is_kept(monkeypatch) -> None:
    lines = [(0, event("begin", "a")), (1, event("end", "a", result={})), (1, event("begin", "b"))]
    lines += [(8, event("partial", "b", result={"cases": [1]})), (99, event("end", "b", result={"cases": [1, 2]}))]
    found, given = run_scripted(monkeypatch, [(lines, 0)], minutes=0.25)
    assert [step["state"] for step in found.values()] == ["done", "out of time", "not begun", "not begun"]
    assert found["b"]["result"] == {"cases": [1]} and len(given) == 1


def test_a_worker_that_cannot_begin_is_an_error(monkeypatch) -> None:
    with pytest.raises(RuntimeError, match="ended with exit code 1: last words"):
        run_scripted(monkeypatch, [([], 1)])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"minutes": 0.0}, "`minutes` must be above 0"), ({"device": "cuda:7"}, "`device` must exist, got 'cuda:7'")],
)
def test_bad_options_are_refused(monkeypatch, options, message) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        CardBenchmark(**options)


def test_the_steps_of_a_gpu_are_ones_that_can_be_begun(monkeypatch) -> None:
    """Their options are valid, their recipe and their model exist: all but the GPU is there."""
    from blade.benchmarks import generation
    from blade.distillation import workflow

    begun: list[tuple[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(steps, "run_attention_benchmark", lambda settings, **_: begun.append(("attention", settings)))
    monkeypatch.setattr(
        generation, "run_generation_benchmark", lambda settings: begun.append(("generation", settings))
    )
    monkeypatch.setattr(steps, "architecture", lambda device_type: 90)
    monkeypatch.setattr(steps, "check_cute", lambda kernel, device: begun.append(("check", kernel)))
    monkeypatch.setattr(steps, "check_attention", lambda *args, **options: begun.append(("check", args[0])))
    monkeypatch.setattr(steps, "check_eight_bits", lambda precision, device: begun.append(("check", precision)))
    monkeypatch.setattr(steps, "check_selection", lambda device: begun.append(("check", "selection")))
    monkeypatch.setattr(steps, "check_norm_rope", lambda device: begun.append(("check", "norms")))
    monkeypatch.setattr(steps, "call_suspect", lambda *args: begun.append(("suspect", args[0])))
    monkeypatch.setattr(steps, "architecture", lambda device_type: 90)
    monkeypatch.setattr(steps, "check_cute", lambda kernel, device: begun.append(("check", str(kernel))))

    def distill(config, **options):
        begun.append(("distillation", config))
        raise NotImplementedError

    monkeypatch.setattr(workflow, "distill", distill)
    device = torch.device("cuda")
    listed = card_steps(device)
    assert len({step.name for step in listed}) == len(listed)
    for step in listed[:-1]:
        try:
            step.run(device, lambda result: None)
        except NotImplementedError:
            assert step.part == "distillation"
    kinds = [kind for kind, _ in begun]
    assert kinds.index("check") < kinds.index("suspect") < kinds.index("attention") < kinds.index("generation")
    sizes = [settings.shapes[0].tokens for kind, settings in begun if kind == "attention"]
    assert sizes[0] == 32760 and {45106, 75600} <= set(sizes)
    assert [name for kind, name in begun if kind == "suspect"] == list(suspects.SUSPECTS)
    (video,) = [settings for kind, settings in begun if kind == "generation"]
    assert (video.model, video.frames, video.student_steps) == ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 81, (8, 4))
    assert (video.steps, video.measured_passes, video.random_weights) == (50, 6, True)
    assert video.preset_sparsities == (0.5, 0.7, 0.75, 0.8, 0.9)
    densities = {
        shape: {x.densities[0] for kind, x in begun if kind == "attention" and x.shapes[0] == shape}
        for shape in {settings.shapes[0] for kind, settings in begun if kind == "attention"}
    }
    apart = [settings.tried for kind, settings in begun if kind == "attention"]
    assert apart[:5] == [False] * 5 and apart.count(True) == 4 * len(densities)  # what may crash a card comes later
    assert all(found == {0.1, 0.2, 0.3, 0.5} for found in densities.values())
    (training,) = [settings for kind, settings in begun if kind == "distillation"]
    assert training.run.accumulation == 1 and training.model == video.model


def test_wrong_kernels_are_found(monkeypatch) -> None:
    right = checks.block_sparse_attention

    def bend(q, k, v, mask, **options):
        out, lse = right(q, k, v, mask, **options)
        return out * 1.001, lse

    assert max(checks.check_attention("cpu", CPU, small=True).values()) < checks.FACTOR
    monkeypatch.setattr(checks, "block_sparse_attention", bend)
    with pytest.raises(checks.WrongResultError, match=r"`cpu` is wrong: none, d[qkv] errs"):
        checks.check_attention("cpu", CPU, small=True)
    monkeypatch.setattr(checks, "block_sparse_attention", right)
    assert max(checks.check_eight_bits("int8", CPU).values()) < 1e-5
    with pytest.raises(NotImplementedError, match="the specification alone has 8-bit floats"):
        checks.check_eight_bits("fp8", CPU)

    def full(*tensors, precision, implementation, **options):
        return right(*tensors, precision="int8" if implementation == "naive" else "full", **options)

    monkeypatch.setattr(checks, "block_sparse_attention", full)
    with pytest.raises(checks.WrongResultError, match="`int8` with pooled tokens none differs by"):
        checks.check_eight_bits("int8", CPU)
    select = checks.select_blocks

    def choose(importance, size, *, implementation, **options):
        changed = importance.flip(-1) if implementation == "cpu" else importance
        return select(changed, size, implementation=implementation, **options)

    monkeypatch.setattr(checks, "select_blocks", choose)
    with pytest.raises(checks.WrongResultError, match="blocks by `max` of a budget by row are other ones"):
        checks.check_selection(CPU)
    rope = checks.qk_norm_rope
    monkeypatch.setattr(checks, "qk_norm_rope", lambda x, **o: rope(x, **o) + 1e-3 * (o["implementation"] == "cpu"))
    with pytest.raises(checks.WrongResultError, match="`qk_norm_rope` is wrong"):
        checks.check_norm_rope(CPU)


def report_of(ms: float, card: str = "A card, 80 GB") -> dict[str, Any]:
    case = {
        "tokens": 64, "heads": 1, "head_dim": 16, "batch": 1, "model": None, "grid": None, "density": 0.2,
        "realised_density": 0.2, "auto": "cpu", "sparse": ["cpu"],
        "ms": {"cpu": {"forward": ms}, "math": {"forward": 9.0}},
        "peak_mib": {}, "error": {"cpu": 0.0, "math": 0.0}, "missing": {},
    }  # fmt: skip
    settings = {
        "blocks": "random",
        "passes": ["forward"],
        "device": "cpu",
        "dtype": "float32",
        "block_size": 32,
        "repeats": 1,
    }
    result = {"settings": settings, "machine": {"device": card, "threads": 1}, "cases": [case]}
    return {
        "date": "2026-01-01", "command": "blade-bench gpu", "minutes": 1.0, "machine": {"device": card},
        "versions": {"torch": "2.13"}, "settings": {},
        "steps": [{"name": "x", "part": "attention", "state": "done", "seconds": 1.0, "result": result}],
    }  # fmt: skip


def test_what_got_slower_is_named(tmp_path: Path) -> None:
    write_report(report_of(2.0), report_files(tmp_path, "A card, 80 GB", "2026-01-01-000000"))
    write_report(report_of(1.0, "Another"), report_files(tmp_path, "Another", "2026-01-02-000000"))
    (tmp_path / "a-card-80-gb-2026-01-03.json").write_text("[]")
    found = find_previous(tmp_path, "A card, 80 GB")
    assert found is not None and times(found[1]) == times(report_of(2.0))
    compared = compare(report_of(2.2), found[1], found[0])["compared"]
    (name,) = compared["slower"]
    assert "density 0.2, random: cpu, forward" in name and compared["times"][name] == (2.0, 2.2)
    assert compare(report_of(2.0), found[1], "x")["compared"]["slower"] == []
    page = markdown(compare(report_of(2.2), found[1], found[0]))
    assert f"Slower than in {found[0]}: layer, 64 tokens" in page
    assert find_previous(tmp_path, "None") is None


def test_the_shipped_launch_configuration_stands_beside_the_fastest() -> None:
    config = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3}
    fast = {"kernel": "forward", "config": config, "ms": 2.0, "shipped": False}
    shipped = fast | {"config": config | {"num_stages": 2}, "ms": 2.5, "shipped": True}
    failed = fast | {"kernel": "keys", "ms": None, "shipped": True}
    other = fast | {"kernel": "keys", "ms": 4.0}
    report = report_of(1.0)
    result = {"trials": [fast, shipped, failed, other], "best": {"forward": fast, "keys": other}}
    report["steps"].append({"name": "tuning", "part": "tuning", "state": "done", "seconds": 1.0, "result": result})
    (table,) = [table for table in tables(report) if table.title == "Launch configurations"]
    assert table.rows == [
        ["forward", "128x64, 8 warps, 2 stages", "2.500", "128x64, 8 warps, 3 stages", "2.000"],
        ["keys", "128x64, 8 warps, 3 stages", "failed", "128x64, 8 warps, 3 stages", "4.000"],
    ]
    assert times(report)["forward kernel as shipped"] == 2.5 and "keys kernel as shipped" not in times(report)
    result["trials"], result["best"] = [fast], {"forward": fast}
    assert [table.rows[0][2] for table in tables(report) if table.title == "Launch configurations"] == ["not timed"]


def test_long_layers_have_time_and_few_calls(monkeypatch) -> None:
    monkeypatch.setattr(steps, "architecture", lambda device_type: 90)
    limits = {step.name: step.limit for step in card_steps(torch.device("cuda")) if step.part == "attention"}
    assert limits["Wan-14B 720p, 75,600 tokens, density 0.5"] > limits["Wan-1.3B 480p, 32,760 tokens, density 0.5"]
