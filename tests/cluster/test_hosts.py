"""Test hosts are machines of their own, and leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import hosts
from tests.conftest import ROOT, command_environment

ONE, OTHER = (str(hosts.NETWORK[number]) for number in (10, 11))
pytestmark = pytest.mark.slow


@pytest.fixture
def lab(tmp_path: Path) -> hosts.Lab:
    """Folders for hosts."""
    if reason := hosts.why_not():
        pytest.skip(reason)
    lab = hosts.Lab(tmp_path / "hosts", tmp_path / "shared")
    lab.folder.mkdir()
    lab.shared.mkdir()
    return lab


@pytest.fixture
def two(lab: hosts.Lab) -> Iterator[hosts.Lab]:
    """Two hosts that are up."""
    with hosts.network():
        try:
            lab.boot("one", ONE)
            lab.boot("other", OTHER)
            yield lab
        finally:
            for name in lab.names():
                lab.shut_down(name)


def prints(lab: hosts.Lab, name: str, command: str) -> str:
    return lab.run(name, ["bash", "-c", command]).stdout.strip()


def test_what_a_host_writes_no_other_sees_but_in_the_shared_folder(two: hosts.Lab) -> None:
    for folder in ("/etc", "/tmp", "/dev", "/dev/shm", "/root"):
        prints(two, "one", f"echo mine > {folder}/written-by-a-test-host")
        assert prints(two, "one", f"cat {folder}/written-by-a-test-host") == "mine"
        assert prints(two, "other", f"cat {folder}/written-by-a-test-host") == ""
        assert not Path(folder, "written-by-a-test-host").exists()
    prints(two, "one", "echo ours > /mnt/shared/written-by-a-test-host")
    assert prints(two, "other", "cat /mnt/shared/written-by-a-test-host") == "ours"
    assert prints(two, "one", f"touch {sys.prefix}/x && echo written") == ""


def test_the_gateway_keeps_its_address_when_hosts_come_and_go(two: hosts.Lab) -> None:
    address = Path("/sys/class/net", hosts.BRIDGE, "address")
    before = address.read_text()
    for name in two.names():
        two.shut_down(name)
        assert address.read_text() == before == f"{hosts.BRIDGE_ADDRESS}\n"


def test_hosts_reach_each_other_but_for_a_cable_that_is_cut(two: hosts.Lab) -> None:
    def reaches(address: str) -> bool:
        # A closed port answers at once where there is a way; without one nothing does.
        tried = prints(two, "one", f"timeout 2 bash -c 'exec 3<>/dev/tcp/{address}/9' 2>&1; echo $?")
        return "refused" in tried

    assert reaches(OTHER)
    two.cut("other")
    assert not reaches(OTHER)
    two.heal("other")
    eventually(lambda: reaches(OTHER))


def test_a_host_that_is_shut_down_takes_its_processes_with_it(two: hosts.Lab) -> None:
    inside = sleeping(two, "one")
    two.shut_down("one")
    assert inside.wait(timeout=60) != 0
    assert two.names() == ["other"]
    assert prints(two, "other", "hostname") == "other"


def test_of_a_cloud_that_is_killed_the_next_one_finds_nothing_running(lab: hosts.Lab) -> None:
    log = lab.folder.parent / "log"
    with log.open("wb") as output:
        cloud = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.cloud", str(lab.folder), str(lab.shared)],
            cwd=ROOT,
            env=command_environment(),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    eventually(lambda: " ready\n" in log.read_text())
    inside = sleeping(lab, "laptop")
    cloud.kill()
    cloud.wait()
    assert cloud.stdin is not None
    cloud.stdin.close()
    assert inside.wait(timeout=60) != 0
    with hosts.network():
        assert hosts.left() == {"namespaces": [], "links": [hosts.BRIDGE]}
    assert hosts.left() == {"namespaces": [], "links": []}


def sleeping(lab: hosts.Lab, name: str) -> subprocess.Popen[bytes]:
    """A process on a host that does not end by itself."""
    process = subprocess.Popen(lab.inside(name, ["sleep", "1000"]))
    eventually(lambda: prints(lab, name, "pgrep -fx 'sleep 1000'") != "")
    return process


def eventually(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + hosts.BOOT_SECONDS
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["venv", "--managed-python", "--python", "3.9.1", "x"], "not 3.9.1"),
        (
            ["pip", "install", "--python", "x/bin/python", "-c", str(ROOT / "constraints.txt"), "ray==1.0", "-e", "."],
            "the image has not ray==1.0",
        ),
        (["pip", "sync"], "knows no"),
    ],
)
def test_the_stand_in_for_uv_refuses_what_it_cannot_give(arguments: list[str], sentence: str) -> None:
    command = [sys.executable, str(ROOT / "tests" / "cluster" / "uv.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert sentence in done.stderr
