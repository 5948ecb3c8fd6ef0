"""Lists of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blade.common.checks import shortened
from blade.common.errors import first_line
from blade.common.reading import parse_json
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
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = first_line(error)
        raise ValueError(f"`prompts` must be a text file with one prompt a line, got {path}: {reason}.") from error
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
    values = parse_json(line, f"a line of `prompts` {path}, {shortened(line)},")
    prompt = values.get("prompt") if isinstance(values, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(
            f"`prompts` must have an object with a `prompt` in each line, but {path} has {shortened(line)}."
        )
    return prompt.strip()
