"""Searches and trainings on a cluster of hosts, here raylets of one machine: hosts are lost, come, and see less."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray._private.utils import check_version_info
from ray.cluster_utils import Cluster
from ray.exceptions import AuthenticationError

from orchestrator import growth, ray_cluster, searcher, workers
from results.history import TrialHistory
from results.schema import UsageError
from results.store import Experiment
from tests.background import (
    PATIENCE,
    SLOW_SPACE,
    epochs_in_log,
    running,
    wait_for_epochs,
    wait_until,
)
from tests.clusters import cluster_of
from tests.conftest import ROOT, CommandLine

SETTINGS = [
    *("dataset=digits", "backbone=small_cnn", "batch_size=46", "train_fraction=0.4", "max_epochs=1000"),
    *("warmup_epochs=1", "initial_image_size=none", "image_size=16"),
]
# A host that is added to ray.cluster_utils.Cluster leaves a socket to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
ENDLESS_SPACE = SLOW_SPACE.format(num_trials=2, max_epochs=1000)
ARGUMENTS = ["speedrun", "--set", *SETTINGS, "--results-dir", "runs", "--name", "many"]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster whose head has room for one worker."""
    with cluster_of(1) as cluster:
        yield cluster


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_whose_host_is_lost_goes_on_elsewhere_from_its_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(ENDLESS_SPACE)
    root, output = tmp_path / "runs" / "slow", tmp_path / "output"
    arguments = ["slow.py", "--results-dir", "runs", "--max-concurrent", "2", "--halving", "none"]
    second = cluster.add_node(num_cpus=1)

    def trials() -> list[TrialHistory]:
        return list(Experiment.open(root.parent, "slow").history.trials.values())

    def lost_trial_is_further() -> bool:
        pairs = zip(before, trials(), strict=True)
        return all(now.last_epoch > trial.last_epoch + 1 for trial, now in pairs if now.retries)

    with running(tmp_path, "orchestrator.search", *arguments, "--address", cluster.address, output=output) as process:
        wait_for_epochs(root, 1, process, output)
        wait_until(lambda: [trial.last_epoch >= 3 for trial in trials()] == [True, True], process, output)
        before = trials()
        cluster.remove_node(second, allow_graceful=False)
        wait_until(lambda: sum(trial.retries for trial in trials()) == 1, process, output)
        cluster.add_node(num_cpus=1)
        wait_until(lost_trial_is_further, process, output)
        process.terminate()
        assert process.wait(timeout=PATIENCE) == 130, output.read_text()
    experiment = Experiment.open(root.parent, "slow")
    assert sorted(trial.retries for trial in trials()) == [0, 1]
    for _, epochs in experiment.epochs().groupby("trial_id"):
        assert epochs["epoch"].tolist() == list(range(1, len(epochs) + 1))
    for trial in before:
        later = experiment.history.trials[trial.trial_id]
        assert [e.at for e in later.epochs[: len(trial.epochs)]] == [e.at for e in trial.epochs]


@pytest.mark.ray
@pytest.mark.slow
def test_an_elastic_group_shrinks_with_a_lost_host_and_grows_with_a_new_one(cluster: Cluster, tmp_path: Path) -> None:
    root, output = tmp_path / "runs" / "many", tmp_path / "output"
    second = cluster.add_node(num_cpus=1)
    with running(
        tmp_path, "orchestrator.train", *ARGUMENTS, "--elastic", "1:2", "--address", cluster.address, output=output
    ) as process:
        wait_for_epochs(root, 2, process, output)
        assert "\n2 workers, CPU\n" in output.read_text()
        cluster.remove_node(second, allow_graceful=False)
        wait_until(lambda: "with 1 worker, CPU" in output.read_text(), process, output)
        wait_for_epochs(root, epochs_in_log(root) + 2, process, output)
        cluster.add_node(num_cpus=1)
        wait_until(lambda: "with 2 workers, CPU" in output.read_text(), process, output)
        wait_for_epochs(root, epochs_in_log(root) + 2, process, output)
        process.terminate()
        assert process.wait(timeout=PATIENCE) == 130, output.read_text()
    epochs = Experiment.open(root.parent, "many").epochs()["epoch"].tolist()
    assert epochs == list(range(1, len(epochs) + 1))


def test_what_an_autoscaled_cluster_may_get_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: {"CPU": 0.0, "memory": 8.0})
    monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: [])
    monkeypatch.setattr(ray_cluster.ray_state, "get_max_resources_from_cluster_config", lambda: {"CPU": 32, "GPU": 4})
    assert ray_cluster.cluster_room() == {"CPU": 32, "GPU": 4, "memory": 8}
    chosen = searcher.choose_resources(
        "auto", cpus_per_trial=4, gpus_per_trial=None, max_concurrent=None, num_trials=100
    )
    assert (chosen.device, chosen.max_concurrent) == ("cuda", 4)
    assert searcher.must_grow(chosen)
    monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    assert not searcher.must_grow(chosen)
    assert workers.choose_device("auto", workers.Workers(4, 4)) == "cuda"
    with pytest.raises(UsageError, match=r"--num-workers 5, but Ray sees 4 GPUs and each worker takes one; lower it"):
        workers.choose_device("auto", workers.Workers(5, 5))


def test_on_a_head_that_ray_up_has_made_room_is_what_its_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: {"memory": 8.0})
    monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: [{"Labels": {"ray.io/node-group": "head.cpu"}}])
    monkeypatch.setattr(ray_cluster.ray_state, "get_max_resources_from_cluster_config", lambda: None)
    assert ray_cluster.cluster_room() == {"memory": 8}
    (tmp_path / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(config))
    # Ten workers at most: 3 x (8 GPUs, 96 CPUs) and 7 x (1 GPU, 4 CPUs), or 10 that are marked one_gpu.
    assert ray_cluster.cluster_room() == {"memory": 8, "GPU": 31, "CPU": 316, "one_gpu": 10}
    monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: [{"Labels": {"ray.io/node-group": "of.another"}}])
    assert ray_cluster.cluster_room() == {"memory": 8}
    monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: [{"Labels": {}}])
    assert ray_cluster.cluster_room() == {"memory": 8}


def test_on_kubernetes_room_is_what_the_heads_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    head = yaml.safe_load((ROOT / "cluster.kuberay.yaml").read_text().split("---")[0])["spec"]["headGroupSpec"]
    (variable,) = head["template"]["spec"]["containers"][0]["env"]
    monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: {"memory": 8.0})
    monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: [{"Labels": {"ray.io/node-group": "headgroup"}}])
    monkeypatch.setattr(ray_cluster.ray_state, "get_max_resources_from_cluster_config", lambda: None)
    monkeypatch.setenv(variable["name"], variable["value"])
    chosen = searcher.choose_resources(
        "auto", cpus_per_trial=1, gpus_per_trial=None, max_concurrent=None, num_trials=100
    )
    assert (chosen.device, chosen.max_concurrent) == ("cuda", 16)
    monkeypatch.setenv(variable["name"], "16 GPUs")
    with pytest.raises(UsageError, match=r"MAX_RESOURCES is '16 GPUs'; wanted the most that the cluster may have"):
        ray_cluster.cluster_room()


def test_a_cluster_of_another_version_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**settings: object) -> None:
        check_version_info({"ray_version": "2.1.0", "python_version": "3.9.1"}, "here", raise_on_mismatch=True)

    monkeypatch.setattr(ray_cluster.ray, "init", init)
    with (
        pytest.raises(UsageError, match=r"the cluster has Ray 2.1.0 and Python 3.9.1, this process Ray .* install the"),
        ray_cluster.ray_cluster("auto", threads=1),
    ):
        pass


def test_a_cluster_that_wants_a_token_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**settings: object) -> None:
        raise AuthenticationError("Token authentication is enabled, but no token was found")

    monkeypatch.setattr(ray_cluster.ray, "init", init)
    with (
        pytest.raises(UsageError, match=r"the cluster wants a token .* give the one in ~/.ray/auth_token of its head"),
        ray_cluster.ray_cluster("auto", threads=1),
    ):
        pass


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n"])
def test_where_something_else_listens_is_no_cluster(greeting: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "PROBE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            with contextlib.suppress(OSError):  # the server is closed
                connection, _ = server.accept()
                with connection:
                    connection.sendall(greeting)
                    connection.recv(1024)
                    time.sleep(1.0 if not greeting else 0.0)

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(UsageError, match=r"no Ray cluster answers .* \((timed out|something else listens)\); give"):
            ray_cluster.check_address(f"127.0.0.1:{server.getsockname()[1]}")


def test_ray_clients_addresses_are_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"ray://head:10001 is Ray Client's, .* run the command on the head"):
        ray_cluster.check_address("ray://head:10001")


def can_hide_folders() -> bool:
    """Whether a process can be given a view of the file system of its own."""
    tried = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    return tried.returncode == 0


needs_mount_namespaces = pytest.mark.skipif(
    sys.platform != "linux" or not can_hide_folders(), reason="mount namespaces need root on Linux"
)


@contextlib.contextmanager
def host_that_does_not_see(folder: Path, cluster: Cluster, log: Path) -> Iterator[None]:
    """Another host of the cluster, once it has joined; what others write to the folder it does not see."""
    start = (
        f"mount -t tmpfs none {folder} && exec {sys.executable} -m ray.scripts.scripts start --block "
        f"--num-cpus 1 --address {cluster.address} --disable-usage-stats"
    )
    hosts = len(cluster.global_state._live_node_ids()) + 1
    with log.open("wb") as output:
        host = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", start], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while len(cluster.global_state._live_node_ids()) < hosts:
            assert host.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        os.killpg(host.pid, 15)
        host.wait(timeout=PATIENCE)


@pytest.mark.ray
@pytest.mark.slow
@needs_mount_namespaces
def test_a_results_folder_that_another_host_does_not_see_is_refused_before_training(
    cluster: Cluster, tmp_path: Path, command: CommandLine
) -> None:
    (tmp_path / "runs").mkdir()
    with host_that_does_not_see(tmp_path / "runs", cluster, tmp_path / "host"):
        done = command("orchestrator.train", *ARGUMENTS, "--num-workers", "2", "--address", cluster.address)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"--results-dir {tmp_path}/runs is not seen from" in done.stderr
    assert not (tmp_path / "runs" / "many").exists()


@pytest.mark.ray
@pytest.mark.slow
@needs_mount_namespaces
def test_a_host_that_joins_later_and_does_not_see_the_results_ends_the_search_with_the_fix(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(growth.VARIABLE, '{"CPU": 2}')
    (tmp_path / "slow.py").write_text(ENDLESS_SPACE)
    root, output = tmp_path / "runs" / "slow", tmp_path / "output"
    arguments = ["slow.py", "--results-dir", "runs", "--max-concurrent", "2", "--address", cluster.address]
    with running(tmp_path, "orchestrator.search", *arguments, output=output) as process:
        wait_for_epochs(root, 1, process, output)
        with host_that_does_not_see(tmp_path / "runs", cluster, tmp_path / "host"):
            assert process.wait(timeout=PATIENCE) == 1
    said = output.read_text()
    assert re.search(rf"error: {root} is not there on .*; give a --results-dir that all hosts share", said), said
    assert "what has been recorded is safe" in said
