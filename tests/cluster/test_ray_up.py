"""The shipped cluster.yaml, driven by `ray up` on a fake AWS whose instances are hosts: all that happens to a cluster.

pytest tests/cluster -m cluster -s        # all of it; without -m only what must work before anything can happen
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import yaml

from results.history import TrialHistory
from results.lock import LAPSED_SECONDS
from results.schema import UsageError
from results.store import Experiment
from tests.cluster import account, hosts
from tests.cluster.cloud import CREDENTIALS, LAPTOP, LIVE, PORT, REGION, S3_PORT, client, instances
from tests.cluster.hosts import GATEWAY
from tests.cluster.patch import YOUR_RESULTS, YOUR_SECURITY_GROUP, patched
from tests.cluster.session import CLUSTER_FILE, PATIENCE, Running, Session
from tests.conftest import ROOT, command_environment
from tests.object_storage.server import Gate

RESULTS = f"s3://{account.BUCKET}/runs"
NAME = "lab"
TRIALS, EPOCHS = 6, 60
# Of the machine's speed nothing is assumed: a trial that is lost goes on from where it was, so that it is always one
# with most of its epochs to come, however many others end meanwhile. Two losses of one trial is what a search retries.
OUTAGE_SECONDS = 30.0
SHORT_CUT_SECONDS = 5.0  # Ray gives a silent node up after half a minute at the earliest
# There are no GPUs here: a trial takes all four CPUs of a worker, so it is one trial a machine as with its one GPU.
SEARCH = (
    "cd ~/project && python -m orchestrator.search digits --address auto --results-dir $RESULTS_DIR "
    f"--name {NAME} --halving none --max-concurrent 2 --device cpu --cpus-per-trial 4"
)
LONG_SEARCH = f"{SEARCH} --num-trials {TRIALS} --max-epochs {EPOCHS}"
TRAINING_EPOCHS = 3
TRAINING = (
    "cd ~/project && python -m orchestrator.train speedrun --address auto --results-dir $RESULTS_DIR "
    f"--name trained --num-workers 2 --device cpu --max-epochs {TRAINING_EPOCHS} "
    "--set dataset=digits backbone=small_cnn image_size=8 initial_image_size=none batch_size=64 warmup_epochs=1"
)
DASHBOARD = "/dev/tcp/localhost/8265"
NOT_GONE = ("pending", "running", "stopping", "stopped")


def test_the_patched_file_differs_only_in_what_it_must() -> None:
    shipped = (ROOT / "cluster.yaml").read_text()
    there = patched(shipped, results=RESULTS, security_group="sg-1")
    filled_in = shipped.replace(YOUR_RESULTS, RESULTS).replace(YOUR_SECURITY_GROUP, "sg-1")
    differences = dict(differing(yaml.safe_load(filled_in), yaml.safe_load(there)))
    assert differences == {"provider.use_internal_ips": (None, True), "idle_timeout_minutes": (20, 1)}


def differing(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Where two values differ, and what stands there in each."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from differing(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
    elif one != other:
        yield path, (one, other)


@pytest.fixture
def session(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    """A fake AWS with an account that has been prepared, and a laptop with the cluster file. Nothing is left of it."""
    reason = hosts.why_not()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("lab")
    lab = hosts.Lab(folder / "hosts", folder / "shared")
    lab.folder.mkdir()
    lab.shared.mkdir()
    lab.shared.chmod(0o777)
    monkeypatch.setenv("HYPERPARAMETER_ENSEMBLES_CACHE", str(folder / "copies"))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.setenv(variable, CREDENTIALS[variable])
    log = folder / "cloud.log"
    with log.open("wb") as output:
        cloud = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.cloud", str(lab.folder), str(lab.shared)],
            cwd=ROOT,
            env=command_environment(),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that an interrupt reaches it by its standard input only
        )
    assert cloud.stdin is not None
    try:
        deadline = time.monotonic() + PATIENCE
        while " ready\n" not in log.read_text():
            assert cloud.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        text = (ROOT / "cluster.yaml").read_text()
        text = patched(text, results=RESULTS, security_group=account.prepare())
        (lab.shared / "cluster.yaml").write_text(text)
        with Gate(PORT, host=str(GATEWAY), listens=S3_PORT) as gate:
            yield Session(lab, f"{RESULTS}?endpoint_override={GATEWAY}:{PORT}&scheme=http", gate)
    finally:
        cloud.stdin.close()
        cloud.wait(timeout=PATIENCE)
    assert cloud.returncode == 0, log.read_text()
    assert hosts.left() == {"namespaces": [], "links": []}


def ray_up(session: Session) -> str:
    """Make the cluster. Returns its head, which is all there is."""
    with session.step("token and check of the cluster file"):
        session.run("ray get-auth-token --generate")
        assert "0 errors" in session.run(f"python -m orchestrator.cluster check {CLUSTER_FILE}")
    with session.step("ray up"):
        session.run(f"ray up -y {CLUSTER_FILE}")
        assert kinds() == ["m6i.2xlarge on demand"]
        return session.head()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_search_makes_the_cluster_grow_and_leaves_its_results_in_s3(session: Session) -> None:
    head = ray_up(session)
    with session.step("a search of two trials on workers that come for it"):
        session.run(f"ray exec {CLUSTER_FILE} '{SEARCH} --num-trials 2 --max-epochs 3'")
    with session.step("ray down"):
        session.run(f"ray down -y {CLUSTER_FILE}")
        check_nothing_is_left(session)
    trials = session.experiment(NAME).trials()
    assert trials["status"].tolist() == ["completed", "completed"]
    assert head not in set(trials["node"])
    show(session)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(5400)
def test_a_search_ends_complete_whatever_happens_to_its_cluster(session: Session) -> None:
    head = ray_up(session)
    with session.step("ray up once more"):
        session.run(f"ray up -y {CLUSTER_FILE}")
        assert [instance["InstanceId"] for instance in instances(*NOT_GONE)] == [head]
        assert "no active nodes" in session.run(f"ray exec {CLUSTER_FILE} 'ray status'")
    with session.running(f"ray exec {CLUSTER_FILE} '{LONG_SEARCH}'") as search:
        with session.step("a search: two spot workers come, each trains a trial"):
            search.wait_until(lambda: len(nodes_at_work(session)) == 2)
            assert head not in nodes_at_work(session)
            assert "waiting for the cluster to grow" in search.output.read_text()
            assert kinds() == ["g6.xlarge spot", "g6.xlarge spot", "m6i.2xlarge on demand"]
        with session.step("an instance terminated in mid-trial: the trial goes on elsewhere from its checkpoint"):
            lose_and_see_it_go_on(session, search, terminate)
        with session.step(f"a cable cut for {SHORT_CUT_SECONDS:g} s: the trial goes on where it is"):
            trial = at_work(session, search)
            retries, epoch, node = trial.retries, trial.last_epoch, trial.epochs[-1].node
            session.lab.cut(node)
            time.sleep(SHORT_CUT_SECONDS)
            session.lab.heal(node)
            search.wait_until(lambda: progress(session, trial) >= min(epoch + 3, EPOCHS))
            assert now(session, trial).retries == retries
            assert now(session, trial).epochs[-1].node == node
        with session.step("a cable cut until Ray gives the node up, then healed: the trial goes on elsewhere"):
            cut = lose_and_see_it_go_on(session, search, session.lab.cut)
            if cut in session.lab.names():  # else the autoscaler has terminated it already
                session.lab.heal(cut)
        with session.step(f"S3 silent for {OUTAGE_SECONDS:g} s: the trial goes on where it is, with every epoch"):
            trial = at_work(session, search)
            before = now(session, trial)
            refused = session.gate.num_refused
            session.gate.is_shut = True
            time.sleep(OUTAGE_SECONDS)
            assert session.gate.num_refused > refused + 10
            session.gate.is_shut = False
            search.wait_until(lambda: progress(session, trial) >= min(before.last_epoch + 3, EPOCHS))
            assert now(session, trial).retries == before.retries
            check_nothing_lost(session.experiment(NAME), before=[before])
        with session.step("the head's driver killed"):
            at_work(session, search)
            session.lab.run(head, ["pkill", "-KILL", "-f", "python -m orchestrator.search"])
            assert search.wait() != 0
            left = session.experiment(NAME)
            assert left.history.state == "running"
            assert left.history.unfinished
            recorded = history(session)
    with (
        session.step("--resume; then the head terminated, and all that it had on its disk"),
        session.running(f"ray exec {CLUSTER_FILE} '{LONG_SEARCH} --resume'") as search,
    ):
        at_work(session, search)
        recorded += history(session)
        terminate(head)
        assert search.wait() != 0
    with session.step("ray up: another head"):
        session.run(f"ray up -y {CLUSTER_FILE}")
        first_head, head = head, session.head()
        assert head != first_head
    with session.step("--resume from what is in S3, to the end"):
        while True:
            with session.running(f"ray exec {CLUSTER_FILE} '{LONG_SEARCH} --resume'") as search:
                if search.wait() == 0:
                    break
                # Nobody can know that the first head's driver is gone; after a minute of silence it counts as gone.
                assert "last heard of" in search.printed(), search.printed()
            time.sleep(LAPSED_SECONDS / 4)
    check_nothing_lost(session.experiment(NAME), before=recorded)
    check_complete(session.experiment(NAME), heads={first_head, head})
    with session.step("an ensemble of the trials, by a job through the dashboard's tunnel"):
        choose = "cd ~/project && python -m orchestrator.ensemble --results-dir $RESULTS_DIR --top-k 5"
        with session.running(f"ray dashboard {CLUSTER_FILE}") as tunnel:
            tunnel.wait_until(lambda: session.lab.run(LAPTOP, ["bash", "-c", f": < {DASHBOARD}"]).returncode == 0)
            submit = "RAY_AUTH_MODE=token ray job submit --address http://localhost:8265"
            assert "succeeded" in session.run(f"{submit} -- bash -c '{choose}'")
        assert session.experiment(NAME).ensemble_ids() == ["e0001"]
    with session.step("a training by two workers"):
        print(session.run(f"ray exec {CLUSTER_FILE} '{TRAINING}'"))
        trained = session.experiment("trained")
        assert trained.history.state == "finished"
        assert len(trained.epochs()) == TRAINING_EPOCHS
        assert head not in set(trained.trials()["node"])
    with session.step("the workers go when nothing runs"):
        session.wait_until(lambda: [instance["InstanceId"] for instance in instances(*NOT_GONE)] == [head])
    with session.step("ray down"):
        session.run(f"ray down -y {CLUSTER_FILE}")
        check_nothing_is_left(session)
    show(session)


def kinds() -> list[str]:
    """The machines that there are."""
    return sorted(f"{i['InstanceType']} {i.get('InstanceLifecycle', 'on demand')}" for i in instances(*LIVE))


def history(session: Session) -> list[TrialHistory]:
    """The trials so far."""
    try:
        return list(session.experiment(NAME).history.trials.values())
    except UsageError:  # the search has not begun
        return []


def now(session: Session, trial: TrialHistory) -> TrialHistory:
    """A trial as it stands now."""
    return session.experiment(NAME).history.trials[trial.trial_id]


def progress(session: Session, trial: TrialHistory) -> int:
    """The newest epoch of a trial."""
    return now(session, trial).last_epoch


def running_trials(session: Session) -> list[TrialHistory]:
    """Trials that train on a machine that there is."""
    there = {instance["InstanceId"] for instance in instances(*LIVE)}
    unfinished = [trial for trial in history(session) if trial.ended is None and trial.last_epoch >= 3]
    return [trial for trial in unfinished if trial.epochs[-1].node in there]


def nodes_at_work(session: Session) -> set[str]:
    """The machines on which trials train."""
    return {trial.epochs[-1].node for trial in running_trials(session)}


def at_work(session: Session, search: Running) -> TrialHistory:
    """A trial that trains now, having had new epochs since this was asked: of several the one with most to come."""
    before = {trial.trial_id: trial.last_epoch for trial in history(session)}
    found: list[TrialHistory] = []

    def one_trains() -> bool:
        going_on = [t for t in running_trials(session) if t.last_epoch > before.get(t.trial_id, 0)]
        found[:] = [t for t in going_on if t.last_epoch <= EPOCHS * 2 // 3]
        return bool(found)

    search.wait_until(one_trains)
    return min(found, key=lambda trial: trial.last_epoch)


def lose_and_see_it_go_on(session: Session, search: Running, lose: Callable[[str], None]) -> str:
    """Lose the machine on which a trial trains; see that trial go on on another one, from where it was.

    Returns the machine.
    """
    trial = at_work(session, search)
    node = trial.epochs[-1].node
    lose(node)
    search.wait_until(lambda: now(session, trial).retries == trial.retries + 1)
    then = now(session, trial)
    least = then.last_epoch

    def goes_on() -> bool:
        # A trial that began anew would write a checkpoint of its first epoch.
        assert epochs_in_checkpoint(session, trial) >= least
        return progress(session, trial) > least

    search.wait_until(goes_on)
    later = now(session, trial).epochs[least:]
    assert node not in {epoch.node for epoch in later}
    return node


def epochs_in_checkpoint(session: Session, trial: TrialHistory) -> int:
    """How many epochs the stored state of a trial has behind it; all of them when it has ended and is tidied up."""
    files = session.experiment(NAME).files(trial.trial_id)
    try:
        with files.open(files.resume) as file:
            return len(torch.load(file, weights_only=True)["progress"]["results"])
    except FileNotFoundError:
        return EPOCHS


def terminate(node: str) -> None:
    """Take an instance away without a warning."""
    client("ec2").terminate_instances(InstanceIds=[node])


def check_nothing_lost(experiment: Experiment, *, before: list[TrialHistory]) -> None:
    """Whatever was recorded before is recorded still."""
    for trial in before:
        later = experiment.history.trials[trial.trial_id]
        assert [e.at for e in later.epochs[: len(trial.epochs)]] == [e.at for e in trial.epochs]


def check_complete(experiment: Experiment, *, heads: set[str]) -> None:
    """Every trial is there once and whole."""
    trials, epochs = experiment.trials(), experiment.epochs()
    assert sorted(trials["trial_id"]) == [f"t{number:05d}" for number in range(TRIALS)]
    assert set(trials["status"]) == {"completed"}
    assert not heads & set(trials["node"])
    for _, of_trial in epochs.groupby("trial_id"):
        assert of_trial["epoch"].tolist() == list(range(1, EPOCHS + 1))
    assert len(epochs) == TRIALS * EPOCHS
    for trial_id in trials["trial_id"]:
        assert set(experiment.stored_counts(trial_id)["best"]) == {"select", "estimate", "test"}


def check_nothing_is_left(session: Session) -> None:
    """What docs/cluster.md has a user look for, and the hosts themselves."""
    assert instances(*NOT_GONE) == []
    ec2 = client("ec2")
    wanted = [{"Name": "state", "Values": ["open", "active"]}]
    assert ec2.describe_spot_instance_requests(Filters=wanted)["SpotInstanceRequests"] == []
    assert ec2.describe_volumes(Filters=[{"Name": "status", "Values": ["available"]}])["Volumes"] == []
    session.wait_until(lambda: session.lab.names() == [LAPTOP])


def show(session: Session) -> None:
    """Where each trial ended up, and what took how long."""
    columns = ["trial_id", "status", "node", "retries", "epochs_trained", "val_accuracy", "train_seconds"]
    print(f"\n{REGION}, made of namespaces, {time.monotonic() - session.started:.0f} s in all")
    print(session.experiment(NAME).trials().sort_values("trial_id")[columns].to_string(index=False))
