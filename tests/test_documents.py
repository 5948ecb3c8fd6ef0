"""The code in the documents works, with small random pipelines for published ones, and links lead somewhere."""

import configparser
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image

ROOT = Path(__file__).parents[1]
EXAMPLES = [
    pytest.param(code, id=f"{path.name}-{number}")
    for path in (ROOT / "docs" / "models.md", ROOT / "README.md")
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S))
]


@pytest.mark.slow
@pytest.mark.parametrize("code", EXAMPLES)
def test_the_example_runs(small_pipelines, monkeypatch, tmp_path, capsys, code):
    for name, make in small_pipelines.items():
        monkeypatch.setattr(getattr(diffusers, name), "from_pretrained", lambda *_, make=make, **__: make())
    monkeypatch.setattr(AutoencoderKLWan, "from_pretrained", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    for name in (
        "character.png",
        *(f"{folder}/{frame:02}.png" for folder in ("poses", "faces") for frame in range(13)),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (128, 128), "red").save(tmp_path / name)
    torch.manual_seed(0)
    exec(compile(code.replace('"cuda"', '"cpu"'), "example", "exec"), {})
    shown = capsys.readouterr().out
    assert "layer density 0." in shown and "run density 0." in shown
    if "cat.mp4" in code:
        assert (tmp_path / "cat.mp4").stat().st_size > 0


USE_OF_EXTENSIONS = """
from blade import generate
from blade.generation.prepare import prepare_model
from blade.generation.request import GenerationRequest
from blade.metrics.measures import VideoSample
from blade.metrics.registry import choose_measures

small = {"prompt": "a red ball moving right", "height": 96, "width": 96, "frames": 9, "steps": 2}
result = generate(**small, student=None, blade_config=config)
print(result.summary)
(flicker,) = [measure for measure in choose_measures(["flicker"]) if measure.name == "flicker"]
print(flicker.recorded(VideoSample(video=result.video, prompt="")))
model, _ = prepare_model(GenerationRequest(**small, added={"decoder_dtype": "bfloat16"}))
print(model.pipe.vae.dtype)

from blade.cli.generate import main
main(["--help"])
"""
"""What the guide says of its extensions, with the `config` that it makes."""


@pytest.mark.slow
def test_the_extensions_of_the_guide_work_from_a_package(tmp_path: Path) -> None:
    """Its modules, installed as a package with its entry points, are seen by another process."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r'^```(\w+)(?: title="(\S+)")?\n(.*?)^```', text, re.MULTILINE | re.DOTALL)
    modules = {title: code for language, title, code in blocks if title}
    assert set(modules) == {"my_selector.py", "my_measure.py", "my_options.py"}
    for name, code in modules.items():
        (tmp_path / name).write_text(code)
    (declared,) = [code for language, _, code in blocks if language == "toml"]
    entries = configparser.ConfigParser()
    entries.read_dict(tomllib.loads(declared)["project"]["entry-points"])
    information = tmp_path / "theirs-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    with (information / "entry_points.txt").open("w") as file:
        entries.write(file)
    (use,) = [code for language, title, code in blocks if language == "python" and not title]
    path = os.pathsep.join(part for part in (str(tmp_path), os.environ.get("PYTHONPATH")) if part)
    done = subprocess.run(
        [sys.executable, "-c", use + USE_OF_EXTENSIONS],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "120"},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "asa, key-norm selector" in done.stdout
    assert 0.4 < float(re.findall(r"layer density (\S+)", done.stdout)[0]) <= 0.5
    assert float(re.findall(r"{'flicker': (\S+)}", done.stdout)[0]) > 0
    assert "torch.bfloat16" in done.stdout
    assert "─ Decoder ─" in done.stdout and "--decoder-dtype" in done.stdout


def test_links_lead_to_pages_or_to_the_repository() -> None:
    pytest.importorskip("mkdocs")
    hooks = runpy.run_path(str(ROOT / "scripts" / "docs_hooks.py"))
    page_link, absolute_link = hooks["page_link"], hooks["absolute_link"]
    assert page_link("docs/models.md#wan", "index.md") == "models.md#wan"
    assert page_link("CONTRIBUTING.md", "index.md") == "contributing.md"
    assert page_link("../CONTRIBUTING.md#a-release", "extending.md") == "contributing.md#a-release"
    assert page_link("results/flops/flops.md", "models.md") == "results/flops/flops.md"
    assert page_link("../../patterns.md", "results/shapes-patterns/README.md") == "../../patterns.md"
    assert page_link("#below", "models.md") == "#below"
    assert page_link("LICENSE", "index.md") == absolute_link("LICENSE")
    assert page_link("results/flops", "models.md") == absolute_link("docs/results/flops")
    assert page_link("nowhere.md", "models.md") == "nowhere.md"
