"""Runs one rank's checks in a separate process, so that a library that hangs or crashes can still be reported.

Reads its task from stdin as one line of JSON, writes its results to stdout as lines of JSON that start with
`PREFIX` (other lines are the output of libraries or of a shell), and ends when its stdin is closed.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

from hvd_adam.distributed.context import init
from hvd_adam.distributed.launch_env import LaunchInfo, detect_launcher, gloo_store_address
from hvd_adam.doctor import gather, machine, software
from hvd_adam.doctor.links import Point
from hvd_adam.doctor.report import Report, fail, from_error_message, one_line
from hvd_adam.errors import UserError

PREFIX = "hvd_adam.doctor "
SLACK = 20.0  # seconds for stages without a time limit of their own, on a busy machine
LOAD_SECONDS = 60.0  # shortest time limit of a rank's own checks: torch may be on a slow file system


def main() -> None:
    """Runs all stages of the task."""
    task = json.loads(sys.stdin.readline())
    sys.stdout = sys.stderr  # libraries print to it
    threading.Thread(target=_exit_with_stdin, daemon=True).start()
    launch = LaunchInfo("none", 0, 1) if task["single_rank"] else detect_launcher()
    report = _check_rank(task, launch)
    try:
        if task["local"]:
            pass
        elif launch.size > 1:
            _check_job(task, launch, report)
        else:
            _start_horovod(task, [report], None)
    except gather.MissingError as error:
        present = [values for values in error.values if values is not None and "checks" in values]
        _send(missing=error.ranks, **({"reports": present} if present else {}))
    except UserError as error:
        _send(check=asdict(from_error_message("launcher", str(error))))
    except OSError as error:
        found = f"horovodrun's rendezvous server at {gloo_store_address()} does not answer: {one_line(error)}"
        remedy = "check that this host reaches the host of horovodrun on any port; name the interface (-i)"
        _send(check=asdict(fail("ranks", found, remedy)))
    _send(done=True)


def _check_rank(task: dict[str, Any], launch: LaunchInfo) -> Report:
    report = Report(launch.rank, socket.gethostname())
    limit = max(LOAD_SECONDS, task["timeout"])
    _send(doing="machine", seconds=limit)
    machine.examine(report, task["output_dir"])
    _send(doing="software", seconds=limit, report=report.to_json())
    controller = "" if launch.size == 1 else "gloo" if gloo_store_address() else "mpi"
    software.examine(report, controller, first=report.rank == 0 and not task["local"])
    report.facts["time"] = time.time()
    _send(doing="software", seconds=limit, report=report.to_json())
    return report


def _check_job(task: dict[str, Any], launch: LaunchInfo, report: Report) -> None:
    point = Point(report.rank, report.host, _sorted_addresses(report))
    report.facts["peer"] = point.peer
    store = gloo_store_address()
    # With the store, rank 0 waits for the other ranks, which wait for rank 0. MPI_Init cannot be interrupted from
    # within.
    _send(doing="arrival", seconds=task["timeout"] if store is None else 2 * task["timeout"] + SLACK)
    ranks = gather.connect(launch, store, task["timeout"])
    reports = [Report.from_json(values) for values in ranks.all(report.to_json())]
    _send(doing="links", seconds=task["seconds"] + task["timeout"], reports=[one.to_json() for one in reports])
    peers = [reports[rank].facts["peer"] for rank in measured_ranks([one.host for one in reports])]
    own_links = point.measure(peers, task["seconds"] / 2) if point.peer in peers else []
    links = [entry for entries in ranks.all(own_links) for entry in entries]
    _send(links=links)
    if not any("error" in link for link in links):  # otherwise Horovod would wait and not name the rank
        _start_horovod(task, reports, ranks)


def measured_ranks(hosts: list[str]) -> list[int]:
    """Returns the ranks between which links are measured: the first of each host, or all if there is one host.

    Args:
        hosts: host names by rank.
    """
    first = [hosts.index(host) for host in dict.fromkeys(hosts)]
    return first if len(first) > 1 else list(range(len(hosts)))


def _sorted_addresses(report: Report) -> list[str]:
    """Returns the host's addresses, those of the interface that the environment names first."""
    chosen = report.facts["interface"]
    return sorted(report.facts["addresses"], key=lambda address: machine.interface_of(address) != chosen)


def _start_horovod(task: dict[str, Any], reports: list[Report], ranks: gather.Gathering | None) -> None:
    """Starts Horovod and measures with it, unless a rank cannot load it."""
    statuses = [{check.name: check.status for check in report.checks} for report in reports]
    if any(software.prevents_horovod(status_by_name) for status_by_name in statuses):
        return
    _send(doing="start", seconds=task["timeout"])
    try:
        cluster = init(task["device"])
    except UserError as error:
        _send(check=asdict(from_error_message("Horovod starts", str(error))))
        return
    _send(
        started=cluster.size,
        device=cluster.device.type,
        doing="speed",
        seconds=task["seconds"] + SLACK + task["timeout"],
    )
    from hvd_adam.doctor import throughput

    # Some turns before and some after the sums: what slows a rank down in both is not a moment's other work.
    seconds = min(0.5, task["seconds"] / 12)
    own_speeds: dict[str, Any] = {}
    turns = throughput.compute(cluster, seconds)
    if ranks is not None:
        own_speeds |= throughput.sums(cluster, task["seconds"] / 3)
    turns += throughput.compute(cluster, seconds)
    own_speeds |= {"compute": statistics.median(turns), "turns": turns}
    _send(speeds=[own_speeds] if ranks is None else ranks.all(own_speeds))


def _send(**message: Any) -> None:
    stdout = sys.__stdout__
    assert stdout is not None
    stdout.write(f"\n{PREFIX}{json.dumps(message)}\n")
    stdout.flush()


def _exit_with_stdin() -> None:
    while os.read(0, 1000):  # not sys.stdin.read: the interpreter's shutdown needs the lock of sys.stdin
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
