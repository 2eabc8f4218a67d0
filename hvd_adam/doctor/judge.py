"""From what all ranks have found to one line a check, with those that deviate named."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from hvd_adam.distributed.placement import RankPlacement, assign_gpus
from hvd_adam.doctor.checks import OK, Check, Report, fail, ok, sentence, shortened, warn, worst
from hvd_adam.errors import UserError
from hvd_adam.recovery.stall_report import name_ranks

Who = Callable[[Sequence[int]], str]  # names ranks, or hosts, by their numbers


def ranks_of(reports: Sequence[Report]) -> Who:
    """Names the ranks of some reports: "rank 1 on a, ranks 2, 3 on b"."""
    hosts = {report.rank: report.host for report in reports}
    return lambda numbers: name_ranks([reports[number].rank for number in numbers], hosts)


def hosts_of(reports: Sequence[Report]) -> Who:
    """Names the hosts of some reports."""
    return lambda numbers: ", ".join(dict.fromkeys(reports[number].host for number in numbers))


def this_host() -> str:
    """As its reports call it."""
    return socket.gethostname()


def merged(reports: Sequence[Report], who: Who) -> list[Check]:
    """One check for each that was made anywhere: its worst status, and what is wrong where."""
    by_name: dict[str, dict[int, Check]] = defaultdict(dict)
    for number, report in enumerate(reports):
        for check in report.checks:
            by_name[check.name][number] = check
    return [_merge(name, found, who, len(reports)) for name, found in by_name.items()]


def _merge(name: str, found: Mapping[int, Check], who: Who, total: int) -> Check:
    status = worst(check.status for check in found.values())
    if status == OK:
        return ok(name, found[min(found)].found)
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, check in found.items():
        if check.status != OK:
            groups[check.found, check.remedy].append(number)
    whole = len(groups) == 1 and len(*groups.values()) == total
    texts = [
        text if whole and total == 1 else f"{_all(numbers, who, total)}: {text}"
        for (text, _), numbers in groups.items()
    ]
    remedies = dict.fromkeys(remedy for _, remedy in groups)
    return Check(name, status, "; ".join(texts), "; ".join(remedies))


def _all(numbers: list[int], who: Who, total: int) -> str:
    return "everywhere" if len(numbers) == total else who(numbers)


def versions(reports: Sequence[Report], who: Who) -> Check:
    """Whether all have the same versions and code; names those that differ from the most."""
    differences, code_only = [], True
    for name in dict.fromkeys(name for report in reports for name in report.versions):
        holders: dict[str, list[int]] = defaultdict(list)
        for number, report in enumerate(reports):
            if name in report.versions:
                holders[report.versions[name]].append(number)
        # Of equally many rank 0's is right.
        usual = max(holders, key=lambda version: (len(holders[version]), -min(holders[version])))
        for version, numbers in holders.items():
            if version != usual:
                differences.append(f"{name} is {version} on {who(numbers)}, {usual} on {who(holders[usual])}")
                code_only &= name in ("code hash", "hvd_adam")
    if differences:
        remedy = (
            "copy the same code to all hosts, or use a shared folder"
            if code_only
            else "set up all hosts alike (bash launch/setup.sh on each, or one shared environment)"
        )
        return fail("versions", "; ".join(differences), remedy)
    shown = ", ".join(f"{name} {version}" for report in reports[:1] for name, version in report.versions.items())
    return ok("versions", f"{shown}{', alike everywhere' if len(reports) > 1 else ''}")


def cores(reports: Sequence[Report], together: bool) -> Check:
    """Whether the threads of a host's ranks fit its cores.

    Args:
        reports: of all ranks, or of hosts.
        together: whether reports of the same host are of ranks that run at the same time.
    """
    hosts: dict[str, list[Report]] = defaultdict(list)
    for number, report in enumerate(reports):
        hosts[report.host if together else f"{report.host}\0{number}"].append(report)
    problems, summary = [], []
    for mine in hosts.values():
        host, count = mine[0].host, len({core for report in mine for core in report.facts.get("cores", [])})
        summary.append(f"{host} {count} core{'s' * (count != 1)} for {len(mine)} rank{'s' * (len(mine) > 1)}")
        problem = _misfit(host, count, [report.facts.get("threads", "").split(",")[0] for report in mine])
        problems += [problem] if problem else []
    if problems:
        return warn("cores", *("; ".join(dict.fromkeys(texts)) for texts in zip(*problems, strict=True)))
    return ok("cores", shortened(summary))


def _misfit(host: str, cores: int, settings: list[str]) -> tuple[str, str] | None:
    """What is wrong with the OMP_NUM_THREADS of a host's ranks ("" where it is not set), and what to do."""
    ranks, share = len(settings), max(1, cores // len(settings))
    remedy = f"unset OMP_NUM_THREADS, or set it to {share} on {host}"
    for text in settings:
        if text and not text.isdecimal():
            return f"OMP_NUM_THREADS is {text!r} on {host}: no number", remedy
    threads = [int(text) if text else share for text in settings]  # as `cluster.init` shares them out
    if sum(threads) > max(cores, ranks):
        return f"OMP_NUM_THREADS is {max(threads)} on {host}: {sum(threads)} threads for {cores} cores", remedy
    if max(threads) * 2 < share:
        return f"OMP_NUM_THREADS is {max(threads)} on {host}, of {share} cores a rank", remedy
    if cores < ranks:
        fewer = "start fewer ranks there, or let the launcher bind less (--bind-to none, --cpus-per-task)"
        return f"{host} has {cores} core{'s' * (cores != 1)} for {ranks} ranks", fewer
    return None


def gpus(reports: Sequence[Report], device: str) -> Check:
    """Whether each rank has a GPU of its own, or none has one.

    Args:
        reports: of all ranks, in order.
        device: as `hvd_adam.distributed.context.init` takes it.
    """
    seen = [tuple(report.facts.get("gpus", ())) if device != "cpu" else () for report in reports]
    places = [RankPlacement(report.host, (), gpus) for report, gpus in zip(reports, seen, strict=True)]
    try:
        assign_gpus(places, device)
    except UserError as error:
        return sentence("GPUs", str(error))
    if not any(place.gpus for place in places):
        return ok("GPUs", "none used")
    return ok("GPUs", f"one a rank: {shortened([f'{place.host} {len(place.gpus)} visible' for place in places])}")
