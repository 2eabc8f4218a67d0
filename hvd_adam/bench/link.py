"""Two hosts on this machine with a slow link between them: namespaces, joined by a limited pair of devices.

    with limited_link(1_000_000_000) as link:
        take_turns([link.over(plan) for plan in plans], …)

A namespace ends with its last process, and takes its devices and file systems with it. Each is held by a process
that ends when a pipe from this process closes, so nothing remains however this process ends: no namespace, no
device, no limit, no file. The ranks of `take_turns` must have ended before.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from hvd_adam.bench.interleave import Plan
from hvd_adam.bench.processes import deferred_signals
from hvd_adam.errors import UserError

INTERFACE = "eth0"  # on both hosts
HOSTS = {"node1": "10.77.0.1", "node2": "10.77.0.2"}

_TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "tc": "iproute2"}

# More than a packet that the kernel has not divided yet, and enough for a timer that is late.
_LEAST_BURST, _BURST_SECONDS = 128 * 1024, 2e-3

# The process that holds a namespace. A file system of its own keeps away what killed ranks leave in /dev/shm.
_HOLDER = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /dev/shm
mkdir /dev/shm/bin
echo "127.0.0.1 localhost" >/dev/shm/hosts
echo "$2" >>/dev/shm/hosts
mount --bind /dev/shm/hosts /etc/hosts
ip link set lo up
echo ready
exec cat
"""

# In place of ssh on the first host: runs a command on the second one. Launchers write options on both sides of the
# host.
_SSH = """#!/bin/sh
while [ "$1" != node2 ]; do shift; done
shift
while [ "$1" = -o ]; do shift 2; done
exec nsenter -t {pid} --net --uts --ipc --mount --wd="$PWD" -- sh -c "$*"
"""


@dataclass(frozen=True)
class Link:
    """Two hosts, `HOSTS`, while they exist.

    Attributes:
        pids: a process on each.
    """

    pids: tuple[int, int]

    def over(self, plan: Plan, ranks_per_host: int = 1) -> Plan:
        """Returns a plan whose ranks are on both hosts.

        Args:
            plan: started by horovodrun.
            ranks_per_host: half of its ranks.
        """
        launcher, *arguments = plan.command
        hosts = ",".join(f"{host}:{ranks_per_host}" for host in HOSTS)
        # --disable-cache: it would remember for an hour that a host named node2 can be reached.
        options = ("-H", hosts, "--network-interfaces", INTERFACE, "--disable-cache")
        environ = {
            "PATH": f"/dev/shm/bin:{os.environ.get('PATH', os.defpath)}",
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMPI_MCA_orte_tmpdir_base": "/dev/shm",
        }
        command = (*_enter(self.pids[0]), launcher, *options, *arguments)
        return replace(plan, command=command, environ={**plan.environ, **environ})


@contextmanager
def limited_link(rate: int, burst: int | None = None) -> Iterator[Link]:
    """Makes two hosts with a link between them, and removes them at the end.

    Args:
        rate: limit of each direction, in bit/s, of whole packets with their headers.
        burst: bytes that pass without the limit after a pause; by default so many that a late timer does not slow
            the link down.

    Raises:
        UserError: this machine does not allow it.
    """
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            raise UserError(f"--link needs {tool}, which is not installed: install {package}, or leave --link out")
    with ExitStack() as stack:
        try:
            with deferred_signals():
                link = Link((_host("node1", stack), _host("node2", stack)))
                _join(link, rate, burst or max(_LEAST_BURST, round(rate / 8 * _BURST_SECONDS)))
        except (OSError, subprocess.CalledProcessError) as error:
            said = " ".join((getattr(error, "stderr", None) or str(error)).split())
            raise UserError(
                f"--link cannot make hosts on this machine ({said}): run as root, in a container with "
                "--privileged, or leave --link out"
            ) from error
        yield link


def _host(name: str, stack: ExitStack) -> int:
    """Starts the process that holds a host, until the stack is closed. Returns its number."""
    names = "\n".join(f"{address} {host}" for host, address in HOSTS.items())
    kinds = ("--net", "--uts", "--ipc", "--mount", "--propagation", "private")
    command = ["unshare", *kinds, "sh", "-c", _HOLDER, "holder", name, names]
    pipe = subprocess.PIPE
    # In a session of its own: the terminal must not send Ctrl-C to it before its ranks have ended.
    holder = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    stack.enter_context(holder)  # at the end: closes the pipes, and waits
    assert holder.stdout is not None
    if holder.stdout.readline() != "ready\n":
        raise subprocess.CalledProcessError(1, command, stderr=holder.communicate()[1])
    return holder.pid


def _join(link: Link, rate: int, burst: int) -> None:
    """Joins the hosts by a pair of devices with a limited rate."""
    first, second = link.pids
    _run(first, f"ip link add {INTERFACE} type veth peer name {INTERFACE} netns {second}")
    for pid, address in zip(link.pids, HOSTS.values(), strict=True):
        _run(pid, f"ip addr add {address}/24 dev {INTERFACE}")
        _run(pid, f"ip link set {INTERFACE} up")
        _run(pid, f"tc qdisc add dev {INTERFACE} root tbf rate {rate}bit burst {burst}b latency 50ms")
    ssh = _SSH.format(pid=second)
    _run(first, "sh -c", 'printf %s "$1" >/dev/shm/bin/ssh && chmod +x /dev/shm/bin/ssh', "sh", ssh, mount=True)


def _run(pid: int, command: str, *more: str, mount: bool = False) -> None:
    # Only the network: `ip` finds a namespace by the number of a process in this one.
    entered = _enter(pid) if mount else ("nsenter", "-t", str(pid), "--net")
    subprocess.run([*entered, *command.split(), *more], check=True, capture_output=True, text=True)


def _enter(pid: int) -> tuple[str, ...]:
    return ("nsenter", "-t", str(pid), "--net", "--uts", "--ipc", "--mount", f"--wd={os.getcwd()}")
