"""What is typed of workers and buckets: taken, or refused in a sentence, before Ray is started."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from blade.cli import evaluate, generate, profile
from blade.fleet.connection import Connection
from blade.fleet.options import FleetOptions
from blade.fleet.storage import Bucket, parse_output


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red ball moving right\na blue ball moving left\n")
    return path


def refused(capsys: pytest.CaptureFixture[str], main, *arguments: str) -> str:
    """Run a command that is refused as a usage error, and return the message."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workers": 0}, "`workers` must be"),
        ({"workers": 2, "gpus_per_worker": 1.5}, "`gpus_per_worker` must be above 0 and at most 1, got 1.5."),
        ({"workers": 2, "cpus_per_worker": 0}, "`cpus_per_worker` must be"),
        ({"cpus_per_worker": 1}, "`cpus_per_worker` must not be given without `workers` or `ray_address`."),
        ({"ray_address": "ray://head:10001"}, "`ray_address` must be auto or HOST:PORT, got 'ray://head:10001'."),
        ({"ray_address": "head"}, "`ray_address` must be auto or HOST:PORT, got 'head'."),
    ],
)
def test_the_options_of_workers_are_checked(values, message) -> None:
    with pytest.raises(ValueError, match=r"^`") as raised:
        FleetOptions(**values)
    assert message in str(raised.value)


def test_addresses_of_clusters_are_known() -> None:
    for address in ("auto", "10.0.0.1:6379", "head.cluster:6379", "[::1]:6379"):
        assert FleetOptions(ray_address=address).is_given
    assert not FleetOptions().is_given


def test_one_video_has_no_workers(capsys) -> None:
    message = refused(capsys, generate.main, "a red ball", "--workers", "2")
    assert "`--workers` and `--ray-address` need `--prompts` or `--seeds`" in message


@pytest.mark.parametrize("name", ["--from-json=x.json", "--dry-run"])
def test_what_is_of_one_video_does_not_go_with_workers(name: str, prompts: Path, capsys) -> None:
    message = refused(capsys, generate.main, f"--prompts={prompts}", "--workers=2", name)
    assert f"`{name.partition('=')[0]}` must not be given with `--prompts`." in message


def test_a_bucket_needs_workers(prompts: Path, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, generate.main, f"--prompts={prompts}", "--output=s3://bucket/folder")
    assert "`--output` must be a path without `--workers` or `--ray-address`, got s3://bucket/folder." in message
    assert not (tmp_path / "s3:").exists()


@pytest.mark.parametrize(("main", "more"), [(evaluate.main, []), (profile.main, ["--target-density=0.5"])])
def test_reports_are_made_in_folders(main, more, prompts: Path, capsys) -> None:
    message = refused(capsys, main, f"--prompts={prompts}", "--output=s3://bucket/folder", "--workers=2", *more)
    assert "`output` must be a folder, got s3:/" in message


def test_a_missing_ray_is_named_with_its_extra(prompts: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    message = refused(capsys, generate.main, f"--prompts={prompts}", "--workers=1", "--device=cpu")
    assert '`workers` and `ray_address` need Ray: pip install "blade-video[ray]".' in message


def test_one_of_several_processes_starts_no_workers(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="`workers` must not be given in one of 4 processes of a launcher"):
        Connection(FleetOptions(workers=1), "cpu")


def test_an_address_that_nobody_answers_at_is_told(monkeypatch) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=r"`ray_address` 127.0.0.1:9 does not answer .*`ray start --head`"):
        Connection(FleetOptions(ray_address="127.0.0.1:9"), "cpu")


def test_too_many_workers_are_refused_before_ray_starts(prompts: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("blade.fleet.connection.Connection._start", lambda *_: pytest.fail("started"))
    message = refused(capsys, generate.main, f"--prompts={prompts}", "--workers=5000", "--device=cpu")
    assert "`workers` must be at most" in message and "got 5000: this machine has" in message


def test_outputs_are_folders_or_buckets(tmp_path: Path) -> None:
    pytest.importorskip("s3fs")
    assert parse_output(tmp_path) == tmp_path
    assert parse_output(f"file://{tmp_path}") == tmp_path
    assert parse_output("C:/videos") == Path("C:/videos")
    bucket = parse_output("s3://bucket/folder/")
    assert isinstance(bucket, Bucket) and bucket.locate(Path("a.mp4")) == "s3://bucket/folder/a.mp4"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("s3://", "`output` must be a folder or an address such as s3://bucket/folder, got s3://."),
        (Path("s3://bucket/folder"), "`output` must be a folder or an address such as"),
        ("memory://folder", "`output` must be where all workers can write, got memory://folder."),
        ("nothing://bucket", "`output` nothing://bucket cannot be opened: Protocol not known: nothing"),
    ],
)
def test_other_addresses_are_refused(output, message) -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(ValueError, match=r"^`output`") as raised:
        parse_output(output)
    assert message in str(raised.value)
