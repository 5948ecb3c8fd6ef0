"""The local files that a request names, and a mark of their state."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from blade.generation.request import GenerationRequest
from blade.models.choices import parse_lora, parse_transformer, split_sources

FILE_FIELDS = ("image", "last_image", "video", "model", "config", "decoder_weights")
"""Fields of a request that may name a file or folder here."""

DECISIVE = ("*.safetensors", "*.bin", "*config.json")
"""Files in a folder of a model, student or LoRA that decide a video."""


def input_paths(request: GenerationRequest) -> dict[Path, str]:
    """Return the files and folders here that a request names, with the options that name them."""
    named = [(getattr(request, field), field) for field in FILE_FIELDS]
    named += [(source, "student") for source in split_sources(request.student or "") or ()]
    if request.transformer is not None:
        named += [(source, "transformer") for source in parse_transformer(request.transformer)]
    named += [(source, "loras") for lora in request.loras for source in parse_lora(lora).sources]
    paths = {os.path.expanduser(source): field for source, field in named if source is not None}
    return {Path(path): field for path, field in paths.items() if os.path.exists(path)}


def input_state(request: GenerationRequest) -> str | None:
    """Return 12 hexadecimal digits that change when a file that a request names is replaced; None if it names none.

    Sizes and dates stand for the contents, since reading a large model would take longer than many a generation.
    """
    digest, paths = hashlib.sha256(), sorted(input_paths(request))
    for path in paths:
        for item in _decisive_files(path):
            try:
                state = item.stat()
            except OSError:  # a training replaces it right now
                continue
            digest.update(f"{item.resolve()} {state.st_size} {state.st_mtime_ns}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()[:12] if paths else None


def _decisive_files(path: Path) -> list[Path]:
    """Return a file itself, or the files in a folder that count, without hidden ones, which are being written."""
    if not path.is_dir():
        return [path]
    found = [item for pattern in DECISIVE for item in path.rglob(pattern)]
    return sorted(item for item in found if not any(part[0] == "." for part in item.relative_to(path).parts))
