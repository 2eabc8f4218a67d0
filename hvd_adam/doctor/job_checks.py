"""Merges the checks of all ranks into one line per check that names the ranks that deviate. Pure functions."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from hvd_adam.distributed.placement import RankPlacement, assign_gpus
from hvd_adam.doctor.report import OK, Check, Report, fail, from_error_message, join_distinct, ok, warn, worst
from hvd_adam.errors import UserError
from hvd_adam.recovery.stall_report import name_ranks

Namer = Callable[[Sequence[int]], str]  # names ranks or hosts, given indices into the list of reports


def ranks_of(reports: Sequence[Report]) -> Namer:
    """Returns a function that names the ranks of reports: "rank 1 on a, ranks 2, 3 on b"."""
    host_of = {report.rank: report.host for report in reports}
    hosts = [host_of.get(rank, "") for rank in range(max(host_of, default=-1) + 1)]
    return lambda indices: name_ranks([reports[index].rank for index in indices], hosts)


def hosts_of(reports: Sequence[Report]) -> Namer:
    """Returns a function that names the hosts of reports."""
    return lambda indices: ", ".join(dict.fromkeys(reports[index].host for index in indices))


def this_host() -> str:
    """Returns this host's name as in its reports."""
    return socket.gethostname()


def merged(reports: Sequence[Report], namer: Namer) -> list[Check]:
    """Returns one check for each name in the reports: the worst status, and what is wrong on which ranks."""
    by_name: dict[str, dict[int, Check]] = defaultdict(dict)
    for index, report in enumerate(reports):
        for check in report.checks:
            by_name[check.name][index] = check
    return [_merge(name, checks, namer, len(reports)) for name, checks in by_name.items()]


def _merge(name: str, checks: Mapping[int, Check], namer: Namer, total: int) -> Check:
    status = worst(check.status for check in checks.values())
    if status == OK:
        return ok(name, checks[min(checks)].found)
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, check in checks.items():
        if check.status != OK:
            groups[check.found, check.remedy].append(index)
    texts = [
        found if total == 1 else f"{_where(indices, namer, total)}: {found}"
        for (found, _), indices in groups.items()
    ]
    remedies = dict.fromkeys(remedy for _, remedy in groups)
    return Check(name, status, "; ".join(texts), "; ".join(remedies))


def _where(indices: list[int], namer: Namer, total: int) -> str:
    return "everywhere" if len(indices) == total else namer(indices)


def versions(reports: Sequence[Report], namer: Namer) -> Check:
    """Checks that versions and code are identical; names the ranks that differ from the majority."""
    differences, code_only = [], True
    for name in dict.fromkeys(name for report in reports for name in report.versions):
        holders: dict[str, list[int]] = defaultdict(list)
        for index, report in enumerate(reports):
            if name in report.versions:
                holders[report.versions[name]].append(index)
        # In a tie, the version of the lowest rank counts as the majority.
        usual = max(holders, key=lambda version: (len(holders[version]), -min(holders[version])))
        for version, indices in holders.items():
            if version != usual:
                differences.append(f"{name} is {version} on {namer(indices)}, {usual} on {namer(holders[usual])}")
                code_only &= name in ("code hash", "hvd_adam")
    if differences:
        remedy = (
            "copy the same code to all hosts, or use a shared directory"
            if code_only
            else "install the same versions on all hosts, or use one shared environment"
        )
        return fail("versions", "; ".join(differences), remedy)
    shown = ", ".join(f"{name} {version}" for report in reports[:1] for name, version in report.versions.items())
    return ok("versions", f"{shown}{', identical everywhere' if len(reports) > 1 else ''}")


def cores(reports: Sequence[Report], together: bool) -> Check:
    """Checks that the threads of a host's ranks match its cores.

    Args:
        reports: of all ranks, or of hosts.
        together: whether reports of the same host belong to ranks that run at the same time.
    """
    hosts: dict[str, list[Report]] = defaultdict(list)
    for index, report in enumerate(reports):
        hosts[report.host if together else f"{report.host}\0{index}"].append(report)
    problems, summary = [], []
    for ranks in hosts.values():
        host, count = ranks[0].host, len({core for report in ranks for core in report.facts.get("cores", [])})
        summary.append(f"{host} {count} core{'s' * (count != 1)} for {len(ranks)} rank{'s' * (len(ranks) > 1)}")
        problem = _thread_problem(host, count, [report.facts.get("threads", "").split(",")[0] for report in ranks])
        problems += [problem] if problem else []
    if problems:
        found, remedy = ("; ".join(dict.fromkeys(texts)) for texts in zip(*problems, strict=True))
        return warn("cores", found, remedy)
    return ok("cores", join_distinct(summary))


def _thread_problem(host: str, cores: int, settings: list[str]) -> tuple[str, str] | None:
    """Returns what is wrong with OMP_NUM_THREADS of a host's ranks ("" if not set) and the remedy, or None."""
    ranks, share = len(settings), max(1, cores // len(settings))
    remedy = f"unset OMP_NUM_THREADS, or set it to {share} on {host}"
    for text in settings:
        if text and not text.isdecimal():
            return f"OMP_NUM_THREADS is {text!r} on {host}: not a number", remedy
    threads = [int(text) if text else share for text in settings]  # `init` divides the cores among the ranks
    if sum(threads) > max(cores, ranks):
        return f"OMP_NUM_THREADS is {max(threads)} on {host}: {sum(threads)} threads for {cores} cores", remedy
    if max(threads) * 2 < share:
        return f"OMP_NUM_THREADS is {max(threads)} on {host}, but a rank has {share} cores", remedy
    if cores < ranks:
        fewer = "start fewer ranks there, or loosen the launcher's binding (--bind-to none, --cpus-per-task)"
        return f"{host} has {cores} core{'s' * (cores != 1)} for {ranks} ranks", fewer
    return None


def gpus(reports: Sequence[Report], device: str) -> Check:
    """Checks that each rank has a GPU of its own, or that none has one.

    Args:
        reports: of all ranks, in order.
        device: as in `hvd_adam.init`.
    """
    seen = [tuple(report.facts.get("gpus", ())) if device != "cpu" else () for report in reports]
    places = [RankPlacement(report.host, (), gpus) for report, gpus in zip(reports, seen, strict=True)]
    try:
        assign_gpus(places, device)
    except UserError as error:
        return from_error_message("GPUs", str(error))
    if not any(place.gpus for place in places):
        return ok("GPUs", "none used")
    visible = join_distinct(f"{place.host} {len(place.gpus)} visible" for place in places)
    return ok("GPUs", f"one per rank: {visible}")
