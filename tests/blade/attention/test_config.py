"""BladeConfig defends itself, and survives the way to JSON and back."""

import dataclasses
import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blade.attention.config import CONFIG_NAME, AdaptiveConfig, BladeConfig, parse_dense_layers
from blade.attention.pattern_table import uniform_table
from blade.attention.patterns import HeadPattern
from blade.common.files import OutputError

fractions = st.floats(0, 0.99, allow_nan=False)

adaptive = st.builds(
    AdaptiveConfig,
    block_size=st.sampled_from([32, 64, 128]),
    token_order=st.sampled_from(["raster", "token-major", "gilbert", "bricks(2,4,4)"]),
    selector=st.sampled_from(["sampled", "mean-pooled", "random", "local"]),
    probe_tokens=st.integers(1, 32),
    softmax_denominator=st.booleans(),
    cumulative_mass=st.none() | st.floats(0.1, 1),
    min_fraction=fractions,
    pooled_window=st.sampled_from([8, 16, 32]),
)
configs = st.builds(
    BladeConfig,
    attention=st.sampled_from(["dense", "asa"]),
    sparsity=fractions,
    pooled_tokens=st.sampled_from(["none", "all", "dropped"]),
    dense_steps=st.integers(0, 50) | fractions,
    dense_layers=st.lists(st.integers(0, 60), max_size=5),
    strict=st.booleans(),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["training-free", "few-step", "student"]),
    asa=adaptive,
)


@settings(max_examples=40, deadline=None)
@given(configs)
def test_json_and_back_is_the_identity(config):
    assert BladeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_save_and_load(tmp_path):
    config = BladeConfig.from_preset("wan2.1-t2v-1.3b", "student")
    path = config.save_pretrained(tmp_path / "new" / "folder")
    assert path.name == CONFIG_NAME
    assert BladeConfig.from_pretrained(path.parent) == config
    assert BladeConfig.from_pretrained(str(path)) == config
    assert BladeConfig.from_pretrained(tmp_path, subfolder="new/folder") == config


def test_saving_that_fails_keeps_what_was_saved_before(tmp_path, monkeypatch):
    table = uniform_table(HeadPattern(kind="diagonal", frames=0.5), 2, 2, block_size=32)
    BladeConfig(attention="patterns", patterns=table).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"No space left: the disk of .* is full"):
        BladeConfig(attention="patterns", patterns=replace(table, block_size=64)).save_pretrained(tmp_path)
    with pytest.raises(OutputError, match=r"No space left: the disk of .*blade_config\.json is full"):
        BladeConfig(sparsity=0.9).save_pretrained(tmp_path)
    assert len(calls) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_load_from_the_hub(tmp_path, monkeypatch):
    config = BladeConfig(sparsity=0.7)
    asked = {}

    def download(repo_id, filename, **options):
        asked.update(repo_id=repo_id, filename=filename, **options)
        return str(config.save_pretrained(tmp_path))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert BladeConfig.from_pretrained("somebody/a-student", subfolder="sparse", revision="v1") == config
    assert asked == {
        "repo_id": "somebody/a-student",
        "filename": CONFIG_NAME,
        "subfolder": "sparse",
        "revision": "v1",
        "token": None,
    }


def test_push_to_the_hub(monkeypatch):
    config = BladeConfig(sparsity=0.7)
    uploaded = {}

    class Api:
        def __init__(self, token=None):
            uploaded["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            assert exist_ok
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, folder_path, **options):
            uploaded.update(options, config=BladeConfig.from_pretrained(folder_path))
            uploaded["files"] = [path.name for path in Path(folder_path).rglob("*")]
            return type("Commit", (), {"commit_url": "https://huggingface.co/me/x/commit/1"})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert config.push_to_hub("x", token="t") == "https://huggingface.co/me/x/commit/1"
    assert uploaded["repo_id"] == "me/x"
    assert uploaded["config"] == config
    assert uploaded["files"] == [CONFIG_NAME], "a model card, say, would replace that of the repository"


def test_unknown_keys_of_a_later_version_draw_a_warning():
    values = BladeConfig(sparsity=0.6).to_dict()
    values["colour"] = "red"
    values["asa"]["depth"] = 3
    with pytest.warns(UserWarning) as caught:
        assert BladeConfig.from_dict(values) == BladeConfig(sparsity=0.6)
    assert [str(warning.message) for warning in caught] == [
        "Ignored unknown keys of a BLADE configuration: `colour`.",
        "Ignored unknown keys of a BLADE configuration: `asa.depth`.",
    ]


def test_missing_keys_of_an_earlier_version_take_their_defaults():
    assert BladeConfig.from_dict({"sparsity": 0.25, "asa": {}}) == BladeConfig(sparsity=0.25)


def test_the_implementation_reference_of_an_earlier_version_is_cpu(tmp_path):
    config = BladeConfig(implementation="cpu")
    assert BladeConfig(implementation="reference") == config
    assert dataclasses.replace(BladeConfig(), implementation="reference").implementation == "cpu"
    assert BladeConfig.from_dict({"implementation": "reference"}) == config
    path = BladeConfig().save_pretrained(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"implementation": "reference"}))
    assert BladeConfig.from_pretrained(tmp_path) == config
    assert config.to_dict()["implementation"] == "cpu"


def test_asa_gt_is_short_for_all_pooled_tokens():
    config = BladeConfig(attention="asa-gt")
    assert (config.attention, config.pooled_tokens) == ("asa", "all")
    assert config == BladeConfig(attention="asa", pooled_tokens="all")
    with pytest.raises(ValueError, match='means `pooled_tokens="all"`'):
        BladeConfig(attention="asa-gt", pooled_tokens="dropped")


@pytest.mark.parametrize(
    ("written", "layers"),
    [("0-1,39", (0, 1, 39)), (" 3 , 1", (1, 3)), ("", ()), ([2, 0, 2], (0, 2)), (4, (4,)), ((), ())],
)
def test_dense_layers_are_read_from_lists_and_strings(written, layers):
    assert BladeConfig(dense_layers=written).dense_layers == layers


@pytest.mark.parametrize("written", ["a", "1-", "3-1", "-1", "1,,2", [-1], [1.5], [True], None])
def test_bad_dense_layers_are_refused(written):
    with pytest.raises(ValueError, match=rf"`dense_layers` must be layer numbers.*got {re.escape(repr(written))}"):
        parse_dense_layers(written)


@pytest.mark.parametrize(
    ("dense_steps", "total", "count"),
    [(0, 50, 0), (3, 50, 3), (60, 50, 50), (0.2, 50, 10), (0.2, 30, 6), (0.2, 4, 1), (0.01, 8, 1), (2.0, 8, 2)],
)
def test_dense_steps_are_a_count_or_a_fraction_rounded_up(dense_steps, total, count):
    assert BladeConfig(dense_steps=dense_steps).dense_step_count(total) == count


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("sparsity", 1.7, "in [0, 1)"),
        ("sparsity", 1, "in [0, 1)"),
        ("sparsity", float("nan"), "in [0, 1)"),
        ("attention", "tables", 'one of "dense", "asa", "asa-gt", "patterns"'),
        ("pooled_tokens", "some", 'one of "none", "all", "dropped"'),
        ("dense_steps", -1, "a count of steps or a fraction in [0, 1)"),
        ("dense_steps", 1.5, "a count of steps or a fraction in [0, 1)"),
        ("seed", -1, "an integer of at least 0"),
        ("strict", 1, "True or False"),
        ("kind", "other", 'one of "training-free", "few-step", "student"'),
        ("implementation", "", 'a name such as "auto"'),
        ("asa", None, "an AdaptiveConfig"),
    ],
)
def test_a_bad_value_is_named_with_what_would_be_right(field, value, wanted):
    with pytest.raises(ValueError, match=re.escape(f"`{field}` must be {wanted}, got {value!r}")):
        BladeConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("block_size", 0, "an integer of at least 1"),
        ("selector", "best", 'one of "sampled", "mean-pooled", "random", "local"'),
        ("token_order", "hilbert", "one of raster, token-major, gilbert, bricks(t,h,w)"),
        ("cumulative_mass", 0, "None or in (0, 1]"),
        ("min_fraction", 1.1, "in [0, 1]"),
        ("probe_tokens", 65, "at most `block_size`, which is 64"),
        ("softmax_denominator", "yes", "True or False"),
    ],
)
def test_a_bad_detail_is_named_with_what_would_be_right(field, value, wanted):
    with pytest.raises(ValueError, match=re.escape(f"`{field}` must be {wanted}, got {value!r}"[:60])):
        AdaptiveConfig(**{field: value})


def test_the_window_of_dropped_blocks_divides_the_block():
    with pytest.raises(ValueError, match=r"`pooled_window` must divide `block_size`.*30 and 128"):
        BladeConfig(pooled_tokens="dropped", asa=AdaptiveConfig(block_size=128, pooled_window=30))


def test_a_folder_without_a_configuration_or_with_a_broken_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"holds no {CONFIG_NAME}"):
        BladeConfig.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        BladeConfig.from_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_text("[]")
    with pytest.raises(ValueError, match=r"must hold a JSON object, got \[\]"):
        BladeConfig.from_pretrained(tmp_path)


def test_presets_of_the_two_kinds_are_kept_apart():
    training_free = BladeConfig.from_preset("wan2.1-t2v-1.3b")
    student = BladeConfig.from_preset("wan2.1-t2v-1.3b", kind="student")
    assert (training_free.kind, training_free.sparsity, training_free.dense_steps) == ("training-free", 0.7, 0.2)
    assert training_free.dense_layers == (0,) and training_free.pooled_tokens == "dropped"
    assert training_free.asa.pooled_window == training_free.asa.block_size and training_free.asa.rounding == "spread"
    assert (student.kind, student.dense_steps, student.dense_layers) == ("student", 0, ())
    assert (student.pooled_tokens, student.asa.pooled_window, student.asa.block_size) == ("all", 30, 128)
    assert (student.asa.probe_tokens, student.asa.softmax_denominator) == (32, False)  # as the weights were trained
    with pytest.raises(ValueError, match=r"one of the student presets .*wan, .*, got 'ltx-video'. It exists as"):
        BladeConfig.from_preset("ltx-video", kind="student")
    with pytest.raises(ValueError, match=r"one of the training-free presets .*wan, .*got 'wan3'"):
        BladeConfig.from_preset("wan3")
    with pytest.raises(ValueError, match='`kind` must be one of "training-free", "few-step", "student", got'):
        BladeConfig.from_preset("wan", kind="best")


def test_a_configuration_of_version_0_1_keeps_its_settings():
    config = BladeConfig(sparsity=0.5, asa=AdaptiveConfig(block_size=32, pooled_window=16))
    values = config.to_dict()
    for name in ("statistic", "rounding", "budget", "value_weighting"):
        del values["asa"][name]
    read = BladeConfig.from_dict(values)
    assert read == config and (read.asa.statistic, read.asa.rounding) == ("max", "floor")
    assert (read.asa.budget, read.asa.value_weighting) == ("row", False)


def test_a_field_can_be_replaced():
    config = dataclasses.replace(BladeConfig.from_preset("shapes"), sparsity=0.9, dense_layers="0-1")
    assert (config.sparsity, config.dense_layers, config.asa.block_size) == (0.9, (0, 1), 32)


def test_a_configuration_shows_what_differs_from_the_default():
    assert repr(BladeConfig()) == "BladeConfig()"
    assert repr(BladeConfig(sparsity=0.6, asa=AdaptiveConfig(block_size=128))) == (
        "BladeConfig(sparsity=0.6, asa=AdaptiveConfig(block_size=128))"
    )
    preset = BladeConfig.from_preset("shapes", "student")
    assert eval(repr(preset)) == preset
    table = uniform_table(HeadPattern(kind="diagonal", frames=0.5), 2, 3, block_size=32)
    shown = repr(BladeConfig(attention="patterns", patterns=table))
    assert "patterns=<PatternTable of 2 layers, 3 heads, 1 groups of steps: diagonal 100%>" in shown
