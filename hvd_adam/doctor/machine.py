"""Checks of one rank's machine that load no library: limits, memory, interfaces, disk, cores."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

from hvd_adam.distributed.placement import cores
from hvd_adam.doctor.report import Check, Report, attempt, fail, ok, warn
from hvd_adam.recovery.peer_server import host_addresses

MIB = 1 << 20
TESTED_PYTHONS = ((3, 10), (3, 13))

# Space in /dev/shm for the processes of a host: segments of MPI and NCCL at least, and data loader workers.
SHM_REQUIRED, SHM_ADVISED = 32 * MIB, 1024 * MIB
DISK_REQUIRED, DISK_ADVISED = 100 * MIB, 2048 * MIB
DISK_SPEED = 20.0  # MB/s, below which checkpoints slow training down
WRITE_BYTES, WRITE_SECONDS = 64 * MIB, 1.0

# Variables that name the network interface for one of the libraries.
INTERFACE_VARIABLES = ("HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME", "OMPI_MCA_btl_tcp_if_include")


def examine(report: Report, output_dir: str) -> None:
    """Adds the checks and facts of the machine to a report.

    Args:
        report: of this rank.
        output_dir: the directory that rank 0 will write to; the other ranks do not test it.
    """
    report.checks += [
        attempt("Python", _python),
        attempt("/dev/shm", lambda: shared_memory(shutil.disk_usage("/dev/shm"), os.access("/dev/shm", os.W_OK))),
        attempt("ulimits", _limits),
        attempt("interfaces", _interfaces),
    ]
    if report.rank == 0:
        report.checks.append(attempt("output folder", lambda: output_folder(Path(output_dir))))
    report.facts |= {
        "cores": cores(),
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "addresses": list(host_addresses()),
        "interface": chosen_interface(),
        "time": time.time(),
    }


def _python() -> Check:
    version, first, last = sys.version_info[:2], *TESTED_PYTHONS
    found = f"{platform.python_version()} at {sys.executable}"
    remedy = "use Python 3.10 to 3.13 (PYTHON=… bash launch/setup.sh)"
    if version < first:
        return fail("Python", f"{found} is too old", remedy)
    if version > last:
        return warn("Python", f"{found} is newer than the tested versions", remedy)
    return ok("Python", found)


def shared_memory(usage: tuple[int, int, int], writable: bool = True) -> Check:
    """Checks the size of /dev/shm, and that this process may write there.

    Args:
        usage: total, used and free bytes.
        writable: whether files can be made there, as the semaphores of horovodrun and of data loader workers.
    """
    total, _, free = usage
    if not writable:
        return fail(
            "/dev/shm", "not writable", "mount it writable: mount -o remount,rw /dev/shm; chmod 1777 /dev/shm"
        )
    found = f"{total // MIB} MiB, {free // MIB} MiB free"
    remedy = "make it larger: docker run --shm-size=2g, or mount -o remount,size=2g /dev/shm"
    if free < SHM_REQUIRED:
        found = f"{found}, {SHM_REQUIRED // MIB} MiB required"
        return fail("/dev/shm", found, f"delete unused files there, or {remedy}")
    if total < SHM_ADVISED:
        return warn("/dev/shm", f"{found}, {SHM_ADVISED // MIB} MiB advised", remedy)
    return ok("/dev/shm", found)


def _limits() -> Check:
    infiniband = any(Path("/sys/class/infiniband").glob("*"))
    kinds = ("NOFILE", "NPROC", "MEMLOCK", "STACK")
    soft = {kind: resource.getrlimit(getattr(resource, f"RLIMIT_{kind}"))[0] for kind in kinds}
    unlimited = resource.RLIM_INFINITY
    return limits({kind: None if value == unlimited else value for kind, value in soft.items()}, infiniband)


def limits(soft: dict[str, int | None], infiniband: bool) -> Check:
    """Checks the soft limits of this process.

    Args:
        soft: limits by name, as in RLIMIT_name, in bytes or counts; None for unlimited.
        infiniband: whether the host has an InfiniBand adapter, which needs locked memory.
    """
    # name, description, option of ulimit, required value, advised value, unit
    wanted = [
        ("NOFILE", "open files", "-n", 256, 1024, 1),
        ("NPROC", "processes", "-u", 256, 1024, 1),
        ("STACK", "stack MiB", "-s", 1, 8, MIB),
        ("MEMLOCK", "locked MiB", "-l", 64 if infiniband else 0, 1024 if infiniband else 0, MIB),
    ]
    statuses, low, remedies, values = ["ok"], [], [], []
    for kind, description, option, required, advised, unit in wanted:
        value = soft[kind]
        shown = "unlimited" if value is None else f"{value // unit}"
        values.append(f"{description} {shown}")
        if value is not None and value < advised * unit:
            statuses.append("fail" if value < required * unit else "warn")
            low.append(f"{description} {shown}, {advised} advised")
            goal = "unlimited" if kind == "MEMLOCK" else advised * unit // (1024 if kind == "STACK" else 1)
            remedies.append(f"ulimit {option} {goal}")
    if not low:
        return ok("ulimits", ", ".join(values))
    remedy = f"{'; '.join(remedies)} before the launcher, or in /etc/security/limits.conf on that host"
    return (fail if "fail" in statuses else warn)("ulimits", "; ".join(low), remedy)


def chosen_interface() -> str:
    """Returns the network interface that the environment names; "" if it names none."""
    for variable in INTERFACE_VARIABLES:
        name = os.environ.get(variable, "").split(",")[0].removeprefix("=")
        if name and name[0] not in "^0123456789":  # neither an exclusion nor a subnet
            return name
    return ""


def interface_of(address: str) -> str:
    """Returns the interface that has an address of this host; "" if none has it or psutil is missing."""
    try:
        import psutil  # here: the doctor runs without it
    except ModuleNotFoundError:
        return ""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, items in interfaces if any(item.address == address for item in items)), "")


def _interface_states() -> dict[str, bool]:
    """Returns whether each interface is up, by name."""
    try:
        import psutil  # here: the doctor runs without it
    except ModuleNotFoundError:
        names = [name for _, name in socket.if_nameindex()]
        return {name: Path(f"/sys/class/net/{name}/operstate").read_text().strip() != "down" for name in names}
    return {name: state.isup for name, state in psutil.net_if_stats().items()}


def _interfaces() -> Check:
    return interfaces(_interface_states(), chosen_interface(), list(host_addresses()))


def interfaces(states: dict[str, bool], chosen: str, addresses: list[str]) -> Check:
    """Checks the network interface that the environment names.

    Args:
        states: whether each interface is up, by name.
        chosen: name in the environment, "" if none. NCCL accepts a prefix of the name.
        addresses: IPv4 addresses of the host, without loopback.
    """
    names_up = ", ".join(sorted(name for name, is_up in states.items() if is_up))
    names = [name for name in states if name.startswith(chosen)]
    remedy = f"name one of {names_up} (-i, {', '.join(INTERFACE_VARIABLES)})"
    if chosen and not names:
        return fail("interfaces", f"no interface {chosen} on this host", remedy)
    if chosen and not any(states[name] for name in names):
        return fail("interfaces", f"interface {chosen} is down", f"ip link set {chosen} up, or {remedy}")
    if not addresses:
        found = "no address other than loopback: training on this host only"
        return warn("interfaces", found, "assign an address to an interface")
    return ok("interfaces", f"{', '.join(addresses)}; {f'{chosen} chosen' if chosen else f'up: {names_up}'}")


def output_folder(folder: Path) -> Check:
    """Checks that a directory, which need not exist yet, can be written to, its free space and its speed."""
    name, existing = "output folder", folder.absolute()
    other = "choose another --output-dir"
    while not os.path.lexists(existing):  # False where the parent may not be searched: it is the one to test then
        existing = existing.parent
    if not os.path.exists(existing):
        found = f"{existing} is a link to {os.readlink(existing)}, which does not exist or cannot be reached"
        return fail(name, found, f"make that folder, or {other}")
    if not existing.is_dir():
        return fail(name, f"{existing} is a file", other)
    free = shutil.disk_usage(existing).free
    if free < DISK_REQUIRED:
        found = f"{folder}: {free // MIB} MiB free, {DISK_REQUIRED // MIB} MiB required"
        return fail(name, found, f"free some space, or {other}")
    try:
        speed = _write_speed(existing, min(WRITE_BYTES, free // 2))
    except OSError as error:
        found = f"{folder} is not writable ({error.strerror} in {existing})"
        return fail(name, found, f"allow writing there, or {other}")
    found = f"{folder}: {free // MIB} MiB free, {speed:.0f} MB/s"
    if free < DISK_ADVISED:
        return warn(name, f"{found}: little space", f"free some space, or {other}")
    if speed < DISK_SPEED:
        return warn(name, f"{found}: slow", f"{other} on a faster disk, or write fewer checkpoints")
    return ok(name, found)


def _write_speed(folder: Path, max_bytes: int) -> float:
    """Returns MB/s of writes that are flushed to the disk; takes about WRITE_SECONDS.

    It is the median of the writes, so that it does not depend on one that had to wait for other work of the disk.
    """
    chunk, written, times, begin = os.urandom(MIB), 0, [], time.monotonic()
    with tempfile.TemporaryFile(dir=folder) as file:  # it has no name, so nothing remains after a crash
        while written < max_bytes and time.monotonic() - begin < WRITE_SECONDS:
            start = time.perf_counter()
            written += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - start)
    return MIB / 1e6 / statistics.median(times) if times else 0.0


def loaded_libraries(name: str, maps: str | None = None) -> list[str]:
    """Returns the paths of a shared library that a process has loaded, sorted.

    Args:
        name: prefix of the library's file name.
        maps: memory map of the process in the format of /proc/PID/maps; this process's by default.
    """
    lines = (Path("/proc/self/maps").read_text() if maps is None else maps).splitlines()
    paths = {line.split()[-1] for line in lines if "/" in line}
    return sorted(path for path in paths if os.path.basename(path).startswith(name))
