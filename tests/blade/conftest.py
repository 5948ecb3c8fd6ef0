"""A complete `WanPipeline` of a few thousand random weights, saved in Diffusers format, and temporary modules."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

TINY_SIZE = {"height": 64, "width": 64, "frames": 9}
"""Makes 3 x 8 x 8 = 192 tokens, six blocks of 32."""


def build_tiny_pipeline(head_dim: int = 16, patch_size: tuple[int, int, int] = (1, 1, 1)):
    """Return the pipeline: two layers of two heads, the grammar's tokenizer."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    from blade.moving_shapes.training.components import TEXT_DIM, build_pipeline, build_text_encoder

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = WanTransformer3DModel(
        patch_size=patch_size,
        num_attention_heads=2,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    return build_pipeline(vae.eval(), build_text_encoder().eval(), transformer.eval())


@pytest.fixture(scope="session")
def saved_tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny pipeline, to be read only."""
    path = tmp_path_factory.mktemp("models") / "tiny-wan"
    build_tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def saved_patched_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny pipeline with patches of 2 x 2, so that a video can have an odd number of tokens."""
    path = tmp_path_factory.mktemp("models") / "patched-wan"
    build_tiny_pipeline(patch_size=(1, 2, 2)).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def saved_tiny_ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny pipeline that can start from an image, as that of Wan 2.2 TI2V; to be read only."""
    path = tmp_path_factory.mktemp("models") / "tiny-ti2v"
    pipe = build_tiny_pipeline(patch_size=(1, 2, 2))
    pipe.register_to_config(expand_timesteps=True)
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def quiet_adapters():
    """Ignore what Diffusers and PEFT say of adapters."""
    with warnings.catch_warnings():
        for message in ("Adapter .* was active which is now", "These are a student's values", "Already found a `peft"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


@pytest.fixture
def tiny_pipeline_copy(saved_tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be damaged."""
    return Path(shutil.copytree(saved_tiny_pipeline, tmp_path / "tiny-wan"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that makes a disk of so many KiB; skipped where nothing may be mounted."""
    mounted = []

    def mount(kibibytes: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
        if (
            sys.platform != "linux"
            or os.geteuid()
            or subprocess.run(command, capture_output=True, check=False).returncode
        ):
            pytest.skip("nothing may be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def import_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], ModuleType]]:
    """Return a function that writes a module and imports it; what it declares in tables is gone after the test."""
    from blade.attention.selectors import SELECTORS
    from blade.profiling.objectives import OBJECTIVES
    from blade.token_grid import TOKEN_ORDERS

    folder, tables = tmp_path / "modules", (SELECTORS, OBJECTIVES, TOKEN_ORDERS)
    before, loaded = [dict(table) for table in tables], []
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def load(name: str, source: str) -> ModuleType:
        (folder / f"{name}.py").write_text(source)
        loaded.append(name)
        return importlib.import_module(name)

    yield load
    for name in loaded:
        sys.modules.pop(name, None)
    for table, items in zip(tables, before):
        table.clear()
        table.update(items)


LATER = """
import numpy as np
import torch

from blade.attention.selectors import Selector, register_selector


def draw(generator, heads, options):
    return generator.random(heads, dtype=np.float32)


def prepare(grid, options):
    blocks = -(-grid.sequence_length // options.block_size)
    return torch.arange(blocks) / blocks


def score(query, key, context, drawn, key_lengths):
    places = (context.prepared + drawn.unsqueeze(-1)) % 1  # (H, blocks)
    return places[None, :, None].expand(1, -1, context.blocks, -1)


LATER = Selector(
    name="later",
    description="how late a block stands, from a place that each head draws",
    score=score,
    draw=draw,
    prepare=prepare,
    operations=lambda tokens, heads, head_dim, options: 7.0 * tokens * heads,
    is_control=True,
    colour="#123456",
)
"""
"""A module with a selector."""


@pytest.fixture
def later_selector(import_temporary: Callable[[str, str], ModuleType]) -> Any:
    """The selector of a temporary module, registered."""
    return import_temporary("later_selector", f"{LATER}\nregister_selector(LATER)\n").LATER


HOLDER = """
import sys
from pathlib import Path

from blade.common.locks import folder_locked

with folder_locked(Path(sys.argv[1]), share=(int(sys.argv[2]), int(sys.argv[3]))):
    print("held", flush=True)
    sys.stdin.read()
"""
"""A process that keeps a folder until its input ends."""


@pytest.fixture
def hold() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts a process which holds the lock of a folder; what still runs is killed."""
    started = []

    def run(folder: Path, share: tuple[int, int] = (1, 1)) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), *map(str, share)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
