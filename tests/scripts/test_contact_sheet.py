"""`scripts/contact_sheet.py`: a row for every video, and none of them replaced."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from blade.media.video import encode_mp4

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "contact_sheet.py"


@pytest.fixture
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("contact_sheet", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def videos(tmp_path: Path) -> list[Path]:
    """Three videos of one prompt and one file name, in folders of their own."""
    paths = []
    for number in range(3):
        path = tmp_path / f"{number}" / "a-cat-0.mp4"
        path.parent.mkdir()
        path.write_bytes(encode_mp4(torch.full((2, 3, 32, 32), number / 3), 8))
        path.with_suffix(".json").write_text(json.dumps({"prompt": "a cat"}))
        paths.append(path)
    return paths


def test_videos_of_one_prompt_and_one_name_all_have_a_row(script, videos, tmp_path, monkeypatch) -> None:
    rows: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(script, "contact_sheet", lambda shown, columns: rows.update(shown) or torch.zeros(3, 8, 8))
    script.main(videos, tmp_path / "sheet.png", columns=1, fps=8)
    assert list(rows) == ["a cat", f"a cat ({videos[1]})", f"a cat ({videos[2]})"]


def test_a_video_is_not_replaced_by_its_picture(script, videos) -> None:
    before = videos[1].read_bytes()
    with pytest.raises(ValueError, match=r"`output` must not replace an input, got .*, which is `videos`"):
        script.main(videos, videos[1], columns=1, fps=8)
    assert videos[1].read_bytes() == before
