"""A store that speaks S3 on the loopback interface, and small requests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from small_videos import SMALL

from blade.generation.plan import resolve_without_weights
from blade.generation.request import GenerationRequest, ResolvedRequest


@pytest.fixture(scope="module")
def small() -> ResolvedRequest:
    """A resolved request of a small video."""
    return resolve_without_weights(GenerationRequest(prompt="a red ball moving right", **SMALL))[1]


@pytest.fixture(scope="module")
def store() -> Iterator[Callable[[str], Any]]:
    """Return a function that makes a bucket of a name, and returns a client; the environment leads to the store."""
    pytest.importorskip("moto")
    s3fs = pytest.importorskip("s3fs")
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (keys | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}).items():
            environment.setenv(name, value)

        def make(bucket: str) -> Any:
            client = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
            client.mkdir(bucket)
            return client

        s3fs.S3FileSystem.clear_instance_cache()  # of clients of another store
        yield make
    server.stop()
