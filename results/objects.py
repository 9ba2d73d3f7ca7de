"""Objects of an object store, read and put whole by name; what fails for the moment is tried again.

A put is there in one step or not at all. Names are relative to a store's URI, parts divided by "/".
"""

from __future__ import annotations

import functools
import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import parse_qsl, urlencode

from pyarrow import fs

from results.schema import UsageError

SCHEMES = ("s3", "gs")
PATIENCE_SECONDS = 300.0
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.25, 10.0
CONNECT_SECONDS, REQUEST_SECONDS = 5.0, 6.0  # without a byte
READS = 5
ANSWER_SECONDS = 8.0  # of all questions before a command begins, which has taken seconds to start
NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|Bucket '.*' not found|bucket does not exist", re.IGNORECASE)
DENIED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN|MISSING_AUTHENTICATION_TOKEN"
    r"|ExpiredToken|HTTP status 40[13]|PERMISSION_DENIED|UNAUTHENTICATED"
)
MISTAKEN = re.compile(r"HTTP status (3\d\d|400|405|501)")
T = TypeVar("T")


class Refused(UsageError):
    """An object store answered that it will not do this: there is no such bucket, or access is denied."""


class Unreachable(OSError):
    """An object store did not answer for as long as was to be waited."""


@dataclass(frozen=True)
class Info:
    """Size in bytes and the store's time of the last put, in nanoseconds since 1970."""

    size: int
    modified_ns: int


def is_remote(results_dir: object) -> bool:
    """Whether results lie in an object store: the folder is a URI."""
    return "://" in str(results_dir)


def within(uri: str, name: str) -> str:
    """The URI of what lies under another one, whose options it keeps."""
    place, mark, options = uri.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{options}"


def above(uri: str) -> str:
    """The URI of what something lies in, with its options."""
    place, mark, options = uri.partition("?")
    return f"{place.rpartition('/')[0]}{mark}{options}"


def canonical(uri: str) -> str:
    """A URI that says everything another machine has to know: the endpoint of this one's environment too.

    Raises UsageError when it is none of an object store.
    """
    place, _, query = uri.partition("?")
    scheme, _, path = place.partition("://")
    if scheme not in SCHEMES or not path.strip("/"):
        raise UsageError(
            f"{uri!r} is no place for results; wanted a local folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"
        )
    if "@" in path.partition("/")[0]:  # it is recorded with the command line
        raise UsageError(
            "credentials do not belong into a URI; give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
        )
    options = dict(parse_qsl(query))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3" and endpoint and "endpoint_override" not in options:
        protocol, _, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host.rstrip("/"), "scheme": protocol or "https"}
    query = urlencode(options, safe=":/")
    return f"{scheme}://{path.strip('/')}{'?' if query else ''}{query}"


@functools.cache
def _filesystem(scheme: str, bucket: str, query: str) -> fs.FileSystem:
    options = dict(parse_qsl(query))
    if scheme == "gs":
        options.setdefault("retry_limit_seconds", str(REQUEST_SECONDS))
        return fs.FileSystem.from_uri(f"gs://{bucket}?{urlencode(options)}")[0]
    known = {name: options.pop(name) for name in ("endpoint_override", "region") if name in options}
    protocol = options.pop("scheme", "https")
    if options:
        raise UsageError(f"an s3 URI with {', '.join(options)}; wanted endpoint_override, scheme and region alone")
    if not known and not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
        known["region"] = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        **known,
        scheme=protocol,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        allow_delayed_open=True,  # small objects are put by one request
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
    )


@dataclass(frozen=True)
class ObjectStore:
    """What lies under a canonical URI. Its operations raise Refused at once, Unreachable after `patience` seconds."""

    uri: str
    patience: float = field(default_factory=lambda: PATIENCE_SECONDS)

    def read(self, name: str) -> bytes:
        """An object's content. Raises FileNotFoundError when there is none."""

        def read(filesystem: fs.FileSystem, path: str) -> bytes:
            # Opening asks for the size, reading for so many bytes: of an object replaced in between that is a part.
            for _ in range(READS):
                with filesystem.open_input_file(path) as file:
                    before, content = file.metadata(), file.read_at(file.size(), 0)
                with filesystem.open_input_file(path) as file:
                    if file.metadata() == before:
                        return bytes(content)
            raise OSError(f"{path} is replaced again and again while it is read")

        return self._patiently(read, name)

    def put(self, name: str, content: bytes, *, permitted: Callable[[], object] = lambda: None) -> None:
        """Make or replace an object, in one step. `permitted` is asked before every attempt, and may raise."""

        def put(filesystem: fs.FileSystem, path: str) -> None:
            permitted()
            with filesystem.open_output_stream(path) as stream:
                stream.write(content)

        self._patiently(put, name)

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""

        def remove(filesystem: fs.FileSystem, path: str) -> None:
            try:
                filesystem.delete_file(path)
            except FileNotFoundError:
                return

        self._patiently(remove, name)

    def info(self, name: str) -> Info | None:
        """Of an object; None when there is none."""

        def info(filesystem: fs.FileSystem, path: str) -> Info | None:
            found = filesystem.get_file_info(path)
            return _info(found) if found.type == fs.FileType.File else None

        return self._patiently(info, name)

    def objects(self, under: str = "") -> dict[str, Info]:
        """The objects whose names begin with `under/`, in the order of their names."""

        def listed(filesystem: fs.FileSystem, path: str) -> dict[str, Info]:
            found = _selected(filesystem, path, recursive=True)
            return {f.path: _info(f) for f in found if f.type == fs.FileType.File}

        start = len(self._path("")) + 1
        found = self._patiently(listed, under)
        return {path[start:]: found[path] for path in sorted(found) if not path.endswith("/")}

    def folders(self) -> list[str]:
        """The first parts of the names of all objects that have several."""

        def folders(filesystem: fs.FileSystem, path: str) -> list[str]:
            found = _selected(filesystem, path, recursive=False)
            return [f.base_name for f in found if f.type == fs.FileType.Directory]

        return sorted(self._patiently(folders, ""))

    def _path(self, name: str) -> str:
        prefix = self.uri.partition("?")[0].partition("://")[2]
        return f"{prefix}/{name}" if name else prefix

    def _patiently(self, operation: Callable[[fs.FileSystem, str], T], name: str) -> T:
        """Do it, again and again while the store does not answer. Errors that last are raised at once."""
        scheme = self.uri.partition("://")[0]
        path, query = self._path(name), self.uri.partition("?")[2]
        deadline, wait = time.monotonic() + self.patience, FIRST_WAIT_SECONDS
        while True:
            try:
                return operation(_filesystem(scheme, path.partition("/")[0], query), path)
            except FileNotFoundError:
                raise
            except OSError as error:
                if (refusal := _refusal(self.uri, error)) is not None:
                    raise Refused(refusal) from error
                if time.monotonic() + wait > deadline:
                    raise Unreachable(f"{self.uri} does not answer ({_said(error)})") from error
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)


def _selected(filesystem: fs.FileSystem, path: str, *, recursive: bool) -> list[fs.FileInfo]:
    try:
        found: list[fs.FileInfo] = filesystem.get_file_info(fs.FileSelector(path, recursive=recursive))
    except FileNotFoundError:  # a missing bucket is another error
        return []
    return found


def _info(found: fs.FileInfo) -> Info:
    return Info(found.size, found.mtime_ns or 0)


def _said(error: OSError) -> str:
    return str(error).splitlines()[0].partition(" (Request ID")[0]


def _refusal(uri: str, error: OSError) -> str | None:
    """What is wrong, and the fix, if trying again will not help."""
    said = str(error)
    bucket = uri.partition("://")[2].partition("/")[0].partition("?")[0]
    if NO_BUCKET.search(said):
        return f"there is no bucket {bucket!r} for --results-dir {uri}; create it, or give another one"
    if DENIED.search(said):
        return (
            f"access to {uri} is denied ({_said(error)}); give credentials (AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY, ~/.aws/credentials or the machine's role) that may list, read, write and delete "
            f"there"
        )
    if MISTAKEN.search(said):
        return f"{uri} was refused ({_said(error)}); mend its endpoint_override, scheme or region"
    return None


_waited: defaultdict[str, float] = defaultdict(float)
"""Seconds that this process has spent asking whether a store can be used."""


@functools.cache
def connected(uri: str) -> ObjectStore:
    """The store at a URI, once it has answered: asked once a process, and for some seconds at most.

    Raises UsageError when it does not answer, or refuses.
    """
    store = ObjectStore(canonical(uri))
    _within_seconds(store.uri, ObjectStore(store.uri, patience=3 * FIRST_WAIT_SECONDS).folders)
    return store


def check_writable(store: ObjectStore) -> None:
    """Raise UsageError when objects cannot be put and removed."""
    brief = ObjectStore(store.uri, patience=3 * FIRST_WAIT_SECONDS)
    name = f"probe.{os.urandom(8).hex()}"

    def probe() -> None:
        brief.put(name, b"")
        brief.remove(name)

    _within_seconds(store.uri, probe)


def _within_seconds(uri: str, operation: Callable[[], object]) -> None:
    """Do it. Raises UsageError when it fails or takes too long: looking for credentials has no limit of its own."""
    failures: list[Exception] = []

    def attempt() -> None:
        try:
            operation()
        except (UsageError, OSError) as error:
            failures.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    began = time.monotonic()
    thread.start()
    thread.join(max(0.0, ANSWER_SECONDS - _waited[uri]))
    _waited[uri] += time.monotonic() - began
    if failures and isinstance(failures[0], UsageError):
        raise failures[0]
    if failures or thread.is_alive():
        said = str(failures[0]) if failures else f"{uri} does not answer within {ANSWER_SECONDS:g} seconds"
        raise UsageError(f"{said}; mend its endpoint or the network, or give another --results-dir")
