"""An S3 server of this machine for tests, and a gate before it that can be shut, as in an outage."""

from __future__ import annotations

import logging
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from moto.server import ThreadedMotoServer
from pyarrow import fs

BUCKET = "experiments"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Gate(socketserver.ThreadingTCPServer):
    """Passes connections on to a port of a host, or refuses them all while it is shut."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, *, host: str = "127.0.0.1", listens: int = 0) -> None:
        self.behind = (host, port)
        self.is_shut = False
        self.num_refused = 0
        self.num_bytes_sent = 0
        super().__init__((host, listens), _Passed)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])

    def passed_on(self, client: socket.socket) -> None:
        """Serve one connection until either side ends it."""
        if self.is_shut:
            self.num_refused += 1
            return
        with socket.create_connection(self.behind) as server:
            back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
            back.start()
            self._pump(client, server, count=True)
            back.join()

    def _pump(self, source: socket.socket, target: socket.socket, *, count: bool = False) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self.is_shut:
                    self.num_refused += 1
                    break
                self.num_bytes_sent += len(data) if count else 0
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class _Passed(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.server.passed_on(self.request)  # type: ignore[attr-defined]


@contextmanager
def s3_server() -> Iterator[int]:
    """An S3 server with an empty bucket. Yields its port."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    try:
        fs.S3FileSystem(
            access_key="key",
            secret_key="secret",
            endpoint_override=f"127.0.0.1:{port}",
            scheme="http",
            allow_bucket_creation=True,
        ).create_dir(BUCKET)
        yield port
    finally:
        server.stop()


def uri(port: int, prefix: str = "runs", *, bucket: str = BUCKET) -> str:
    """What `--results-dir` is given."""
    return f"s3://{bucket}/{prefix}?endpoint_override=127.0.0.1:{port}&scheme=http"
