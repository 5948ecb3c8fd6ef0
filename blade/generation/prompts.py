"""Lists of prompts, and the file names that prompts give."""

from __future__ import annotations

import json
import re
from pathlib import Path


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
    return list(dict.fromkeys(prompts))


def _prompt_of(line: str, path: str | Path) -> str:
    """The prompt in a line of JSONL."""
    try:
        prompt = json.loads(line)["prompt"].strip()
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        prompt = ""
    if not prompt:
        raise ValueError(f"`prompts` must have an object with a `prompt` in each line, but {path} has {line!r}.")
    return str(prompt)


def file_stem(prompt: str) -> str:
    """Return the beginning of a prompt as it can stand in a file's name: lower case, words joined by hyphens."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:80] or "video"
