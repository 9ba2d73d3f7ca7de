"""A Ray cluster as its drivers see it: being connected, what it may come to have, which hosts see the results."""

from __future__ import annotations

import os
import re
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray._private.state import state as ray_state
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.growth import NODE_TYPE_LABEL, most_resources
from results.objects import is_remote
from results.schema import UsageError
from trainables.tune_trial import worker_environment

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


@contextmanager
def ray_cluster(address: str | None, *, threads: int) -> Iterator[None]:
    """Be connected to a cluster, or to a local one of its own whose workers inherit this process's environment.

    `threads`: of a trial's arithmetic. Raises UsageError when there is no cluster at the address.
    """
    environment = worker_environment(threads=threads)
    os.environ.update(TUNE_SETTINGS)
    address = address or os.environ.get("RAY_ADDRESS")
    check_address(address)
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if address:
        try:
            ray.init(address=address, runtime_env={"env_vars": environment}, **quiet)
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
    else:
        os.environ.update(environment)
        ray.init(address="local", include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


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
