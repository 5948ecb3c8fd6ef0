"""Damaged files, read as the commands read them: accepted, or refused in one line."""

from __future__ import annotations

import json
import logging
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from blade import BladeConfig
from blade.attention.pattern_table import TABLE_NAME, PatternTable
from blade.common.checks import shortened
from blade.common.files import read_json_lines
from blade.distillation.recipes import load_config
from blade.generation.prompts import read_prompts
from blade.generation.record import read_request
from blade.generation.request import GenerationRequest
from blade.students.source import bundled_student_path, student_settings

SECONDS = 20
"""Time in which a file of a few kilobytes must have been read."""

NASTY = (
    "null", "true", "false", "-1", "0", "1e400", "NaN", "-Infinity", "1" + "0" * 400, '""', '"nan"', '"0-99999999999"',
    "[]", "{}", "[" * 3000 + "]" * 3000, '{"a": 1}', '"\\u0000"', '"${oc.env:HOME}"', "[[1]]", "3.5",
)  # fmt: skip
"""Values that take the place of others."""


@dataclass(frozen=True)
class Readable:
    """A file that a command reads."""

    name: str
    path: Path
    read: Callable[[Path], Any]
    taken: Callable[[Any], Any]
    """Return the values that were read as the file would hold them."""
    whole: bool = True
    """Every value of the file must have been taken; otherwise those alone that `taken` has."""


def readable_files(folder: Path, record: Path) -> list[Readable]:
    """Make a file of every kind in a folder.

    Args:
        folder: the folder.
        record: a record of `blade-generate`.
    """
    from blade.attention.pattern_table import uniform_table
    from blade.attention.patterns import HeadPattern

    folder.mkdir(parents=True)
    BladeConfig(sparsity=0.6, dense_layers="0-1").save_pretrained(folder)
    student = folder / "student"
    shutil.copytree(bundled_student_path("shapes-8-steps"), student)
    table = uniform_table(HeadPattern(kind="diagonal", frames=1.0), layers=2, heads=2, block_size=16)
    table.save(folder / TABLE_NAME)
    (folder / "recipe.yaml").write_bytes((student / "distillation.yaml").read_bytes())
    (folder / "record.json").write_bytes(record.read_bytes())
    (folder / "prompts.txt").write_text("a red ball\n# a comment\na blue square\n", encoding="utf-8")
    (folder / "lines.jsonl").write_text('{"a": 1}\n{"b": [2, 3]}\n', encoding="utf-8")
    return [
        Readable(
            "configuration", folder / "blade_config.json", lambda path: BladeConfig.from_pretrained(path),
            BladeConfig.to_dict,
        ),
        Readable("pattern table", folder / TABLE_NAME, PatternTable.load, PatternTable.to_dict),
        Readable("record", folder / "record.json", lambda path: read_request(path, {}), request_values, whole=False),
        Readable("recipe", folder / "recipe.yaml", lambda path: load_config(path), asdict),
        Readable(
            "scheduler", student / "scheduler" / "scheduler_config.json", lambda path: student_settings(student),
            lambda settings: {"noise_kept": settings.noise_kept}, whole=False,
        ),
        Readable("prompts", folder / "prompts.txt", read_prompts, list),
        Readable("JSON lines", folder / "lines.jsonl", read_json_lines, list),
    ]  # fmt: skip


def request_values(request: GenerationRequest) -> dict[str, Any]:
    """Return the fields of a request as a record has them."""
    values = {item.name: getattr(request, item.name) for item in fields(request)}
    config = values.pop("blade_config")
    return values | ({} if config is None else {"blade_config": config.to_dict()})


def said(path: Path) -> Any:
    """Return what a file says to a reader that accepts all there is."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return yaml.safe_load(text)
    if path.suffix == ".json":
        return json.loads(text)
    lines = [line.strip() for line in text.splitlines()]
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in lines]
    return [line for line in lines if line and not line.startswith("#")]


def passed_over(values: Any, taken: Any, whole: bool, place: str = "the file") -> str | None:
    """Say where what was taken from a file is not what the file says; None: nowhere."""
    if isinstance(values, dict) and isinstance(taken, dict):
        names = values if whole else values.keys() & taken
        nothing = object()
        found = (passed_over(values[name], taken.get(name, nothing), whole, f"{place}.{name}") for name in names)
        return next(filter(None, found), None)
    if isinstance(values, list) and isinstance(taken, list | tuple) and len(values) == len(taken):
        found = (passed_over(*pair, whole, f"{place}[]") for pair in zip(values, taken, strict=True))
        return next(filter(None, found), None)
    if values is None and not whole:  # as good as not given
        return None
    as_text = isinstance(values, int) and not isinstance(values, bool) and isinstance(taken, str)
    same = (str(values) if as_text else values) == taken and isinstance(values, bool) == isinstance(taken, bool)
    return None if same else f"{place} says {shortened(values)}, but {shortened(taken)} was taken"


@contextmanager
def what_is_told() -> Iterator[list[Any]]:
    """Yield the warnings and logged messages of a block, which are not shown."""
    told: list[Any] = []
    handler = logging.Handler()
    handler.emit = told.append  # type: ignore[method-assign]
    log = logging.getLogger("blade")
    propagate, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield told
        told.extend(warned)
    finally:
        log.removeHandler(handler)
        log.propagate = propagate


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Return a file's content with something wrong in it, most often one value."""
    kind = chance.choice(("value", "value", "value", "bytes", "cut", "doubled"))
    if kind == "value" and (places := [*_value_places(content)]):
        start, stop = chance.choice(places)
        return content[:start] + chance.choice(NASTY).encode() + content[stop:]
    if kind == "cut":
        return content[: chance.randrange(len(content))]
    if kind == "doubled":
        start = chance.randrange(len(content))
        return content[:start] + content[start // 2 :]
    altered = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        altered[chance.randrange(len(altered))] = chance.randrange(256)
    return bytes(altered)


def _value_places(content: bytes) -> Iterator[tuple[int, int]]:
    """Yield where values stand in JSON or YAML: behind a colon, up to the end of the line or to the next comma."""
    start = content.find(b": ")
    while start >= 0:
        line_end = content.find(b"\n", start)
        stop = len(content) if line_end < 0 else line_end
        if content[stop - 1 : stop] == b",":
            stop -= 1
        yield start + 2, stop
        start = content.find(b": ", start + 2)


def fault_of(file: Readable, content: bytes) -> tuple[str, str] | None:
    """Read a damaged file, and return the kind of fault with which it was taken, and more about it; None: none."""

    def out_of_time(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = file.path.read_bytes()
    file.path.write_bytes(content)
    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(SECONDS)
    try:
        with what_is_told() as told:
            taken = file.taken(file.read(file.path))
        difference = None if told else passed_over(said(file.path), taken, file.whole)
        return ("silent acceptance", difference) if difference else None
    except TimeoutError:
        return "wrong end", f"took more than {SECONDS} s"
    except (ValueError, OSError) as error:
        message = str(error)
        if "\n" in message.strip() or not message.strip():
            return "wrong end", f"{type(error).__name__} of {len(message.splitlines())} lines: {message[:200]!r}"
        long = f"a message of {len(message)} characters: {message[:200]!r}"
        return None if len(message) < 600 else ("wrong end", long)
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {str(error)[:200]!r}"
    finally:
        signal.alarm(0)
        file.path.write_bytes(before)


def describe(content: bytes) -> str:
    """Return the beginning of a file's content on one line."""
    return json.dumps(content[:400].decode(errors="replace"))
