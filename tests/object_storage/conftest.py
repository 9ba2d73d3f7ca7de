"""A store with an empty bucket, and a place in it for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from results import lock, mirror
from tests.object_storage.places import be_on
from tests.object_storage.server import CREDENTIALS, s3_server, uri


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def results(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place of the test's own in the store, this process being on a host of its own."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(lock, "SETTLING_SECONDS", 0.05)
    monkeypatch.setattr(mirror, "EVENTS_SECONDS", 0.05)
    monkeypatch.setattr(mirror, "TABLES_SECONDS", 0.2)
    be_on("first", tmp_path, monkeypatch)
    return uri(port, prefix=tmp_path.name)
