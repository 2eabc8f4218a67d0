"""Hosts for tests, made of Linux namespaces: each has its own name, network, processes, /dev/shm and sshd.

    with Hosts(folder, ["node1", "node2"]) as hosts:
        hosts.run("head", ["ssh", "node1", "hostname"])

The host "head" always exists; launchers run on it, and it has no sshd. All hosts are on one bridge, 10.77.0.0/24,
in head's network. Nothing changes outside the namespaces. All hosts end with this process, even if it is killed.
Files, users and the installed Python are those of this machine, except ~/.bashrc, which may print messages at
logins. Needs root, unshare, nsenter, ip and sshd.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SSHD = "/usr/sbin/sshd"
TOOLS = ("unshare", "nsenter", "setpriv", "ip", "ssh", "ssh-keygen", SSHD)
HEAD = "head"

# The first process of a host: sets up what it does not share with this machine, then reaps children.
INIT = """
set -e
hostname "$1"
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/sshd
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
if [ -e ~/.bashrc ]; then mount --bind /dev/null ~/.bashrc; fi
mount -t sysfs sysfs /sys 2>/dev/null || true
ip link set lo up
echo ready
trap : CHLD
while :; do sleep 1000 & wait || true; done
"""

SSH_CONFIG = """
Host *
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  IdentitiesOnly yes
  IdentityFile {folder}/key
"""

SSHD_CONFIG = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM no
UseDNS no
MaxStartups 100
PidFile none
"""


def package_folders() -> set[Path]:
    """Returns the folders from which Python imports the package: this checkout's, and that which is installed.

    In a worktree that uses the environment of another checkout they differ.
    """
    code = "import hvd_adam; print(*hvd_adam.__path__)"
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    return {Path(__file__).parents[3] / "hvd_adam", Path(found.stdout.strip())}


def skip_reason() -> str | None:
    """Returns the reason why this machine cannot make such hosts, in one line, or None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "true"], capture_output=True
    )
    return None if tried.returncode == 0 else f"unshare: {tried.stderr.decode().strip()}"


class Hosts:
    """A cluster of hosts, as described above.

    Args:
        folder: folder for keys and logs.
        names: the hosts besides "head".
        spare: names of hosts that are started later.
    """

    def __init__(self, folder: Path, names: list[str], spare: Sequence[str] = ()) -> None:
        self.folder, self.names = folder, names
        all_names = [HEAD, *names, *spare]
        self.addresses = {name: f"10.77.0.{number}" for number, name in enumerate(all_names, start=1)}
        self._inits: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Hosts:
        self.folder.mkdir(parents=True, exist_ok=True)
        for key in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key], check=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.addresses.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        (self.folder / "ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))
        try:
            self._start_namespace(HEAD)
            self._ip(HEAD, "link add eth0 type bridge")
            self._ip(HEAD, f"addr add {self.addresses[HEAD]}/24 dev eth0")
            self._ip(HEAD, "link set eth0 up")
            for name in self.names:
                self.start(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._inits):
            self.kill(name)

    def popen(self, host: str, command: list[str | Path], **options: object) -> subprocess.Popen:
        """Starts a command on a host, in this process's working directory and environment."""
        return subprocess.Popen([*self._enter(host), f"--wd={os.getcwd()}", "--", *map(str, command)], **options)

    def run(self, host: str, command: list[str | Path], **options: object) -> subprocess.CompletedProcess:
        """Runs a command on a host and waits for it; output as text."""
        command = [*self._enter(host), f"--wd={os.getcwd()}", "--", *map(str, command)]
        return subprocess.run(command, capture_output=True, text=True, **options)

    def start(self, host: str) -> None:
        """Starts a host, also after `kill`."""
        self._start_namespace(host)
        self.link(host)
        config = self.folder / f"sshd_{host}"
        config.write_text(SSHD_CONFIG.format(address=self.addresses[host], folder=self.folder))
        self.run(host, [SSHD, "-f", config, "-E", self.folder / f"sshd_{host}.log"], check=True)

    def kill(self, host: str) -> None:
        """Ends a host with all its processes immediately, like a power failure."""
        init = self._inits.pop(host)
        init.kill()
        init.wait()

    def cut(self, host: str) -> None:
        """Disconnects a host from the network; its processes keep running."""
        self._ip(HEAD, f"link del {self._port(host)}")

    def link(self, host: str) -> None:
        """Connects a host to the bridge, also after `cut`."""
        ends = f"veth peer name eth0 address {self._mac(host)} netns {self._pid(host)}"
        self._ip(HEAD, f"link add {self._port(host)} type {ends}")
        self._ip(HEAD, f"link set {self._port(host)} master eth0 up")
        self._ip(host, f"addr add {self.addresses[host]}/24 dev eth0")
        self._ip(host, "link set eth0 up")

    def _start_namespace(self, host: str) -> None:
        kinds = "--net --uts --ipc --mount --propagation private --pid --fork --kill-child --mount-proc".split()
        # It ends with this process, even if that is killed.
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *kinds, "bash", "-c", INIT, "init"]
        init = subprocess.Popen([*command, host, str(self.folder)], stdout=subprocess.PIPE, text=True)
        self._inits[host] = init
        if init.stdout.readline() != "ready\n":
            raise RuntimeError(f"{host} did not start")

    def _pid(self, host: str) -> int:
        """Returns the process number of the host's first process on this machine."""
        parent = self._inits[host].pid
        for _ in range(1000):
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            if children:
                return int(children[0])
            time.sleep(0.02)
        raise RuntimeError(f"{host} has ended")

    def _enter(self, host: str) -> list[str]:
        return ["nsenter", "-t", str(self._pid(host)), "--net", "--uts", "--ipc", "--pid", "--mount"]

    def _ip(self, host: str, arguments: str) -> None:
        # In this machine's process namespace: `ip` identifies a network by a process number.
        subprocess.run(["nsenter", "-t", str(self._pid(host)), "--net", "ip", *arguments.split()], check=True)

    def _mac(self, host: str) -> str:
        """Returns a fixed address: the other hosts cache it."""
        return "02:00:" + ":".join(f"{int(part):02x}" for part in self.addresses[host].split("."))

    def _port(self, host: str) -> str:
        return f"to-{host}"
