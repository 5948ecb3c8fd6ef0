"""`blade-profile`: what it writes, what it says, and what it refuses."""

import re

import numpy as np
import pytest
import torch

from blade import BladeConfig
from blade.attention.patterns import HeadPattern, pattern_blocks
from blade.cli import generate as generate_command
from blade.cli.profile import main
from blade.moving_shapes.captions import HELD_OUT, parse_caption
from blade.profiling.prompts import profile_prompts
from blade.profiling.report_data import explained_mass, mask_cells


@pytest.fixture
def arguments(saved_tiny_pipeline, tmp_path):
    """Of a profile of the tiny pipeline, without its budget."""
    (tmp_path / "prompts.txt").write_text("a red ball moving right\n\n# a comment\na blue square moving up\n")
    size = ["--height", "64", "--width", "64", "--frames", "9", "--steps", "3", "--guidance-scale", "2"]
    files = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "profile")]
    return ["--model", str(saved_tiny_pipeline), "--device", "cpu", "--influence-prompts", "0", *size, *files]


@pytest.mark.slow
def test_it_writes_a_table_that_generates_and_a_report(arguments, tmp_path, capsys, saved_tiny_pipeline):
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--target-density", "0.6"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0, printed
    folder = tmp_path / "profile"
    for name in ("attention_profile.safetensors", "blade_config.json", "pattern_table.json", "report.html"):
        assert (folder / name).is_file(), name
    for word in ("patterns", "density", "error", "verified", "asa", str(folder / "report.html")):
        assert word in printed
    report = (folder / "report.html").read_text()
    assert "target density 0.6" in report and "a blue square moving up" in report
    assert "http://" not in report.replace("http://www.w3.org", "") and "https://" not in report
    video = tmp_path / "video.mp4"
    size = ["--height", "64", "--width", "64", "--frames", "9", "--guidance-scale", "2", "--device", "cpu"]
    same = ["--prompt", "a red ball moving right", "--model", str(saved_tiny_pipeline), "--config", str(folder), *size]
    with pytest.raises(SystemExit) as ended:
        generate_command.main([*same, "--steps", "3", "--output", str(video)])
    assert ended.value.code == 0 and video.is_file()
    with pytest.raises(SystemExit) as ended:  # of another number of steps
        generate_command.main([*same, "--steps", "4", "--output", str(tmp_path / "other.mp4")])
    assert ended.value.code == 2 and "4 steps, not 3" in capsys.readouterr().err
    assert BladeConfig.from_pretrained(folder).patterns.steps == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--groups", "4"], "`groups` must be at most the number of steps, which is 3, got 4"),
        (["--groups", "0"], "`groups` must be an integer of at least 1, got 0"),
    ],
)
def test_groups_that_there_are_no_steps_for_are_refused_before_the_model_runs(
    arguments, options, message, monkeypatch, capsys
):
    monkeypatch.setattr("blade.profiling.workflow.record_profile", lambda *given: pytest.fail("recorded"))
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--target-density", "0.6", *options])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_prompts_that_the_bundled_model_cannot_draw_are_refused_before_it_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("blade.generation.prepare.load_model", lambda *given, **options: pytest.fail("loaded"))
    (tmp_path / "prompts.txt").write_text("a red ball moving right\na cat\n")
    files = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "profile")]
    with pytest.raises(SystemExit) as ended:
        main(["--target-density", "0.6", *files])
    assert ended.value.code == 2 and '"cat"' in capsys.readouterr().err


DECLARED = """
import numpy as np

from blade.profiling.assignment import least_error
from blade.profiling.objectives import Objective, register_objective
from blade.token_grid import TokenOrder, raster_order, register_token_order


def foresee(costs, cost):
    if cost > costs.candidates.max():
        raise ValueError(f"`max_cost` must be at most {costs.candidates.max():.3g}, got {cost}.")


register_objective(
    Objective(
        name="max_cost",
        bounds="cost of attention, as a share of dense attention's",
        wanted="above 0",
        is_valid=lambda cost: cost > 0,
        meet=lambda problem, cost: least_error(problem.errors, problem.costs, cost),
        report="attention's cost at most {:g}",
        foresee=foresee,
    )
)
register_token_order(TokenOrder("reversed", lambda *size: raster_order(*size)[::-1].copy()))
"""


def run(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def test_an_objective_and_an_order_of_a_temporary_module(import_temporary, arguments, tmp_path, capsys):
    import_temporary("declared", DECLARED)
    assert run(["--help"]) == 0
    assert "--max-cost" in capsys.readouterr().out
    assert run([*arguments, "--max-cost", "7"]) == 2
    assert "`max_cost` must be at most 1, got 7" in capsys.readouterr().err
    assert not list(tmp_path.rglob("prompt-*"))  # said before anything is measured
    assert run([*arguments, "--max-cost", "0.6", "--verify-prompts", "0"]) == 0
    (cost,) = re.findall(r"attention costs (\S+) of dense", capsys.readouterr().out)
    assert 0.5 < float(cost) <= 0.6
    report = (tmp_path / "profile" / "report.html").read_text()
    assert "are computed (attention&#39;s cost at most 0.6)" in report
    orders = re.findall(r'<th scope="col" class="number">(\S+)</th>', report.split('id="order-densities"')[1])
    assert orders == ["raster", "token-major", "gilbert", "reversed", "bricks(2,4,4)"]
    assert run([*arguments, "--max-cost", "0"]) == run([*arguments, "--max-cost", "1", "--max-error", "1"]) == 2
    messages = capsys.readouterr().err
    assert "`max_cost` must be above 0, got 0.0" in messages and "got `max_error` and `max_cost`" in messages


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "one of `target_density`, `target_speedup` and `max_error` must be given, got none"),
        (["--target-density", "0.5", "--max-error", "0.1"], "got `target_density` and `max_error`"),
        (["--target-density", "1.5"], r"`target_density` must be in \(0, 1\], got 1.5"),
        (
            ["--target-speedup", "50"],
            r"`target_speedup` must be at most 1\.\d+ here, where attention is \d+% of a step",
        ),
        (["--target-density", "0.5", "--groups", "4"], "`groups` must be at most the number of steps, which is 3"),
        (["--target-density", "0.5", "--method", "best"], "`method` must be one of budgeted, published, got 'best'"),
        (["--target-density", "0.5", "--sampled-blocks", "-1"], "`sampled_blocks` must be an integer of at least 1"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, more, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *more])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and re.search(message, lines[0]), error


def test_a_profile_does_not_replace_its_model(arguments, tiny_pipeline_copy, capsys):
    before = sorted(path.name for path in tiny_pipeline_copy.rglob("*"))
    folder = f"--output={tiny_pipeline_copy}"
    assert run([*arguments, f"--model={tiny_pipeline_copy}", folder, "--target-density", "0.6"]) == 2
    assert f"`output` must not replace an input, got {tiny_pipeline_copy}, which is `model`" in capsys.readouterr().err
    assert sorted(path.name for path in tiny_pipeline_copy.rglob("*")) == before


def test_prompt_files_are_read_and_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffein roter Ball\r\n\r\n  noch einer \n".encode())
    assert profile_prompts(path, None) == ("ein roter Ball", "noch einer")
    path.write_bytes("ein gr\xfcner Ball\n".encode("latin-1"))
    with pytest.raises(ValueError, match="`prompts` must be a text file with one prompt a line"):
        profile_prompts(path, None)
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="has none"):
        profile_prompts(path, None)
    with pytest.raises(ValueError, match="`prompts` must be a text file with a few prompts for some/model"):
        profile_prompts(None, "some/model")
    own = profile_prompts(None, None)
    assert len(set(own)) == 8 and all(parse_caption(prompt).objects[0].combination not in HELD_OUT for prompt in own)


def test_masks_are_drawn_in_the_models_order(make_profile):
    source = make_profile().source
    grid, tokens = source.grid, source.grid.sequence_length
    own = HeadPattern(kind="multi-diagonal", frames=0.6, order="token-major")
    cells = mask_cells(own, source, 7)
    keep = pattern_blocks(own, grid, 16, "raster")
    places = torch.arange(tokens)
    video = grid.inverse_order("token-major") + grid.video_start
    places[grid.video_start : grid.video_stop] = video
    seen = keep[places // 16][:, places // 16].double()
    cell = torch.arange(tokens) // 16 * 7 // len(keep)
    for row, column in ((0, 0), (2, 5), (6, 3)):
        patch = seen[cell == row][:, cell == column].mean()
        assert cells[row, column] == round(255 * float(patch))


def test_explained_mass_is_the_best_patterns(make_profile):
    profile = make_profile()
    kinds, explained = explained_mass(profile)
    assert kinds == ("multi-diagonal", "vertical") or set(kinds) <= {"diagonal", "multi-diagonal", "vertical"}
    place = kinds.index("vertical")
    assert explained[place, 2, 3] == pytest.approx(profile.mass[3, 2, 4].mean())
    assert explained.shape == (len(kinds), 3, 6) and np.isfinite(explained).all()
