"""Packing for a machine without a network, and unpacking there."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MIB = 2**20


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """Files of several sizes in parts of a MiB, and their digests."""
    files = []
    for name, size in (("a.whl", 10), ("b.whl", int(2.7 * MIB)), ("c.whl", 600_000), ("d.whl", 600_000), ("e.whl", 0)):
        files.append(tmp_path / name)
        files[-1].write_bytes(os.urandom(size))
    written = load("pack_offline").pack(files, tmp_path / "packed", MIB)
    assert all(path.stat().st_size <= MIB for path in written)
    assert [path.name for path in written][-2:] == ["contents.json", "unpack.py"]
    return tmp_path / "packed", {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_is_packed_is_there_again(packed, tmp_path) -> None:
    folder, digests = packed
    target = tmp_path / "target"
    target.mkdir()
    load("unpack").unpack(folder, target)
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in target.iterdir()} == digests


@pytest.mark.parametrize("fault", ["missing", "damaged", "another"])
def test_parts_that_are_not_what_was_packed_are_refused(packed, tmp_path, fault) -> None:
    folder, _ = packed
    target, part = tmp_path / "target", folder / "part-01.tar"
    target.mkdir()
    messages = {
        "missing": "lacks part-01.tar",
        "damaged": "is not what was packed; carry the parts again",
        "another": "holds '../evil.whl', which is in no list",
    }
    if fault == "missing":
        part.unlink()
    elif fault == "damaged":
        content = bytearray(part.read_bytes())
        content[2000] ^= 255
        part.write_bytes(content)
    else:
        with tarfile.open(part, "a") as archive:
            archive.add(folder / "contents.json", "../evil.whl")
    with pytest.raises(ValueError, match=messages[fault]):
        load("unpack").unpack(folder, target)
    assert not (tmp_path / "evil.whl").exists()


def test_what_the_machine_has_is_left_out() -> None:
    names = (
        "Torch",
        "triton",
        "nvidia_cublas",
        "nvidia-cuda-runtime",
        "nvidia_cudnn_frontend",
        "diffusers",
        "PyYAML",
        "torchmetrics",
        "blade-video",
    )
    report = {"install": [{"metadata": {"name": name, "version": "1"}} for name in names]}
    needed = load("pack_offline").needed_packages(report)
    assert needed == ["diffusers==1", "nvidia-cudnn-frontend==1", "pyyaml==1", "torchmetrics==1"]


def test_a_folder_that_is_there_is_not_made_an_environment(packed, tmp_path) -> None:
    line = [sys.executable, str(packed[0] / "unpack.py"), "--target", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "`target` must be a new folder" in done.stderr
    (packed[0] / "contents.json").write_text(json.dumps({"parts": 99, "sha256": {}}))
    done = subprocess.run([*line[:-1], str(tmp_path / "new")], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "must hold 99 parts" in done.stderr and not (tmp_path / "new").exists()
