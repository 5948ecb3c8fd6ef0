"""The Python examples in the documents run, with small random pipelines in place of the published ones."""

import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLWan

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
    torch.manual_seed(0)
    exec(compile(code.replace('"cuda"', '"cpu"'), "example", "exec"), {})
    shown = capsys.readouterr().out
    assert "layer density 0." in shown and "run density 0." in shown
    if "cat.mp4" in code:
        assert (tmp_path / "cat.mp4").stat().st_size > 0
