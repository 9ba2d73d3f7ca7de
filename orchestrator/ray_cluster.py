"""A Ray cluster as its drivers see it: being connected, what it may come to have, which hosts see the results."""

from __future__ import annotations

import os
import re
import socket
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import ray
import ray._private.utils as ray_utils
from ray._private.node import Node
from ray._private.state import state as ray_state
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator import cli
from orchestrator.growth import NODE_TYPE_LABEL, most_resources
from results.objects import is_remote
from results.schema import UsageError

PROBE_SECONDS = 5.0
SECONDS_TO_ANSWER = 60.0
TUNE_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the event log is what is kept; Tune's own files are thrown away
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's would end with status 0 and unfinished trials
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


LOCAL_SETTINGS = {
    "RAY_worker_niceness": "0",  # by default 15: next to other work they would hardly start
    "RAY_prestart_worker_first_driver": "0",  # one a CPU, of which Tune uses none
}
UNUSED_DAEMONS = ("start_monitor", "start_log_monitor", "start_api_server")
QUIET = {"log_to_driver": False, "logging_level": "error"}


def worker_environment(*, threads: int) -> dict[str, str]:
    """Variables that a worker's process must have before torch is imported: idle OpenMP threads otherwise spin."""
    return {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads)}


@contextmanager
def ray_cluster(address: str | None, *, threads: int) -> Iterator[None]:
    """Be connected to a cluster, or to a local one of its own whose workers inherit this process's environment.

    `threads`: of a trial's arithmetic. Raises UsageError when there is no cluster at the address.
    """
    with ClusterStart(address, threads=threads) as start:
        start.finish()
        yield


class ClusterStart:
    """A connection to a Ray cluster that is being made: `finish` waits for it, the end of the block closes it.

    A local cluster, which takes seconds to start, starts in the background when the block begins. `threads`: of a
    trial's arithmetic.
    """

    def __init__(self, address: str | None, *, threads: int) -> None:
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._environment = worker_environment(threads=threads)
        self._local = None if self._address else LocalRay()

    def __enter__(self) -> ClusterStart:
        os.environ.update(TUNE_SETTINGS)
        if self._local:
            os.environ.update(self._environment)
            for name, value in LOCAL_SETTINGS.items():
                os.environ.setdefault(name, value)
            self._local.start()
        return self

    def finish(self) -> None:
        """Wait until the cluster is there. Raises UsageError when there is none at the address."""
        if self._local:
            self._local.wait()
        else:
            assert self._address is not None
            connect(self._address, self._environment)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with cli.INTERRUPTS.deferred():
            if self._local:
                self._local.stop()
            else:
                ray.shutdown()


@contextmanager
def fewer_daemons() -> Iterator[None]:
    """Start Ray without what a local training has no use for: autoscaler, log monitor, API server, dashboard's agent.

    Each takes 1 to 2 s of a CPU, and on a busy machine Ray gives up: it waits no longer than 15 s for the agent. Ray
    has no public switches for them; a version that does not have what is replaced here starts them all.
    """
    nothing = {name: lambda *_, **__: None for name in UNUSED_DAEMONS}
    agent = {"get_dashboard_dependency_error": lambda: ImportError("not wanted")}
    with replaced(Node, nothing), replaced(ray_utils, agent):
        yield


@contextmanager
def replaced(owner: object, replacements: Mapping[str, object]) -> Iterator[None]:
    """Within the block, attributes that an object has are others."""
    before = {name: getattr(owner, name) for name in replacements if hasattr(owner, name)}
    for name in before:
        setattr(owner, name, replacements[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


class LocalRay(threading.Thread):
    """Ray on this machine, for this process. All that is Ray's starts and ends in this thread.

    The kernel kills Ray's daemons when the thread that started them ends (PR_SET_PDEATHSIG), so it stays.
    """

    def __init__(self) -> None:
        super().__init__(name="ray", daemon=True)
        self._ready, self._over = threading.Event(), threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Start Ray, and stop it when it is no longer needed."""
        try:
            with fewer_daemons():
                ray.init(address="local", include_dashboard=False, **QUIET)
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            self._error = error
        self._ready.set()
        self._over.wait()
        ray.shutdown()

    def wait(self) -> None:
        """Wait until Ray runs. Raises what kept it from starting."""
        self._ready.wait()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Stop Ray, also one that is still starting, and wait until it has stopped."""
        self._over.set()
        self.join()


def connect(address: str, environment: dict[str, str]) -> None:
    """Connect to a running cluster whose workers get an environment. Raises UsageError when there is none."""
    try:
        check_address(address)
        ray.init(address=address, runtime_env={"env_vars": environment}, **QUIET)
    except (OSError, ValueError) as error:
        raise UsageError(_nobody_answers(address, str(error))) from error
    except AuthenticationError as error:
        raise UsageError(
            f"--address {address}: the cluster wants a token that this process has not; give the one in "
            f"~/.ray/auth_token of its head, and RAY_AUTH_MODE=token"
        ) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise UsageError(f"--address {address}: {_versions(str(error))}") from error


def check_address(address: str | None) -> None:
    """Raise UsageError when no Ray cluster can be at an address, by default RAY_ADDRESS's.

    Ray itself would try for minutes, or for ever where something else listens.
    """
    address = address or os.environ.get("RAY_ADDRESS") or ""
    if "://" in address:
        raise UsageError(
            f"--address {address} is Ray Client's, which knows too little of a cluster; run the command on the head "
            f"with --address auto (ray exec, ray job submit)"
        )
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit():
        return
    try:
        with socket.create_connection((host, int(port)), timeout=PROBE_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "0" and not _speaks_http2(connection):
                raise UsageError(_nobody_answers(address, "something else listens"))
    except (OSError, OverflowError) as error:
        raise UsageError(_nobody_answers(address, str(error))) from error


def _nobody_answers(address: str, reason: str) -> str:
    return (
        f"--address {address}: no Ray cluster answers there ({reason}); give the address that ray start printed, auto "
        f"on a host of the cluster, or none for a local one"
    )


def _speaks_http2(connection: socket.socket) -> bool:
    """Whether the other side greets as gRPC does, by HTTP/2 (RFC 9113, 3.4): its first frame is SETTINGS, type 4."""
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + bytes([4, 0]) + bytes(4))
    head = b""
    while len(head) < 4:
        received = connection.recv(4 - len(head))
        if not received:
            return False
        head += received
    return head[3] == 4


def _versions(text: str) -> str:
    """Ray's paragraph on versions that differ, in a sentence."""
    found = re.findall(r"(Ray|Python): (\S+)", text)
    theirs, ours = (" and ".join(" ".join(pair) for pair in pairs) for pairs in (found[:2], found[2:]))
    return f"the cluster has {theirs}, this process {ours}; install the same versions here and there"


def cluster_room() -> dict[str, float]:
    """The resources of the cluster: those it has, or may come to have where it grows by itself."""
    there = ray.cluster_resources()
    node_types = {node["Labels"][NODE_TYPE_LABEL] for node in ray.nodes() if NODE_TYPE_LABEL in node["Labels"]}
    most = ray_state.get_max_resources_from_cluster_config() or most_resources(node_types)
    return {name: max(float(there.get(name, 0)), float(most.get(name, 0))) for name in {*there, *most}}


def check_reachable(results_dir: str) -> None:
    """Raise UsageError when some host of the cluster does not see the results folder. All see an object store."""
    if is_remote(results_dir):
        return
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)]
    here = ray.get_runtime_context().get_node_id()
    others = {node["NodeID"]: node["NodeManagerHostname"] for node in nodes if node["NodeID"] != here}
    if not others:
        return
    folder = Path(results_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe.{uuid.uuid4().hex}.tmp"
    probe.touch()
    try:
        asked = {
            host: _sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(str(probe))
            for node, host in others.items()
        }
        blind = [host for host, answer in asked.items() if not ray.get(answer, timeout=SECONDS_TO_ANSWER)]
    except RayError as error:
        raise UsageError(
            f"not all of {', '.join(sorted(asked))} answer, on which workers may train: {error}"
        ) from error
    finally:
        probe.unlink()
    if blind:
        raise UsageError(not_reachable(folder, blind))


def not_reachable(folder: Path, hosts: list[str]) -> str:
    """What is wrong with a results folder that some hosts do not see, and the fix."""
    return (
        f"--results-dir {folder} is not seen from {', '.join(sorted(hosts))}, where workers may train and write "
        f"checkpoints; give a folder that all hosts share, such as a network file system, or s3://BUCKET/PREFIX"
    )


@ray.remote(num_cpus=0)
def _sees(path: str) -> bool:
    return os.path.exists(path)
