"""Machines to try a cluster on, made of Linux namespaces: an address, processes, a disk and an sshd of their own.

A host sees a copy-on-write view of this machine's disk, has /tmp, /dev and /dev/shm of its own, and is reached over a
bridge that leads nowhere else. `shut_down` is what AWS does to an instance that it takes away, `cut` a pulled cable.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# RFC 2544 sets these addresses aside for tests: no network that the machine is in has them.
NETWORK = ipaddress.ip_network("198.18.0.0/16")
GATEWAY = NETWORK[1]
BRIDGE = "hpelab"
# Its own, else it is that of some host's cable: when that host goes, the others talk to nobody until they ask anew.
BRIDGE_ADDRESS = "02:00:00:00:00:01"
TOOLS = ("ip", "ssh", "sshd", "ssh-keygen", "rsync", "unshare", "nsenter", "setpriv", "useradd")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BOOT_SECONDS = 600  # until a test gives up
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Lab:
    """`folder` holds what is known of the hosts, `shared` is the folder that all of them see as /mnt/shared."""

    folder: Path
    shared: Path
    booted_here: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def boot(
        self,
        name: str,
        address: str,
        *,
        login: str = "",
        public_key: str = "",
        profile: str = "",
        shows: Sequence[Path] = (),
    ) -> None:
        """Start a host with a blank disk. Returns when its sshd answers; a host without `login` has none.

        `shows`: further folders of this machine that the host sees, read-only.
        """
        cable, host = _cable(address), self.folder / name
        _remove_cable(address)
        (host / "disk").mkdir(parents=True, exist_ok=True)
        _ip("netns", "add", cable)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", cable)
        _ip("link", "set", cable, "master", BRIDGE, "up")
        for command in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{address}/{NETWORK.prefixlen}", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("route", "add", "default", "via", str(GATEWAY)),  # Ray finds its address by it; it leads nowhere
        ):
            _ip("-n", cable, *command)
        environment = {
            "PATH": SYSTEM_PATH,
            "HOST": name,
            "DISK": str(host / "disk"),
            "IMAGE": "\n".join(f"{folder} {folder}" for folder in (*image(), *shows)),
            "SHARED": str(self.shared),
            "LOGIN": login,
            "PUBLIC_KEY": public_key,
            "PROFILE": profile,
            "PYTHON": sys.executable,
            "UV": (HERE / "uv.py").read_text(),
        }
        # Whatever ends the process that boots hosts, ends the hosts.
        into = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", cable]
        into += ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
        with (host / "log").open("wb") as log:
            outer = subprocess.Popen(
                [*into, "bash", str(HERE / "boot.sh")],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.booted_here[name] = outer
        (host / "pid").write_text(f"{_only_child(outer)} {address}\n")
        _wait(lambda: _answers(address) if login else self._is_booted(name), outer, host / "log")

    def _is_booted(self, name: str) -> bool:
        return self.run(name, ["hostname"]).stdout.strip() == name

    def shut_down(self, name: str) -> None:
        """End every process of a host, which closes its connections, then take it away with its disk."""
        pid, address = self._read(name)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + BOOT_SECONDS
        while Path(f"/proc/{pid}").exists():  # as long as any process of its namespace does
            if time.monotonic() > deadline:
                raise OSError(f"{name} (process {pid}) does not end")
            time.sleep(0.02)
        if name in self.booted_here:
            self.booted_here.pop(name).wait()
        _remove_cable(address)
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def cut(self, name: str) -> None:
        """Pull a host's network cable."""
        _ip("link", "set", _cable(self._read(name)[1]), "down")

    def heal(self, name: str) -> None:
        """Plug it in again."""
        _ip("link", "set", _cable(self._read(name)[1]), "up")

    def inside(self, name: str, command: Sequence[str], *, profile: dict[str, str] | None = None) -> list[str]:
        """The command line that runs a command as root of a host, without ssh."""
        enter = ["nsenter", "-t", str(self._read(name)[0]), "-m", "-p", "-u", "-i", "-n", "-r", "-w"]
        settings = {"HOME": "/root", "TERM": "dumb", "PATH": SYSTEM_PATH, **(profile or {})}
        return [*enter, "env", "-i", *(f"{key}={value}" for key, value in settings.items()), *command]

    def run(self, name: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a command as root of a host, without ssh."""
        return subprocess.run(self.inside(name, command), capture_output=True, text=True, check=False)

    def names(self) -> list[str]:
        """The hosts that have been booted and not shut down."""
        return [path.parent.name for path in self.folder.glob("*/pid")]

    def _read(self, name: str) -> tuple[int, str]:
        pid, address = (self.folder / name / "pid").read_text().split()
        return int(pid), address


def image() -> list[Path]:
    """The folders that a host needs of this machine and may not find in its view: Python and its packages."""
    folders = {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    return sorted(folder for folder in folders if folder != Path("/usr"))


def why_not() -> str:
    """Why this machine can have no test hosts; empty if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "namespaces need root on Linux"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=SYSTEM_PATH) is None]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install iproute2 openssh-server openssh-client rsync"
    if Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() != "0":
        return "net.ipv4.ip_forward is on: what test hosts send could leave this machine"
    with tempfile.TemporaryDirectory() as folder:
        script = f"mount -t tmpfs x {folder} && cd {folder} && mkdir u w r && ip link add {BRIDGE}try type bridge && "
        script += "mount -t overlay -o lowerdir=/,upperdir=u,workdir=w x r && mknod r/x c 1 3"
        tried = subprocess.run(
            ["unshare", "--mount", "--net", "--pid", "--fork", "bash", "-c", script],
            capture_output=True,
            text=True,
            check=False,
        )
    return f"no namespaces, bridge or overlay: {tried.stderr.strip()}" if tried.returncode else ""


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Have the bridge to which hosts are attached; afterwards it, and what was left of them, is gone."""
    with (Path(tempfile.gettempdir()) / f"{BRIDGE}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel gives it back however its holder ends
        remove()
        _ip("link", "add", BRIDGE, "address", BRIDGE_ADDRESS, "type", "bridge")
        try:
            _ip("addr", "add", f"{GATEWAY}/{NETWORK.prefixlen}", "dev", BRIDGE)
            _ip("link", "set", BRIDGE, "up")
            yield
        finally:
            remove()


def remove() -> None:
    """Remove what is left of hosts: their processes, network namespaces, cables and bridge."""
    for cable in left()["namespaces"]:
        for pid in _ip("netns", "pids", cable).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _try_ip("netns", "del", cable)
    for cable in left()["links"]:
        _try_ip("link", "del", cable)


def left() -> dict[str, list[str]]:
    """The network namespaces and links of test hosts that there are."""
    namespaces = [line.split()[0] for line in _ip("netns", "list").splitlines() if line.startswith(BRIDGE)]
    links = [line.split()[0].partition("@")[0] for line in _ip("-brief", "link").splitlines()]
    return {"namespaces": namespaces, "links": [link for link in links if link.startswith(BRIDGE)]}


def _cable(address: str) -> str:
    """The name of a host's network namespace and link: two bytes of the address in hexadecimal."""
    return f"{BRIDGE}{int(ipaddress.ip_address(address)) - int(NETWORK[0]):04x}"


def _remove_cable(address: str) -> None:
    _try_ip("link", "del", _cable(address))
    _try_ip("netns", "del", _cable(address))


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _try_ip(*arguments: str) -> None:
    with contextlib.suppress(OSError):
        _ip(*arguments)


def _only_child(process: subprocess.Popen[bytes]) -> int:
    """The process that unshare, which is `process` by then, has forked: the host's first."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + BOOT_SECONDS
    while not (found := children.read_text().split()):
        if process.poll() is not None or time.monotonic() > deadline:
            raise OSError("the host has no first process")
        time.sleep(0.02)
    return int(found[0])


def _answers(address: str) -> bool:
    try:
        with socket.create_connection((address, 22), timeout=1) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def _wait(happened: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + BOOT_SECONDS
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            raise OSError(f"the host did not come up: {log.read_text()}")
        time.sleep(0.05)
