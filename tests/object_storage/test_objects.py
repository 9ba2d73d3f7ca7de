"""Objects are put, read and refused: what a store does, and what is said when it does not."""

from __future__ import annotations

import http.server
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator import search, train
from results import objects
from results.objects import PATIENCE_SECONDS, ObjectStore, Refused, Unreachable, canonical, within
from results.schema import UsageError
from tests.object_storage.server import BUCKET, uri


def test_objects_are_put_read_listed_and_removed(results: str) -> None:
    store = ObjectStore(canonical(results))
    for name in ("b/2", "b/1", "a", "c/d/e"):
        store.put(name, name.encode())
    assert list(store.objects()) == ["a", "b/1", "b/2", "c/d/e"]
    assert list(store.objects("b")) == ["b/1", "b/2"]
    assert list(store.objects("nothing")) == []
    assert store.folders() == ["b", "c"]
    assert store.read("c/d/e") == b"c/d/e"
    store.put("a", b"other")
    assert (store.read("a"), getattr(store.info("a"), "size", None)) == (b"other", 5)
    store.remove("b/1")
    store.remove("b/1")
    assert list(store.objects("b")) == ["b/2"]
    assert store.info("b/1") is None
    assert store.info("b") is None
    with pytest.raises(FileNotFoundError):
        store.read("b/1")


def test_large_objects_are_whole(results: str) -> None:
    content = os.urandom(25_000_000)
    ObjectStore(canonical(results)).put("large", content)
    assert ObjectStore(canonical(results)).read("large") == content


def test_an_object_replaced_while_it_is_read_is_read_whole(results: str) -> None:
    store = ObjectStore(canonical(results))

    def put(size: int) -> None:
        store.put("growing", str(size).encode().ljust(size, b"."))

    put(1000)
    done = threading.Event()

    def replace_again_and_again() -> None:
        for size in itertools.takewhile(lambda _: not done.is_set(), itertools.count(1001)):
            put(size)

    writer = threading.Thread(target=replace_again_and_again)
    writer.start()
    try:
        for _ in range(60):  # of such reads pyarrow's own, which take two requests, leave every third one torn
            content = store.read("growing")
            assert len(content) == int(content.rstrip(b"."))
    finally:
        done.set()
        writer.join()


def test_a_uri_says_all_that_another_host_must_know(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    assert canonical("s3://bucket/a/b/") == "s3://bucket/a/b"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://host:9000")
    assert canonical("s3://bucket/a") == "s3://bucket/a?endpoint_override=host:9000&scheme=http"
    given = "s3://bucket/a?endpoint_override=other:1&scheme=http"
    assert canonical(given) == given
    assert canonical(canonical(given)) == given
    assert within(given, "x/y") == "s3://bucket/a/x/y?endpoint_override=other:1&scheme=http"
    assert objects.above(within(given, "x")) == given
    with pytest.raises(UsageError, match="credentials do not belong into a URI"):
        canonical("s3://key:secret@bucket/a")
    with pytest.raises(UsageError, match="no place for results; wanted a local folder, s3://BUCKET"):
        canonical("s3://")


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers with an S3 error: to everything, or to what would write."""

    error = (403, "AccessDenied")
    writes_only = False

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, code = self.error
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
        if self.writes_only and self.command == "GET":
            status, body = 200, "<?xml version='1.0'?><ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>"
        elif self.writes_only and self.command == "HEAD":
            status = 404
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def log_message(self, *args: object) -> None:
        """Nothing."""


@contextmanager
def answering(error: tuple[int, str], *, writes_only: bool = False) -> Iterator[int]:
    handler = type("Handler", (Answering,), {"error": error, "writes_only": writes_only})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@contextmanager
def silent() -> Iterator[int]:
    """A port where somebody listens and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextmanager
def closed() -> Iterator[int]:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    yield port


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (lambda: answering((403, "AccessDenied")), "is denied .* give credentials .AWS_ACCESS_KEY_ID"),
        (lambda: answering((403, "InvalidAccessKeyId")), "is denied .* give credentials"),
        (lambda: answering((403, "AccessDenied"), writes_only=True), "is denied .*PutObject.* give credentials"),
        (lambda: answering((404, "NoSuchBucket")), f"there is no bucket '{BUCKET}' .* create it"),
        (lambda: answering((301, "PermanentRedirect")), "was refused .* mend its endpoint_override, scheme or region"),
        (closed, "does not answer .* mend its endpoint or the network"),
        pytest.param(silent, "does not answer .* mend its endpoint or the network", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("main", [search.main, train.main])
def test_a_store_that_cannot_be_used_is_said_in_one_sentence_long_before_patience_ends(
    main: Callable[[list[str]], int], server: object, message: str, results: str, tmp_path: Path
) -> None:
    what = ["digits"] if main is search.main else ["speedrun"]
    with server() as port:  # type: ignore[operator]
        began = time.monotonic()
        with pytest.raises(UsageError, match=message) as caught:
            main([*what, "--results-dir", uri(port, tmp_path.name), "--name", "x"])
        assert time.monotonic() - began < PATIENCE_SECONDS / 2
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "first").exists()


def test_a_refusal_is_not_tried_again_and_a_failure_is(results: str) -> None:
    with answering((403, "AccessDenied")) as port, pytest.raises(Refused, match="is denied"):
        ObjectStore(uri(port)).read("x")
    with answering((503, "SlowDown")) as port, pytest.raises(Unreachable, match="does not answer"):
        ObjectStore(uri(port), patience=0.5).read("x")
