"""Bad input to `blade-generate`: one line, a non-zero exit, and no file."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from blade.attention.config import BladeConfig
from blade.cli.generate import main
from blade.media.sound import Sound

OK = ("--prompt", "a red ball moving right")
SIZE = ("--height", "64", "--width", "64", "--frames", "9", "--steps", "2", "--device", "cpu")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


class CommandLine:
    """Runs `blade-generate` in this process, with its output in a folder that begins empty."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.output = folder / "video.mp4"
        self.capsys = capsys

    def fails(self, *options: str, code: int = 2) -> str:
        """Run it, check that it fails as it should, and return the error's line."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(["--output", str(self.output), *options])
        captured = self.capsys.readouterr()
        assert exit.value.code == code
        assert captured.out == ""
        # progress bars rewrite their line
        lines = [line for line in captured.err.splitlines() if "it/s" not in line and "s/it" not in line]
        assert "Traceback" not in captured.err
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1 and lines[-1] == errors[0], captured.err
        assert not self.folder.exists() or list(self.folder.iterdir()) == []
        return errors[0]


def refuse_to_load(*args, **options):
    pytest.fail("the model was loaded first")


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(tmp_path / "output", capsys)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--prompt", ""], "`prompt` must say what the video shows"),
        (["--prompt", "  \n"], "`prompt` must say what the video shows"),
        ([], "`--prompt` must be given"),
        ([*OK, "--sparsity", "1"], r"`sparsity` must be in \[0, 1\), got 1.0"),
        ([*OK, "--sparsity", "-0.1"], r"`sparsity` must be in \[0, 1\), got -0.1"),
        ([*OK, "--sparsity", "nan"], r"`sparsity` must be in \[0, 1\), got nan"),
        ([*OK, "--steps", "0"], "`steps` must be an integer of at least 1, got 0"),
        ([*OK, "--steps", "-3"], "`steps` must be an integer of at least 1, got -3"),
        ([*OK, "--frames", "0"], "`frames` must be an integer of at least 1, got 0"),
        ([*OK, "--fps", "0"], "`fps` must be an integer of at least 1, got 0"),
        ([*OK, "--guidance-scale", "inf"], "`guidance_scale` must be at least 0 and finite, got inf"),
        ([*OK, "--seed", "-1"], "`seed` must be an integer from 0"),
        (
            [*OK, "--attention", "flash"],
            '`attention` must be one of "dense", "asa", "asa-gt", "patterns", got .flash',
        ),
        ([*OK, "--attention", "dense", "--sparsity", "0.5"], "`sparsity` must not be given"),
        ([*OK, "--dense-steps", "1.5"], "`dense_steps` must be a count of steps or a fraction"),
        ([*OK, "--dense-layers", "3-1"], "`dense_layers` must be layer numbers"),
        ([*OK, "--dtype", "int8"], '`dtype` must be one of "float32", "bfloat16", "float16", got \'int8\''),
        ([*OK, "--dtype", "float16", "--device", "cpu"], "`dtype` must be float32 or bfloat16 on the CPU"),
        ([*OK, "--device", "abacus"], '`device` must be "cpu", "cuda" or a device'),
        ([*OK, "--device", "meta"], '`device` is "meta", which this PyTorch cannot use'),
        ([*OK, "--model", ""], "`model` must be a folder or a Hub id"),
        ([*OK, "--model", "no-such-model"], "`model` no-such-model is no folder here, and no Hub id"),
        (
            [*OK, "--model", "./no/such/folder"],
            "`model` ./no/such/folder is no folder here, and no Hub",
        ),
        ([*OK, "--revision", "main"], "`revision` must not be given for `model` bundled"),
        ([*OK, "--model", "a/b--c..d"], "`model` a/b--c..d is no folder here, and no Hub id"),
        (
            [*OK, "--config", "no-such-config"],
            "`config` no-such-config is no folder here, and no Hub id",
        ),
        (["--from-json", "no-such.json"], "there is no file no-such.json"),
        ([*OK, "--output", "video.avi"], "`output` must end in .mp4, got video.avi"),
    ],
)
def test_a_request_that_makes_no_sense(command: CommandLine, options: list[str], problem: str) -> None:
    assert re.search(problem, command.fails(*options))


@pytest.mark.parametrize("options", [["--no-such-option"], ["--steps", "many"], ["--prompt"]])
def test_a_command_line_that_makes_no_sense(command: CommandLine, options: list[str]) -> None:
    command.fails(*options)


def test_cuda_where_there_is_none(command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert 'PyTorch finds no CUDA device here; take "cpu"' in command.fails(*OK, "--device", "cuda")


def test_a_cuda_device_beyond_the_last(command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "one of the 2 CUDA devices here" in command.fails(*OK, "--device", "cuda:2")


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (["--height", "100"], "`height` must be a multiple of 16 for this model, got 100; the nearest is 96 or 112."),
        (["--width", "5"], "`width` must be a multiple of 16 for this model, got 5; the nearest is 16."),
        (["--frames", "32"], "`frames` must be 4n + 1 for a whole number n for this model, got 32; the nearest is 29"),
    ],
)
def test_a_size_that_the_model_cannot_take(
    command: CommandLine, saved_tiny_pipeline: Path, size: list[str], problem: str
) -> None:
    assert problem in command.fails(*OK, "--model", str(saved_tiny_pipeline), *SIZE, *size)


def test_a_layer_that_the_model_does_not_have(command: CommandLine, saved_tiny_pipeline: Path) -> None:
    options = [*OK, "--model", str(saved_tiny_pipeline), *SIZE, "--dense-layers", "7"]
    assert re.search(r"`dense_layers` must be .*from 0 to 1.* got \[7\]", command.fails(*options))


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ([], "it has no model_index.json."),
        (["notes.txt"], "it has no model_index.json."),
        (["config.json", "diffusion_pytorch_model.safetensors"], "It looks like a model in its original format"),
        (["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"], "whose name ends in -Diffusers, such as Wan-AI/"),
    ],
)
def test_a_folder_that_is_no_pipeline(command: CommandLine, tmp_path: Path, files: list[str], problem: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in files:
        (folder / name).touch()
    line = command.fails(*OK, "--model", str(folder))
    assert "is no Diffusers pipeline" in line and problem in line


def test_a_model_that_is_a_file(command: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    line = command.fails(*OK, "--model", str(tmp_path / "model.safetensors"))
    assert "must be a folder in Diffusers format or a Hub id, got the file" in line


@pytest.mark.parametrize("content", ["{", "[]", '{"_class_name": "NoSuchPipeline"}'])
def test_a_damaged_index(command: CommandLine, tmp_path: Path, content: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(content)
    line = command.fails(*OK, "--model", str(tmp_path / "model"))
    assert f"`model` {tmp_path / 'model'} cannot be loaded" in line


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_a_corrupt_safetensors_file_is_named(command: CommandLine, tiny_pipeline_copy: Path, component: str) -> None:
    (weights,) = (tiny_pipeline_copy / component).glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    line = command.fails(*OK, "--model", str(tiny_pipeline_copy))
    assert f"{component}/{weights.name} is damaged or incomplete" in line


def test_a_missing_component(command: CommandLine, tiny_pipeline_copy: Path) -> None:
    (tiny_pipeline_copy / WEIGHTS).unlink()
    assert "cannot be loaded" in command.fails(*OK, "--model", str(tiny_pipeline_copy))


def test_a_pipeline_that_starts_from_an_image(command: CommandLine, tiny_pipeline_copy: Path) -> None:
    index = tiny_pipeline_copy / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "WanImageToVideoPipeline"}))
    line = command.fails(*OK, "--model", str(tiny_pipeline_copy))
    assert "`image` must be given: this model is a WanImageToVideoPipeline" in line


@pytest.mark.parametrize("option", ["model", "config"])
def test_an_unknown_hub_id_without_a_network_fails_at_once(
    command: CommandLine, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    if option == "config":
        monkeypatch.setattr(
            "blade.generation.prepare.load_model", lambda *args, **options: pytest.fail("loaded first")
        )
    start = time.perf_counter()
    line = command.fails(*OK, f"--{option}", "nobody-here/nothing")
    assert time.perf_counter() - start < 30  # Diffusers by itself retries for a minute or two
    assert f"`{option}` nobody-here/nothing is no folder here and not in the Hub's local cache" in line
    assert "the Hub cannot be reached" in line


@pytest.mark.parametrize("name", ["file/video.mp4", "/proc/video.mp4", "folder.mp4"])
def test_an_output_that_cannot_be_written(
    command: CommandLine, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blade.generation.prepare.load_model", refuse_to_load)
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    line = command.fails(*OK, "--output", str(tmp_path / name), code=1)
    assert f"`output` {tmp_path / name} " in line


def test_too_little_room_is_found_before_loading(command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blade.generation.prepare.load_model", refuse_to_load)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    line = command.fails(
        *OK, "--model", "nobody/nothing", "--height", "480", "--width", "832", "--frames", "81", code=1
    )
    assert line == f"error: `output` {command.folder} has 100 kB free on its disk, but 1 video(s) needs about 163 kB."


def test_non_finite_latents_name_step_and_layer_and_are_not_decoded(
    command: CommandLine, tiny_pipeline_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKLWan

    monkeypatch.setattr(AutoencoderKLWan, "decode", lambda *args, **options: pytest.fail("decoded"))
    weights = load_file(tiny_pipeline_copy / WEIGHTS)
    weights["blocks.1.ffn.net.2.weight"][0, 0] = torch.inf
    save_file(weights, tiny_pipeline_copy / WEIGHTS, metadata={"format": "pt"})
    line = command.fails(*OK, "--model", str(tiny_pipeline_copy), *SIZE, code=1)
    assert "Non-finite values at step 0, first in the output of layer 1 of `transformer`" in line


def test_a_vae_that_decodes_to_nothing_finite(command: CommandLine, tiny_pipeline_copy: Path) -> None:
    (path,) = (tiny_pipeline_copy / "vae").glob("*.safetensors")
    weights = load_file(path)
    weights["decoder.conv_out.bias"][0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    line = command.fails(*OK, "--model", str(tiny_pipeline_copy), *SIZE, code=1)
    assert "Non-finite values in the decoded video" in line


def test_a_full_disk_during_writing(
    command: CommandLine, saved_tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    line = command.fails(*OK, "--model", str(saved_tiny_pipeline), *SIZE, code=1)
    assert f"No space left: the disk of {command.output.with_suffix('.json')} is full." in line
    assert list(command.output.parent.iterdir()) == []


def test_ctrl_c_during_encoding(
    command: CommandLine, saved_tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blade.generation import outputs

    real = outputs.encode_mp4

    def interrupted(video: torch.Tensor, fps: int, sound: Sound | None) -> bytes:
        def frames():
            yield from video[:3]
            raise KeyboardInterrupt

        return real(frames(), fps, sound)

    monkeypatch.setattr(outputs, "encode_mp4", interrupted)
    line = command.fails(*OK, "--model", str(saved_tiny_pipeline), *SIZE, code=130)
    assert line == "error: interrupted"


def test_an_implementation_that_cannot_compute_this(
    command: CommandLine, saved_tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blade_kernels.block_sparse.flex.missing_cpp_toolchain", lambda: "there is no compiler")
    BladeConfig.from_preset("shapes").save_pretrained(tmp_path / "config")
    path = tmp_path / "config" / "blade_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "implementation": "flex", "dense_steps": 0}))
    options = [*OK, "--model", str(saved_tiny_pipeline), *SIZE, "--config", str(path)]
    assert "cannot compute this" in command.fails(*options, code=1)


def test_debug_shows_the_traceback(command: CommandLine) -> None:
    with pytest.raises(ValueError, match="`prompt` must say"):
        main(["--prompt", "", "--debug"])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object, got []"),
        ('{"steps": 3}', "with a `prompt`"),
        ('{"prompt": "x", "steps": "many"}', "`steps` must be an integer"),
        ('{"prompt": "x", "guidance_scale": "much"}', "`guidance_scale` must be at least 0 and finite, got 'much'"),
        ('{"prompt": "x", "blade_config": {"sparsity": 2}}', "`sparsity` must be in"),
    ],
)
def test_a_record_that_is_none(command: CommandLine, tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(content)
    assert problem in command.fails("--from-json", str(path))


def test_a_comparison_of_dense_with_itself(command: CommandLine, saved_tiny_pipeline: Path) -> None:
    options = [*OK, "--model", str(saved_tiny_pipeline), *SIZE, "--attention", "dense", "--compare"]
    assert "`compare` sets sparse attention beside dense" in command.fails(*options)
