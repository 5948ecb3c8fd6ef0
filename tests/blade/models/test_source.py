"""Looking models up on the Hub, which a server on this machine stands in for."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from blade.models import source
from blade.models.source import INDEX_NAME, LARGE_DOWNLOAD, ModelError, bytes_to_download, locate, look_up

COMMIT, LATER = "0123456789" * 4, "abcdef0123" * 4
FILES = {
    "model_index.json": 1,
    "README.md": 10,
    "assets/figure.png": 1000,
    "vae/config.json": 2,
    "vae/diffusion_pytorch_model.safetensors": 300,
    "vae/diffusion_pytorch_model.fp16.safetensors": 150,
    "vae/diffusion_pytorch_model.bin": 300,
    "tokenizer/tokenizer_config.json": 4,
    "tokenizer/spiece.model": 50,
}
NEEDED = 2 + 300 + 4 + 50


class Hub(ThreadingHTTPServer):
    """What the Hub answers about one repository, `owner/model`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.commit = dict(FILES), COMMIT
        self.asked: list[str] = []
        self.delay, self.answers = 0.0, 1000

    def handle_error(self, *_: object) -> None:
        """Whoever asked has gone: an answer came too late."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append(f"GET {path}")
        time.sleep(self.server.delay)
        files = self.server.files
        revisions = [f"/api/models/owner/model/revision/{revision}" for revision in ("main", self.server.commit)]
        if len(self.server.asked) > self.server.answers:
            self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif path in ("/api/models/owner/model", *revisions):
            names = [{"rfilename": name} for name in files]
            self._send({"id": "owner/model", "sha": self.server.commit, "siblings": names})
        elif path == f"/api/models/owner/model/tree/{self.server.commit}":
            self._send([{"type": "file", "path": name, "size": files[name], "oid": _oid(name)} for name in files])
        else:
            self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append(f"HEAD {path}")
        name = path.removeprefix(f"/owner/model/resolve/{self.server.commit}/")
        self.send_response(200)
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("ETag", f'"{_oid(name)}"')
        self.send_header("Content-Length", str(self.server.files[name]))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _send(self, values: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(values).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _oid(name: str) -> str:
    return hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The local cache's folder of the repository, which is empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models--owner--model"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    server = Hub()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.address)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def keep(cache: Path, name: str, commit: str = COMMIT) -> None:
    """Put a file into the cache, as downloading it does."""
    blob, path = cache / "blobs" / _oid(name), cache / "snapshots" / commit / name
    for folder in (blob.parent, path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(bytes(FILES[name]))
    path.symlink_to(blob)


def test_what_a_download_would_fetch_is_counted(hub: Hub, cache: Path, capfd) -> None:
    assert bytes_to_download("owner/model", FILES, COMMIT) == NEEDED
    assert capfd.readouterr() == ("", ""), "no bars are wanted"
    assert not cache.exists(), "the cache must not take for downloaded what is not"


def test_what_the_cache_has_is_not_counted(hub: Hub, cache: Path) -> None:
    keep(cache, "vae/diffusion_pytorch_model.safetensors")
    assert bytes_to_download("owner/model", FILES, COMMIT) == NEEDED - 300
    # unchanged in a later commit
    hub.commit = LATER
    assert bytes_to_download("owner/model", FILES, LATER) == NEEDED - 300
    for name in FILES:
        if not (cache / "snapshots" / COMMIT / name).exists():
            keep(cache, name)
    hub.commit, hub.asked[:] = COMMIT, []
    assert bytes_to_download("owner/model", FILES, COMMIT) == 0
    assert not [line for line in hub.asked if line.startswith("HEAD")]


def test_a_repository_without_parts_takes_no_question(hub: Hub) -> None:
    assert bytes_to_download("owner/model", ["README.md", "lora.safetensors"], COMMIT) == 0
    assert hub.asked == []


@pytest.mark.parametrize("size", [LARGE_DOWNLOAD - 1, 28_300_000_000])
def test_a_large_download_is_announced(hub: Hub, caplog: pytest.LogCaptureFixture, size: int) -> None:
    hub.files["vae/diffusion_pytorch_model.safetensors"] = size - (NEEDED - 300)
    with caplog.at_level(logging.INFO, "blade"):
        assert locate("owner/model", None) == ("owner/model", {"local_files_only": False, "revision": None})
    announced = [] if size < LARGE_DOWNLOAD else ["downloading 28.3 GB of owner/model to the Hub's local cache"]
    assert [record.getMessage() for record in caplog.records if record.name == "blade"] == announced
    caplog.clear()
    hub.asked.clear()
    with caplog.at_level(logging.INFO, "blade"):
        locate("owner/model", "main", announce=False)
    assert not caplog.records and len(hub.asked) == 1, "what is not announced is not asked for"


def test_a_repository_that_is_not_there_or_no_pipeline_is_named(hub: Hub) -> None:
    with pytest.raises(ModelError, match="`model` owner/other is no folder here, and the Hub has no such repository"):
        locate("owner/other", None)
    del hub.files[INDEX_NAME]
    with pytest.raises(ModelError, match=f"`model` owner/model is no Diffusers pipeline: it has no {INDEX_NAME}"):
        locate("owner/model", None)


def test_the_names_of_the_files_are_looked_up(hub: Hub) -> None:
    assert look_up("owner/model", "source", "x.safetensors") == list(FILES)
    assert hub.asked == ["GET /api/models/owner/model"]


def test_a_hub_that_does_not_answer_in_time_leaves_the_cache(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.delay = 3.0
    monkeypatch.setattr(source, "HUB_TIMEOUT", 0.2)
    began = time.monotonic()
    with pytest.raises(ModelError, match="not in the Hub's local cache, and the Hub cannot be reached"):
        locate("owner/model", None)
    keep(cache, INDEX_NAME)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    assert locate("owner/model", None) == ("owner/model", {"local_files_only": True, "revision": None})
    assert time.monotonic() - began < 2.5


def test_a_repository_that_goes_meanwhile_announces_nothing(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """The download that follows says what is wrong."""
    hub.files["vae/diffusion_pytorch_model.safetensors"] = 28_300_000_000
    hub.answers = 1
    with caplog.at_level(logging.INFO, "blade"):
        assert locate("owner/model", None)[1]["local_files_only"] is False
    assert len(hub.asked) > 1 and not [record for record in caplog.records if record.name == "blade"]
