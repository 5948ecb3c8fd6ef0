"""Files of tensors that say which prompts they are of, so that those of others are made again."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from blade.common.errors import first_line
from blade.common.terminal import logger

PROMPTS_KEY = "prompts"
"""Entry of a file's metadata with its prompts."""


def written_prompts(path: Path) -> str | None:
    """Return what a file says of its prompts; None if it is missing, or, with a warning, if it cannot be read."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        logger.warning(f"{path} cannot be read, and is made again: {first_line(error)}")
        return None
    return metadata.get(PROMPTS_KEY)
