"""A bucket: names as in a folder, uploads whole, the record last."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blade.common.files import OutputError
from blade.fleet import generation
from blade.fleet.generation import VideoOrder, _VideoMaker
from blade.fleet.storage import Bucket, parse_output
from blade.generation.naming import is_made, possible_paths, record_path, settings_hash
from blade.generation.outputs import FinishedVideo
from blade.generation.record import make_record
from blade.generation.request import ResolvedRequest
from blade.generation.run import Generation

PLAIN = Path("a-red-ball-moving-right-0.mp4")


def record_of(request: ResolvedRequest) -> dict[str, Any]:
    """Return the record of a video of a request."""
    made = Generation(
        video=torch.zeros(1, 3, 4, 4), seconds_text=0.0, seconds_denoising=0.0, seconds_decoding=0.0, summary=None,
        changes={},
    )  # fmt: skip
    return make_record(request, made, seconds_loading=0.0)


def opened(address: str) -> Bucket:
    """Return a bucket that was looked into."""
    bucket = parse_output(address)
    assert isinstance(bucket, Bucket)
    bucket.look()
    return bucket


def put(client, key: str, content: bytes) -> None:
    client.pipe_file(key, content)


def test_names_are_those_of_a_folder(store, small) -> None:
    client, address = store("names"), "s3://names/folder"
    bucket = opened(address)
    assert next(possible_paths(PLAIN, small, {}, bucket)) == PLAIN
    assert not is_made(PLAIN, small, False, bucket)
    assert client.ls("names") == []  # nothing is left of the check that it can be written

    put(client, "names/folder/a-red-ball-moving-right-0.mp4", b"a video")
    put(client, "names/folder/a-red-ball-moving-right-0.json", json.dumps(record_of(small)).encode())
    bucket = opened(address)
    assert is_made(PLAIN, small, False, bucket) and not is_made(PLAIN, small, True, bucket)
    assert next(possible_paths(PLAIN, small, {}, bucket)) == PLAIN

    other = replace(small, steps=3)
    named = Path(f"a-red-ball-moving-right-0-{settings_hash(other)}.mp4")
    assert next(possible_paths(PLAIN, other, {}, bucket)) == named
    bucket.uploaded([named, record_path(named)])
    assert bucket.has(named) and bucket.has(record_path(named))


def test_a_video_without_its_record_is_made_again_in_its_place(store, small) -> None:
    client = store("halves")
    put(client, "halves/a-red-ball-moving-right-0.mp4", b"half of the upload")
    bucket = opened("s3://halves/")
    assert not is_made(PLAIN, small, False, bucket)
    assert next(possible_paths(PLAIN, small, {}, bucket)) == PLAIN


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"prompt": "a", "prompt": "b"}', b"\xff"])
def test_a_file_that_is_no_record_stays(store, small, content: bytes) -> None:
    name = f"others-{len(content)}"
    put(store(name), f"{name}/a-red-ball-moving-right-0.json", content)
    bucket = opened(f"s3://{name}")
    assert bucket.record(PLAIN) is None
    assert next(possible_paths(PLAIN, small, {}, bucket)) != PLAIN


def test_records_are_read_together(store, small, monkeypatch) -> None:
    client = store("many")
    paths = [Path(f"{number}.mp4") for number in range(5)]
    for path in paths:
        put(client, f"many/f/{record_path(path)}", json.dumps(record_of(small) | {"seed": int(path.stem)}).encode())
    bucket = opened("s3://many/f")
    bucket.read_ahead([*paths, Path("missing.mp4")])
    monkeypatch.setattr(bucket._system, "cat", lambda *_, **__: pytest.fail("read again"))
    assert [bucket.record(path)["seed"] for path in paths] == list(range(5))
    assert bucket.record(Path("missing.mp4")) is None


def test_a_bucket_travels_to_workers(store) -> None:
    store("travels")
    bucket = pickle.loads(pickle.dumps(opened("s3://travels/f")))
    assert bucket.address == "s3://travels/f" and not bucket.has(PLAIN)


@pytest.mark.parametrize("address", ["s3://missing/f"])
def test_a_bucket_that_is_not_there_is_told(store, address: str) -> None:
    store("here")
    with pytest.raises(OutputError, match=rf"`output` {address} cannot be written: .*bucket does not exist"):
        opened(address)


@pytest.mark.parametrize("compare", [False, True])
def test_a_worker_uploads_whole_files_and_the_record_last(store, small, monkeypatch, compare: bool) -> None:
    name = f"uploads-{compare}".lower()
    client = store(name)
    comparison = b"the comparison" if compare else None
    made = FinishedVideo(
        record=record_of(small), video=b"the video", comparison=comparison, published_students=(), generation=None
    )
    monkeypatch.setattr(generation, "make_video", lambda *_, **__: made)
    bucket, uploaded = opened(f"s3://{name}/f"), []
    put_file = type(bucket._system).put_file

    def watched(source: str, target: str) -> None:
        uploaded.append(Path(target).name)
        put_file(bucket._system, source, target)

    monkeypatch.setattr(bucket._system, "put_file", watched)
    maker = _VideoMaker(model=None, resolved=small, compare=compare, seconds_loading=0.0)  # type: ignore[arg-type]
    sent = maker.make(VideoOrder(request=small, path=PLAIN, bucket=bucket))
    videos = [f"{PLAIN.stem}-compare.mp4"] if compare else []
    assert uploaded == [*videos, PLAIN.name, f"{PLAIN.stem}.json"]
    assert client.cat_file(f"{name}/f/{PLAIN.name}") == b"the video"
    assert json.loads(client.cat_file(f"{name}/f/{PLAIN.stem}.json")) == made.record
    assert sent.video == b"" and sent.record == made.record  # the bytes do not travel twice
    assert is_made(PLAIN, small, compare, opened(f"s3://{name}/f"))
