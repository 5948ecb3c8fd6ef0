"""Lists of prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from blade.common.terminal import logger


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts in a file, without repetitions.

    Args:
        path: a text file, one prompt a line, without empty lines and those that begin with "#"; or, if its name ends
            in .jsonl, a JSON object a line, each with a `prompt`.

    Raises:
        ValueError: if there is no such file, no prompt in it, or a line of JSONL has none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`prompts` must be a text file with one prompt a line, got {path}: {error}.") from error
    lines = [line.strip() for line in lines if line.strip()]
    if Path(path).suffix == ".jsonl":
        prompts = [_prompt_of(line, path) for line in lines]
    else:
        prompts = [line for line in lines if not line.startswith("#")]
    if not prompts:
        raise ValueError(f"`prompts` must be a text file with one prompt a line, but {path} has none.")
    return without_repetitions(prompts)


def without_repetitions(prompts: Sequence[str]) -> list[str]:
    """Return the prompts, each once, and say how many were repeated."""
    different = list(dict.fromkeys(prompts))
    repeated = len(prompts) - len(different)
    if repeated:
        logger.info(f"`prompts`: {repeated} of {len(prompts)} repeat another one and count once")
    return different


def _prompt_of(line: str, path: str | Path) -> str:
    """The prompt in a line of JSONL."""
    try:
        prompt = json.loads(line)["prompt"].strip()
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        prompt = ""
    if not prompt:
        raise ValueError(f"`prompts` must have an object with a `prompt` in each line, but {path} has {line!r}.")
    return str(prompt)
