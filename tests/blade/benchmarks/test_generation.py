import json
from dataclasses import replace

import pytest
import torch

from blade.attention.applied import applied_to
from blade.benchmarks.generation import PARTS, GenerationBenchmark, run_generation_benchmark
from blade.benchmarks.generation_report import tables, write_report
from blade.cli.bench import main
from blade.metrics import timing
from blade.models.loading import load_empty_model

QUICK = GenerationBenchmark(
    random_weights=True, height=128, width=128, frames=13, steps=2, student_steps=(1,), repeats=1, device="cpu"
)
"""4 x 8 x 8 = 256 tokens."""


LISTS = {"student_steps": [1], "preset_sparsities": [0.4]}
"""Settings that JSON has as lists."""

NAMES = ("WanPipeline", "CogVideoXPipeline", "HunyuanVideoPipeline", "HunyuanVideo15Pipeline", "LTX2Pipeline")
PASSES = {"HunyuanVideoPipeline": 1, "LTX2Pipeline": 4}
"""Forward passes of a step with guidance, where they are not two: it is an input, or there are further kinds of it."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_measured_from_its_configuration(name, configurations):
    stages = []
    settings = replace(QUICK, model=str(configurations(name)), sparsity=0.4, preset_sparsities=(0.4,))
    report = run_generation_benchmark(settings, command="the command", on_stage=stages.append)
    assert json.loads(json.dumps(report)) == report | {"settings": report["settings"] | LISTS}
    passes = 2 * PASSES.get(name, 2)
    found = [(run["run"], run["steps"], run["passes"], run["measured_passes"]) for run in report["runs"]]
    assert found == [
        ("dense, guidance", 2, passes, passes),
        ("sparse, guidance", 2, passes, passes),
        ("sparse", 1, 1, 1),
    ]
    for run in report["runs"]:
        assert run["seconds"] == pytest.approx(run["transformer_seconds"] + report["decoding_seconds"])
    dense, _, student = report["runs"]
    assert report["encoding_seconds"] is None and report["unmeasured"]["text encoder"].endswith("has no text encoder")
    assert report["preset_pass_ms"].keys() == {"0.4"}
    assert dense["factor"] == 1.0 and student["factor"] == pytest.approx(dense["seconds"] / student["seconds"])
    assert report["config"]["sparsity"] == 0.4 and report["config"]["dense_layers"] == []
    assert report["config"]["asa"]["cumulative_mass"] is None
    assert set(report["parts_ms"]) == set(PARTS) - {"communication"}
    assert all(
        report["parts_ms"][part] > 0 for part in ("block selection", "norms and RoPE", "linear layers", "other")
    )
    assert report["backend"] in report["dense_attention_ms"] and "flash" in report["missing"]
    if name.startswith("HunyuanVideo"):
        assert report["backend"] == "native"  # its mask is more than flash attention takes
    assert stages[0] == "building the model" and stages[-2:] == ["sparse, 1 steps", "preset, sparsity 0.4"]


def test_nothing_stays_on_the_transformer(configurations, monkeypatch):
    made = []

    def load(*args, **options):
        made.append(load_empty_model(*args, **options))
        return made[0]

    monkeypatch.setattr("blade.benchmarks.generation.load_empty_model", load)
    run_generation_benchmark(replace(QUICK, model=str(configurations("WanPipeline"))))
    (transformer,) = (model.transformer for model in made)
    assert applied_to(transformer) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())


def test_one_transformer_alone_gets_random_weights(configurations):
    folder = configurations("WanPipeline", second_transformer=True)
    pipe = load_empty_model(folder, random_weights_on=torch.device("cpu"), dtype=torch.bfloat16).pipe
    assert {part.device.type for part in (pipe.transformer, pipe.vae)} == {"cpu"}
    assert pipe.transformer_2.device.type == "meta" and pipe.transformer.dtype == torch.bfloat16
    assert next(pipe.vae.parameters()).dtype == torch.float32 and torch.get_default_dtype() == torch.float32
    assert pipe.transformer.patch_embedding.weight.std() > 0
    assert torch.equal(pipe.transformer.rope.freqs_cos[0], torch.ones_like(pipe.transformer.rope.freqs_cos[0]))


def test_a_models_own_weights_are_measured_too(saved_tiny_pipeline):
    report = run_generation_benchmark(
        replace(QUICK, model=str(saved_tiny_pipeline), random_weights=False, measured_passes=1, height=64, width=64)
    )
    dense = report["runs"][0]
    assert (dense["passes"], dense["measured_passes"]) == (4, 1)
    assert dense["transformer_seconds"] == pytest.approx(4 * report["pass_ms"]["dense"] / 1e3)
    (runs, parts, *_) = tables(report)
    assert runs.rows[0][:3] == ["dense, guidance", "2", "4 (1)"] and parts.rows[-1][0].startswith("the bound")


def test_the_bound_follows_from_what_was_measured(configurations):
    report = run_generation_benchmark(replace(QUICK, model=str(configurations("WanPipeline"))))
    attention = report["layers"] * min(report["dense_attention_ms"].values())
    rest = report["pass_ms"]["dense"] - attention
    bound = rest + attention * report["density"] / 0.85 + report["parts_ms"]["block selection"]
    assert report["bound_ms"] == pytest.approx(1.1 * bound)
    limit = report["runs"][0]["seconds"] / (rest * 4 / 1e3 + report["decoding_seconds"])
    assert report["runs"][1]["limit"] == pytest.approx(limit)


@pytest.mark.parametrize("random_weights", [True, False])
def test_texts_are_encoded(random_weights):
    """Two with guidance, by an encoder that is made anew where there are no weights."""
    small = {"height": 64, "width": 64, "frames": 9, "steps": 1, "sparsity": 0.5, "preset_sparsities": (0.5,)}
    report = run_generation_benchmark(replace(QUICK, random_weights=random_weights, **small))
    dense, sparse, student = report["runs"]
    assert report["encoding_seconds"] == student["encoding_seconds"] > 0
    assert dense["encoding_seconds"] == sparse["encoding_seconds"] == 2 * student["encoding_seconds"]
    for run in report["runs"]:
        rest = run["encoding_seconds"] + report["decoding_seconds"]
        assert run["seconds"] == pytest.approx(run["transformer_seconds"] + rest)
    runs, parts, *_ = tables(report)
    assert runs.rows[0][3] == f"{dense['encoding_seconds']:.2f}"
    assert any(row[0] == "a pass with the preset, sparsity 0.5" for row in parts.rows)


def test_a_text_encoder_that_does_not_fit_is_left_out(configurations, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 11 GiB")

    monkeypatch.setattr("blade.benchmarks.generation.time_encoding", fail)
    report = run_generation_benchmark(replace(QUICK, model=str(configurations("WanPipeline"))))
    assert report["encoding_seconds"] is None and report["unmeasured"]["text encoder"].startswith("CUDA out of memory")
    assert tables(report)[0].rows[0][3] == "not measured"
    for run in report["runs"]:
        assert run["seconds"] == pytest.approx(run["transformer_seconds"] + report["decoding_seconds"])


def test_the_command_writes_its_report(configurations, tmp_path, capsys):
    arguments = ["generate", "--model", str(configurations("WanPipeline")), "--random-weights", "--device", "cpu"]
    arguments += ["--height", "128", "--width", "128", "--frames", "13", "--steps", "1", "--student-steps", "1"]
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--repeats", "1", "--output", str(tmp_path / "out")])
    assert "A sparse pass by part" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "generation.json").read_text())
    page = (tmp_path / "out" / "generation.md").read_text()
    assert report["tokens"] == 256 and "256 tokens, 3 layers of 2 heads" in page and "random weights" in page
    assert write_report(report, tmp_path / "again")[1].read_text() == page


@pytest.mark.parametrize(
    ("command", "measures"),
    [("generate", "generation.run_generation_benchmark"), ("attention", "attention.run_attention_benchmark")],
)
def test_a_folder_that_cannot_be_written_is_found_before_anything_is_measured(
    command, measures, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(f"blade.benchmarks.{measures}", lambda *given, **options: pytest.fail("measured"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main([command, "--device", "cpu", "--output", str(tmp_path / "file")])
    assert ended.value.code == 1 and "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pooled-tokens", "some"], "`pooled_tokens` must be none, all or dropped, got 'some'"),
        (["--measured-passes", "0"], "`measured_passes` must be at least 1, got 0"),
        (["--student-steps", "8,x"], "`student_steps` must be numbers separated by commas, got '8,x'"),
        (["--student-steps", "0"], "`student_steps` must be counts of at least 1"),
        (["--height", "100"], "`height` must be a multiple of 16"),
        (["--sparsity", "0"], "`sparsity` must leave out a block, got 0.0 of 1,296 tokens in blocks of 32"),
        (["--sparsity", "1.5"], "`sparsity` must be in [0, 1), got 1.5"),
    ],
)
def test_bad_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--random-weights", "--device", "cpu", *arguments])
    assert message in capsys.readouterr().err


def test_a_region_inside_another_is_not_counted_twice(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 7.0, 20.0, 21.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    watch = timing.Stopwatch("cpu")
    with watch.region("outer"), watch.region("inner"):
        pass
    with watch.region("outer"):
        pass
    assert watch.milliseconds() == {"outer": 1000.0 + 4000.0 + 1000.0, "inner": 2000.0}


def test_diffusers_own_backend_is_as_before(configurations, monkeypatch):
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    monkeypatch.setattr("blade.benchmarks.generation.BACKENDS", ("_native_flash",))
    before = _AttentionBackendRegistry.get_active_backend()[0]
    report = run_generation_benchmark(replace(QUICK, model=str(configurations("WanPipeline")), sparsity=0.4))
    assert report["backend"] == "_native_flash" and before != "_native_flash"
    assert _AttentionBackendRegistry.get_active_backend()[0] == before
