"""How many trials a minute a search ends on three hosts against one, and what a trial costs the driver.

    python -m tests.cluster.throughput            # root; about twelve minutes

Three hosts on a machine of two cores would share what one has alone, and the ratio would say nothing. So each worker
host, Ray's daemons and the trial together, is held to CORES of a core by a control group, with one trial of one thread:
three of them and the driver leave the machine room, and each host is as fast as the one. What is left to see is whether
Ray, the ledger and the driver keep all hosts busy. It says nothing about hosts that are faster, or about more of them.

Searches on one host and on three alternate, in one Ray cluster each. Counted is from the end of the first trial of each
host to the end of the last, so that starting workers is left out. The driver's cost is the processor time of its
process, without Ray's daemons: what the larger search has taken more than the smaller, divided by the trials that it
has more, so that what is done once is left out too.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from results.store import Experiment
from tests.cluster.hosts import NETWORK, SYSTEM_PATH, Lab, network, why_not
from tests.conftest import ROOT

CORES = 0.4
HOSTS = (1, 3)
ROUNDS = 3
TRIALS_A_HOST = 15
EPOCHS = 10
PERIOD_US = 100_000
CGROUPS = Path("/sys/fs/cgroup")
PROFILE = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{SYSTEM_PATH}"}


@contextmanager
def control_group(name: str) -> Iterator[Path]:
    """A control group that holds its processes to CORES of a core, of either version of Linux's interface."""
    old = (CGROUPS / "cpu").is_dir()
    folder = (CGROUPS / "cpu" if old else CGROUPS) / name
    folder.mkdir()
    try:
        quota = int(CORES * PERIOD_US)
        (folder / ("cpu.cfs_quota_us" if old else "cpu.max")).write_text(str(quota) if old else f"{quota} {PERIOD_US}")
        yield folder
    finally:
        folder.rmdir()


@contextmanager
def cluster(lab: Lab, workers: int) -> Iterator[None]:
    """A Ray cluster of a head without CPUs and so many held workers of one CPU."""
    head = str(NETWORK[10])
    with network(), ExitStack() as stack:
        groups = [stack.enter_context(control_group(f"hpelab{number}")) for number in range(workers)]
        stack.callback(lambda: [lab.shut_down(name) for name in lab.names()])
        lab.boot("head", head, shows=[ROOT])
        start(lab, "head", ["--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false"])
        for number, group in enumerate(groups):
            lab.boot(f"worker{number}", str(NETWORK[11 + number]), shows=[ROOT])
            start(lab, f"worker{number}", [f"--address={head}:6379", "--num-cpus=1"], within=group)
        yield


def start(lab: Lab, name: str, arguments: Sequence[str], *, within: Path | None = None) -> None:
    """`ray start` on a host, as what is in a control group."""
    command = lab.inside(name, ["ray", "start", "--disable-usage-stats", *arguments], profile=PROFILE)
    if within is not None:
        command = ["bash", "-c", f'echo $$ > {within}/cgroup.procs && exec "$@"', "bash", *command]
    subprocess.run(command, check=True, stdout=subprocess.PIPE)


@dataclass(frozen=True)
class Measured:
    """A search: its throughput, and the processor time of its driver in seconds."""

    trials_a_minute: float
    driver_seconds: float


def measure(lab: Lab, hosts: int, name: str) -> Measured:
    """A search with as many trials a host on any number of hosts."""
    arguments = ["--num-trials", str(TRIALS_A_HOST * hosts), "--max-concurrent", str(hosts)]
    arguments += ["--max-epochs", str(EPOCHS), "--halving", "none", "--device", "cpu", "--address", "auto"]
    search = ["python", "-m", "orchestrator.search", "digits", "--results-dir", "/mnt/shared", "--name", name]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        lab.inside("head", [*search, *arguments], profile=PROFILE), check=True, stdout=subprocess.PIPE, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    trials = Experiment.open(lab.shared, name).trials().sort_values("finished_at")
    if set(trials["status"]) != {"completed"} or trials["node"].nunique() != hosts:
        raise RuntimeError(f"not what was asked for:\n{trials[['trial_id', 'status', 'node']]}")
    first = trials.groupby("node")["finished_at"].min().max()
    counted = trials[trials["finished_at"] > first]
    return Measured(
        trials_a_minute=float(60 * len(counted) / (counted["finished_at"].max() - first).total_seconds()),
        driver_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    )


def main() -> None:
    """Print every figure, and the ratio of each round."""
    if reason := why_not():
        sys.exit(reason)
    for round_number in range(ROUNDS):
        figures: dict[int, Measured] = {}
        for hosts in HOSTS:
            with tempfile.TemporaryDirectory() as folder:
                lab = Lab(Path(folder, "hosts"), Path(folder, "shared"))
                lab.folder.mkdir()
                lab.shared.mkdir()
                with cluster(lab, hosts):
                    figures[hosts] = measure(lab, hosts, f"round{round_number}")
            print(
                f"{hosts} hosts of {CORES} cores: {figures[hosts].trials_a_minute:.2f} trials a minute, "
                f"driver {figures[hosts].driver_seconds:.1f} s for {TRIALS_A_HOST * hosts} trials",
                flush=True,
            )
        few, many = (figures[hosts] for hosts in HOSTS)
        cost = (many.driver_seconds - few.driver_seconds) / (TRIALS_A_HOST * (HOSTS[1] - HOSTS[0]))
        print(
            f"ratio {many.trials_a_minute / few.trials_a_minute:.2f}, driver {1000 * cost:.0f} ms a trial of {EPOCHS} "
            f"epochs",
            flush=True,
        )


if __name__ == "__main__":
    main()
