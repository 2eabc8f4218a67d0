"""What a rank sees of its machine without loading anything: limits, memory, interfaces, disk, cores."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import psutil

from hvd_adam.distributed.peer_server import host_addresses
from hvd_adam.distributed.placement import cores
from hvd_adam.doctor.checks import Check, Report, fail, look, ok, warn

MIB = 1 << 20
TRIED_PYTHONS = ((3, 10), (3, 13))

# What of /dev/shm the processes of a host need: MPI's and NCCL's segments at least, workers of loaders too.
SHM_LEAST, SHM_ENOUGH = 32 * MIB, 1024 * MIB
DISK_LEAST, DISK_ENOUGH = 100 * MIB, 2048 * MIB
DISK_SPEED = 20.0  # MB/s below which checkpoints hold a training up
WRITE_BYTES, WRITE_SECONDS = 64 * MIB, 1.0

# Variables that name the interface for one of the libraries, and what they say besides names.
INTERFACE_VARIABLES = ("HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME", "OMPI_MCA_btl_tcp_if_include")


def examine(report: Report, output_dir: str) -> None:
    """Adds to a report what the machine shows.

    Args:
        report: of this rank.
        output_dir: where rank 0 will write; the other ranks write nothing.
    """
    report.checks += [
        look("Python", _python),
        look("/dev/shm", lambda: shared_memory(shutil.disk_usage("/dev/shm"))),
        look("ulimits", _limits),
        look("interfaces", _interfaces),
    ]
    if report.rank == 0:
        report.checks.append(look("output folder", lambda: _output_folder(Path(output_dir))))
    report.facts |= {
        "cores": cores(),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "addresses": list(host_addresses()),
        "interface": chosen_interface(),
        "time": time.time(),
    }


def _python() -> Check:
    version, first, last = sys.version_info[:2], *TRIED_PYTHONS
    found = f"{platform.python_version()} at {sys.executable}"
    if version < first:
        return fail("Python", f"{found} is too old", "use Python 3.10 to 3.13 (PYTHON=… bash launch/setup.sh)")
    if version > last:
        return warn("Python", f"{found} is untried", "use Python 3.10 to 3.13 (PYTHON=… bash launch/setup.sh)")
    return ok("Python", found)


def shared_memory(usage: tuple[int, int, int]) -> Check:
    """Judges the size of /dev/shm.

    Args:
        usage: bytes in all, used and free.
    """
    total, _, free = usage
    found = f"{total // MIB} MiB, {free // MIB} MiB free"
    remedy = "make it larger: docker run --shm-size=2g, or mount -o remount,size=2g /dev/shm"
    if free < SHM_LEAST:
        return fail(
            "/dev/shm", f"{found}, {SHM_LEAST // MIB} MiB are needed", f"delete what lies there, or {remedy}"
        )
    if total < SHM_ENOUGH:
        return warn("/dev/shm", f"{found}, {SHM_ENOUGH // MIB} MiB are advised", remedy)
    return ok("/dev/shm", found)


def _limits() -> Check:
    infiniband = any(Path("/sys/class/infiniband").glob("*"))
    kinds = ("NOFILE", "NPROC", "MEMLOCK", "STACK")
    soft = {kind: resource.getrlimit(getattr(resource, f"RLIMIT_{kind}"))[0] for kind in kinds}
    unlimited = resource.RLIM_INFINITY
    return limits({kind: None if value == unlimited else value for kind, value in soft.items()}, infiniband)


def limits(soft: dict[str, int | None], infiniband: bool) -> Check:
    """Judges the soft limits.

    Args:
        soft: by name as in RLIMIT_name, bytes or numbers; None for unlimited.
        infiniband: whether the host has such a card, for which memory is locked.
    """
    # name, option of ulimit, below which it fails, below which it is warned of, unit
    wanted = [
        ("NOFILE", "open files", "-n", 256, 1024, 1),
        ("NPROC", "processes", "-u", 256, 1024, 1),
        ("STACK", "stack MiB", "-s", 1, 8, MIB),
        ("MEMLOCK", "locked MiB", "-l", 64 if infiniband else 0, 1024 if infiniband else 0, MIB),
    ]
    statuses, low, remedies, values = ["ok"], [], [], []
    for kind, words, option, least, enough, unit in wanted:
        value = soft[kind]
        shown = "unlimited" if value is None else f"{value // unit}"
        values.append(f"{words} {shown}")
        if value is not None and value < enough * unit:
            statuses.append("fail" if value < least * unit else "warn")
            low.append(f"{words} {shown}, {enough} advised")
            goal = "unlimited" if kind == "MEMLOCK" else enough * unit // (1024 if kind == "STACK" else 1)
            remedies.append(f"ulimit {option} {goal}")
    if not low:
        return ok("ulimits", ", ".join(values))
    remedy = f"{'; '.join(remedies)} before the launcher, or in /etc/security/limits.conf on that host"
    return (fail if "fail" in statuses else warn)("ulimits", "; ".join(low), remedy)


def chosen_interface() -> str:
    """The network interface that the environment names; "" for none."""
    for variable in INTERFACE_VARIABLES:
        name = os.environ.get(variable, "").split(",")[0].removeprefix("=")
        if name and name[0] not in "^0123456789":  # neither an exclusion nor a subnet
            return name
    return ""


def interface_of(address: str) -> str:
    """The name of the interface that has an address of this host; "" for none."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, items in interfaces if any(item.address == address for item in items)), "")


def _interfaces() -> Check:
    states = {name: state.isup for name, state in psutil.net_if_stats().items()}
    return interfaces(states, chosen_interface(), list(host_addresses()))


def interfaces(states: dict[str, bool], chosen: str, addresses: list[str]) -> Check:
    """Judges the interface that the environment names.

    Args:
        states: whether it is up, by name.
        chosen: what the environment names, "" for none. NCCL takes a beginning for the whole.
        addresses: the host's, without loopback.
    """
    names_up = ", ".join(sorted(name for name, is_up in states.items() if is_up))
    names = [name for name in states if name.startswith(chosen)]
    remedy = f"name one of {names_up} (-i, {', '.join(INTERFACE_VARIABLES)})"
    if chosen and not names:
        return fail("interfaces", f"no interface {chosen} here", remedy)
    if chosen and not any(states[name] for name in names):
        return fail("interfaces", f"interface {chosen} is down", f"ip link set {chosen} up, or {remedy}")
    if not addresses:
        return warn("interfaces", "no address but loopback: one host only", "give an interface an address")
    return ok("interfaces", f"{', '.join(addresses)}; {f'{chosen} chosen' if chosen else f'up: {names_up}'}")


def _output_folder(folder: Path) -> Check:
    name, place = "output folder", folder.absolute()
    while not place.exists():
        place = place.parent
    other = "give another --output-dir"
    if not place.is_dir():
        return fail(name, f"{place} is a file", other)
    free = shutil.disk_usage(place).free
    if free < DISK_LEAST:
        return fail(
            name, f"{folder}: {free // MIB} MiB free, {DISK_LEAST // MIB} MiB needed", f"make room, or {other}"
        )
    try:
        speed = _write_speed(place, min(WRITE_BYTES, free // 2))
    except OSError as error:
        return fail(name, f"{folder} cannot be written to ({error.strerror} in {place})", f"allow it, or {other}")
    found = f"{folder}: {free // MIB} MiB free, {speed:.0f} MB/s"
    if free < DISK_ENOUGH:
        return warn(name, f"{found}: little room", f"make room, or {other}")
    if speed < DISK_SPEED:
        return warn(name, f"{found}: slow", f"{other} on a faster disk, or write fewer checkpoints")
    return ok(name, found)


def _write_speed(folder: Path, most: int) -> float:
    """MB/s, all the way to the disk; writes for about WRITE_SECONDS."""
    piece, written, begin = os.urandom(MIB), 0, time.monotonic()
    with tempfile.TemporaryFile(dir=folder) as file:  # without a name: nothing can be left behind
        while written < most and time.monotonic() - begin < WRITE_SECONDS:
            written += file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    return written / 1e6 / (time.monotonic() - begin)


def loaded_libraries(name: str, maps: str | None = None) -> list[str]:
    """Files of a shared library that a process has loaded.

    Args:
        name: how the library's file name begins.
        maps: of the process, as /proc/…/maps has them; this one's by default.
    """
    lines = (Path("/proc/self/maps").read_text() if maps is None else maps).splitlines()
    paths = {line.split()[-1] for line in lines if "/" in line}
    return sorted(path for path in paths if os.path.basename(path).startswith(name))
