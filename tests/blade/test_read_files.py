"""Files that BLADE reads, with any value replaced by another: taken, or refused in a line that names a field."""

import json
import random
import re
import string
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import blade
from blade import BladeConfig, TokenGrid
from blade.attention.pattern_table import PatternTable
from blade.attention.patterns import HeadPattern, Window
from blade.common.reading import parse_json
from blade.distillation.config import DistillationConfig
from blade.distillation.recipes import load_config
from blade.evaluation.records import check_record
from blade.generation.prompts import read_prompts
from blade.generation.record import read_request
from blade.profiling.profile import ProfileSource
from blade.students.source import StudentFiles

TABLE = PatternTable(
    patterns=(
        HeadPattern(kind="full"),
        HeadPattern(kind="vertical", share=0.5),
        HeadPattern(kind="window", windows={"frame": Window(width=2, stride=3)}),
    ),
    assignment=[[[0, 1], [2, 1]], [[1, 1], [0, 0]]],
    block_size=32,
    group_starts=(0, 2),
    steps=4,
    grid=TokenGrid(3, 4, 4),
    model="a model",
).to_dict()

RECORD = {
    "prompt": "a red ball moving right",
    "model": "bundled",
    "loras": ["style.safetensors=0.5"],
    "height": 64,
    "width": 64,
    "frames": 16,
    "fps": 8,
    "steps": 8,
    "seed": 3,
    "guidance_scale": 1.0,
    "flow_shift": 3.0,
    "negative_prompt": "",
    "student": "shapes-8-steps",
    "scheduler": "999,749,499",
    "noise_kept": 1.0,
    "device": "cpu",
    "dtype": "float32",
    "offload": "none",
    "cache": "first-block=0.1",
    "compile": False,
    "vae_tiling": False,
    "decoder": "tiny",
    "decoder_weights": "taew2_1.safetensors",
    "added": {},
    "blade_config": BladeConfig(sparsity=0.5).to_dict(),
}

PROFILE = ProfileSource(
    model="a model",
    prompts=("a",),
    seeds=(0,),
    steps=4,
    guidance_scale=1.0,
    video=(9, 64, 64),
    grid=TokenGrid(3, 4, 4),
    block_size=32,
    token_order="raster",
    candidates=(HeadPattern(kind="full"), HeadPattern(kind="skip")),
    densities=(1.0, 0.0),
    adaptive=(BladeConfig(),),
    adaptive_densities=(0.5,),
).to_dict()

SCHEDULER = {
    "_class_name": "FewStepScheduler",
    "grids": [[999.0, 749.0, 499.0, 249.0]],
    "prediction_type": "flow_prediction",
    "noise_kept": 1.0,
    "num_train_timesteps": 1000,
}

EVALUATED = {
    "run": {"name": "dense", "steps": 8},
    "prompt": "a ball",
    "seed": 0,
    "blade_config": None,
    "seconds": 1.0,
    "psnr": 30.0,
    "psnr_by_frame": [30.0, 31.0],
    "machine": {"device": "cpu"},
    "versions": {"torch": "2"},
}


def _record(values: Any, folder: Path) -> Any:
    (folder / "record.json").write_text(json.dumps(values))
    return read_request(folder / "record.json")


def test_a_record_needs_a_prompt(tmp_path: Path) -> None:
    for values in ({}, {"prompt": None}, {"seed": 3, "prompt": None}):
        with pytest.raises(
            ValueError, match=r"`from_json` must be the JSON beside a video, with a `prompt`; .* has none"
        ):
            _record(values, tmp_path)


def _config(values: Any, folder: Path) -> Any:
    (folder / "blade_config.json").write_text(json.dumps(values))
    return BladeConfig.from_pretrained(folder)


def _table(values: Any, folder: Path) -> Any:
    (folder / "table.json").write_text(json.dumps(values))
    return PatternTable.load(folder / "table.json")


def _recipe(values: Any, folder: Path) -> Any:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return load_config(folder / "recipe.yaml")


def _scheduler(values: Any, folder: Path) -> Any:
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    return StudentFiles(str(folder)).read_scheduler(None)


def _prompts(values: Any, folder: Path) -> Any:
    (folder / "list.jsonl").write_text(json.dumps(values) + "\n")
    return read_prompts(folder / "list.jsonl")


READERS: dict[str, tuple[Any, Callable[[Any, Path], Any]]] = {
    "config": (BladeConfig(dense_layers="0-1", sparsity=0.7).to_dict(), _config),
    "config with a table": (
        BladeConfig(attention="patterns", patterns=PatternTable.from_dict(TABLE)).to_dict(),
        _config,
    ),
    "table": (TABLE, _table),
    "record": (RECORD, _record),
    "profile": (PROFILE, lambda values, folder: ProfileSource.from_dict(values)),
    "recipe": (asdict(DistillationConfig()), _recipe),
    "scheduler": (SCHEDULER, _scheduler),
    "evaluation": (EVALUATED, lambda values, folder: check_record(values, "line 1")),
    "prompts": ({"prompt": "a ball"}, _prompts),
}
HOSTILE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from(
        [10**30, -(10**400), 2**31, 10**9, 1e308, "nan", "", "0-99999999999", "abc", "\n`x`\n", "ü" * 300]
    )
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(string.printable, max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_letters, max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)
"""Any JSON."""


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all values in another one, itself included."""
    yield path
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def replaced(values: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of values with another one at a path."""
    if not path:
        return value
    copied = dict(values) if isinstance(values, dict) else list(values)
    copied[path[0]] = replaced(values[path[0]], path[1:], value)
    return copied


def refusal(read: Callable[[Any, Path], Any], values: Any, folder: Path) -> str | None:
    """Return the message with which values are refused, None if they are taken; and check that it took no time."""
    began = time.process_time()
    try:
        read(values, folder)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 1500, message
        return message
    finally:
        assert time.process_time() - began < 5
    return None


@pytest.mark.filterwarnings("ignore:Ignored unknown keys")
@pytest.mark.parametrize("kind", READERS)
def test_a_value_of_any_other_kind_is_taken_or_named(kind: str, tmp_path: Path) -> None:
    values, read = READERS[kind]
    assert refusal(read, values, tmp_path) is None
    everywhere = list(places(values))[kind == "evaluation" :]  # whose lines are objects when they are read

    @settings(
        max_examples=30 if kind == "recipe" else 120,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(place=st.sampled_from(everywhere), value=HOSTILE)
    def check(place: tuple[Any, ...], value: Any) -> None:
        message = refusal(read, replaced(values, place, value), tmp_path)
        assert message is None or re.search(r"`[^`]+`", message), message

    check()


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("record", "compile", "nan", "`compile` must be True or False, got 'nan'."),
        ("record", "guidance_scale", True, "`guidance_scale` must be at least 0 and finite, got True."),
        ("record", "loras", "abc", "`loras` must be a list of strings, got 'abc'."),
        ("record", "steps", 10**9, "`steps` must be an integer of at most 10,000, got 1000000000."),
        ("record", "student", ["a"], "`student` must be a string or None, got ['a']."),
        ("record", "frames", 10**9, "`frames` must be an integer of at most 100,000, got 1000000000."),
        (
            "config",
            "asa.block_size",
            10**30,
            "`block_size` must be an integer of at most 65,536, got an integer of 100 bits.",
        ),
        (
            "config",
            "dense_layers",
            "0-99999999999",
            "layer numbers from 0 to 9,999, or a string such as \"0-1,39\", got '0-99999999999'.",
        ),
        ("config", "asa", None, "`asa` must be a JSON object, got None."),
        ("config", "attention", "asa_gt", "\"patterns\", got 'asa_gt'; did you mean asa-gt?"),
        (
            "recipe",
            "generator.learning_rate",
            float("inf"),
            "`generator.learning_rate` must be a finite number, got inf.",
        ),
        ("recipe", "generator.learning_rate", 10**400, "must be a finite number, got an integer of 1,329 bits"),
        ("recipe", "run", [1], "`run` must be a mapping of fields, got [1]."),
        ("recipe", "model", "???", "`model` must have a value, got '???'."),
        ("recipe", "trajectory.steps", [10**9], "`trajectory.steps` must be an integer of at most 10,000"),
        ("table", "assignment", [[[0], [0, 1]]], "`assignment` must have the shape (groups, layers, heads)"),
        ("table", "grid", {"frames": 1, "height": 2}, "`width` of `grid` must be given"),
        ("scheduler", "num_train_timesteps", 10**10, "`num_train_timesteps` must be an integer of at most 100,000"),
        (
            "scheduler",
            "grids",
            "abc",
            "`grids` must be a list of items that are each a list of finite numbers, got 'abc'.",
        ),
        ("evaluation", "psnr", "high", "line 1 is no record of a video: `psnr` must be a value of PSNR, got 'high'."),
        ("evaluation", "run", "dense", "`run` must be a JSON object, got 'dense'."),
        ("profile", "steps", "4", "`steps` must be an integer of at most 64 bits, got '4'."),
    ],
)
def test_the_field_the_value_and_what_would_be_right(
    kind: str, path: str, value: Any, message: str, tmp_path: Path
) -> None:
    values, read = READERS[kind]
    told = refusal(read, replaced(values, tuple(path.split(".")), value), tmp_path)
    assert told is not None and message in told


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, "must have no more than 20 levels, got some in line 1"),
        ("a: &a [1, 2]\nb: [*a, *a]\n", "must have no aliases, got some in line 2"),
        ("run: {updates: 1, updates: 2}", "found duplicate key updates"),
        (f"model: {'x' * 2**20}", "must have at most 1,048,576 bytes"),
    ],
    ids=["nested", "aliases", "twice", "large"],
)
def test_a_recipe_that_would_take_memory_or_means_two_things(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(problem)) as raised:
        load_config(tmp_path / "recipe.yaml")
    assert "\n" not in str(raised.value)


def test_a_prompt_that_is_nested_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('{"prompt": ' + "[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply") as raised:
        read_prompts(tmp_path / "list.jsonl")
    assert len(str(raised.value)) < 500


@pytest.mark.filterwarnings("ignore:Ignored unknown keys")
@pytest.mark.parametrize(
    "kind", ["config", "config with a table", "table", "record", "scheduler", "prompts", "recipe"]
)
def test_changed_bytes_are_taken_or_refused_in_a_line(kind: str, tmp_path: Path) -> None:
    values, read = READERS[kind]
    read(values, tmp_path)
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    content, rng = path.read_bytes(), random.Random(kind)
    readers: dict[str, Callable[[], Any]] = {
        "config": lambda: BladeConfig.from_pretrained(tmp_path),
        "config with a table": lambda: BladeConfig.from_pretrained(tmp_path),
        "table": lambda: PatternTable.load(path),
        "record": lambda: read_request(path),
        "scheduler": lambda: StudentFiles(str(tmp_path)).read_scheduler(None),
        "prompts": lambda: read_prompts(path),
        "recipe": lambda: load_config(path),
    }
    refused = 0
    for _ in range(25 if kind == "recipe" else 60):
        changed = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(changed))
            changed[place : place + rng.choice((0, 1, 1, 9))] = rng.choice(
                (bytes([rng.randrange(256)]), b"[" * 50, b"", b"NaN", b'"', b"9" * 40, b"null", b"\x00")
            )
        path.write_bytes(changed)
        refused += refusal(lambda values, folder: readers[kind](), values, tmp_path) is not None
    assert refused > 5


def test_a_number_of_many_digits_is_no_json() -> None:
    with pytest.raises(ValueError, match="Exceeds the limit"):
        parse_json("9" * 5000, "`steps`")


READERS_OF_JSON = {
    "common/reading.py", "common/files.py", "common/locks.py", "models/untrusted.py", "students/weights.py",
}  # fmt: skip
"""Modules that parse JSON: the one for all, those of lines, locks and the files of models, which may hold NaN, and one
that compares configurations as Diffusers writes them."""


def test_json_is_parsed_in_one_place() -> None:
    package = Path(blade.__file__).parent
    parsing = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"json\.loads?\((?!json\.dumps)", path.read_text(encoding="utf-8"))
    }
    assert parsing == READERS_OF_JSON
