"""A rank's examination, in a process of its own: what is broken may hang or crash it, and is then still told.

Reads its task as a line of JSON, writes what it finds as lines of JSON (other lines are of libraries or of a
shell), and ends when its input does.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict
from typing import Any

from hvd_adam.distributed.context import init
from hvd_adam.distributed.launch_env import LaunchInfo, detect_launcher, gloo_store_address
from hvd_adam.doctor import gather, machine, software
from hvd_adam.doctor.checks import Report, brief, fail, sentence
from hvd_adam.doctor.links import Point
from hvd_adam.errors import UserError

MARK = "hvd_adam.doctor "  # before each line of ours
SLACK = 20.0  # seconds for what takes none by itself, on a busy machine
LOAD_SECONDS = 60.0  # allowed at least for what a rank does by itself: torch may come from a slow file system


def main() -> None:
    """The process."""
    task = json.loads(sys.stdin.readline())
    sys.stdout = sys.stderr  # for what libraries print
    threading.Thread(target=_end_with_input, daemon=True).start()
    launch = LaunchInfo("none", 0, 1) if task["alone"] else detect_launcher()
    report = _look_alone(task, launch)
    try:
        if task["local"]:
            pass
        elif launch.size > 1:
            _examine_job(task, launch, report)
        else:
            _run(task, [report], None)
    except gather.MissingError as error:
        here = [plain for plain in error.values if plain is not None and "checks" in plain]
        _say(missing=error.ranks, **({"reports": here} if here else {}))
    except UserError as error:
        _say(check=asdict(sentence("launcher", str(error))))
    except OSError as error:
        found = f"where the ranks meet, {gloo_store_address()}, does not answer: {brief(error)}"
        remedy = "see that this host reaches the one where horovodrun runs, on any port; name the interface (-i)"
        _say(check=asdict(fail("ranks", found, remedy)))
    _say(done=True)


def _look_alone(task: dict[str, Any], launch: LaunchInfo) -> Report:
    report = Report(launch.rank, socket.gethostname())
    allowed = max(LOAD_SECONDS, task["timeout"])
    _say(doing="machine", seconds=allowed)
    machine.examine(report, task["output_dir"])
    _say(doing="software", seconds=allowed, report=report.plain())
    controller = "" if launch.size == 1 else "gloo" if gloo_store_address() else "mpi"
    software.examine(report, controller, first=report.rank == 0 and not task["local"])
    report.facts["time"] = time.time()
    _say(doing="software", seconds=allowed, report=report.plain())
    return report


def _examine_job(task: dict[str, Any], launch: LaunchInfo, report: Report) -> None:
    point = Point(report.rank, report.host, _best_first(report))
    report.facts["peer"] = point.peer
    store = gloo_store_address()
    # There rank 0 waits for the others, who wait for it; MPI's start cannot be ended from within.
    _say(doing="arrival", seconds=task["timeout"] if store is None else 2 * task["timeout"] + SLACK)
    ranks = gather.connect(launch, store, task["timeout"])
    reports = [Report.of(plain) for plain in ranks.all(report.plain())]
    _say(doing="links", seconds=task["seconds"] + task["timeout"], reports=[one.plain() for one in reports])
    peers = [reports[rank].facts["peer"] for rank in points([one.host for one in reports])]
    mine = point.measure(peers, task["seconds"] / 2) if point.peer in peers else []
    links = [entry for entries in ranks.all(mine) for entry in entries]
    _say(links=links)
    if not any("error" in link for link in links):  # Horovod would wait, and end without a word on who it is
        _run(task, reports, ranks)


def points(hosts: list[str]) -> list[int]:
    """The ranks whose links are measured: the first of each host; all, if there is one host.

    Args:
        hosts: by rank.
    """
    first = [hosts.index(host) for host in dict.fromkeys(hosts)]
    return first if len(first) > 1 else list(range(len(hosts)))


def _best_first(report: Report) -> list[str]:
    """The host's addresses; first those of the interface that the environment names."""
    chosen = report.facts["interface"]
    return sorted(report.facts["addresses"], key=lambda address: machine.interface_of(address) != chosen)


def _run(task: dict[str, Any], reports: list[Report], ranks: gather.Gathering | None) -> None:
    """Starts Horovod and measures with it, unless a rank cannot load it."""
    statuses = [{check.name: check.status for check in report.checks} for report in reports]
    if any(software.stops_horovod(mine) for mine in statuses):
        return
    _say(doing="start", seconds=task["timeout"])
    try:
        cluster = init(task["device"])
    except UserError as error:
        _say(check=asdict(sentence("Horovod starts", str(error))))
        return
    _say(
        started=cluster.size,
        device=cluster.device.type,
        doing="speed",
        seconds=task["seconds"] + SLACK + task["timeout"],
    )
    from hvd_adam.doctor import speed

    mine: dict[str, Any] = {"compute": speed.compute(cluster, min(1.0, task["seconds"] / 6))}
    if ranks is not None:
        mine |= speed.sums(cluster, task["seconds"] / 3)
    _say(speeds=[mine] if ranks is None else ranks.all(mine))


def _say(**message: Any) -> None:
    sys.__stdout__.write(f"\n{MARK}{json.dumps(message)}\n")
    sys.__stdout__.flush()


def _end_with_input() -> None:
    while os.read(0, 1000):  # not through sys.stdin, whose lock Python's end wants
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
