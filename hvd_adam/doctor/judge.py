"""From what all ranks have found to one line a check, with those that deviate named."""

from __future__ import annotations

import socket
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvd_adam.cluster import _check_devices, _Place
from hvd_adam.doctor.checks import OK, Check, Report, fail, ok, sentence, warn, worst
from hvd_adam.errors import UserError
from hvd_adam.watchdog import _ranks

SLOW_LINK = 12.5e6  # bytes/s: 100 Mbit/s, over which a step of 10 M parameters takes seconds
SLOW_PING = 2e-3  # seconds there and back between hosts
SLOW_SHARE = 0.6  # of the usual, below which a pair or a rank is called slow
SKEW_WARN, SKEW_FAIL = 1.0, 300.0  # seconds; munge and Kerberos refuse from the second on

Who = Callable[[Sequence[int]], str]  # names ranks, or hosts, by their numbers


def ranks_of(reports: Sequence[Report]) -> Who:
    """Names the ranks of some reports: "rank 1 on a, ranks 2, 3 on b"."""
    hosts = {report.rank: report.host for report in reports}
    return lambda numbers: _ranks([reports[number].rank for number in numbers], hosts)


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
            else ("set up all hosts alike (bash launch/setup.sh on each, or one shared environment)")
        )
        return fail("versions", "; ".join(differences), remedy)
    shown = ", ".join(f"{name} {version}" for name, version in sorted(reports[0].versions.items()))
    return ok("versions", f"{shown}{', alike everywhere' if len(reports) > 1 else ''}")


def cores(reports: Sequence[Report], together: bool) -> Check:
    """Whether the threads of a host's ranks fit its cores.

    Args:
        reports: of all ranks, or of hosts.
        together: whether reports of the same host are of ranks that run at the same time.
    """
    problems, summary = [], []
    hosts: dict[str, list[Report]] = defaultdict(list)
    for number, report in enumerate(reports):
        hosts[report.host if together else f"{report.host}\0{number}"].append(report)
    for mine in hosts.values():
        host, count = mine[0].host, len({core for report in mine for core in report.facts.get("cores", [])})
        settings = {report.facts.get("threads", "") for report in mine}
        summary.append(f"{host} {count} cores for {len(mine)} rank{'s' * (len(mine) > 1)}")
        share = max(1, count // len(mine))
        threads = [int(number) for text in settings for number in text.split(",")[:1] if number.isdecimal()]
        remedy = f"unset OMP_NUM_THREADS, or set it to {share} on {host}"
        if any(text and not text.split(",")[0].isdecimal() for text in settings):
            problems.append((f"OMP_NUM_THREADS is {max(settings)!r} on {host}: no number", remedy))
        elif threads and max(threads) * len(mine) > max(count, len(mine)):
            total = max(threads) * len(mine)
            text = f"OMP_NUM_THREADS is {max(threads)} on {host}: {total} threads for {count} cores"
            problems.append((text, remedy))
        elif threads and max(threads) * 2 < share:
            problems.append((f"OMP_NUM_THREADS is {max(threads)} on {host}, of {share} cores a rank", remedy))
        elif count < len(mine):
            fewer = "start fewer ranks there, or let the launcher bind less (--bind-to none, --cpus-per-task)"
            problems.append((f"{host} has {count} core{'s' * (count > 1)} for {len(mine)} ranks", fewer))
    if problems:
        return warn("cores", *("; ".join(dict.fromkeys(texts)) for texts in zip(*problems, strict=True)))
    return ok("cores", _short(summary))


def gpus(reports: Sequence[Report], device: str) -> Check:
    """Whether each rank has a GPU of its own, or none has one.

    Args:
        reports: of all ranks, in order.
        device: as `hvd_adam.cluster.init` takes it.
    """
    places, before = [], Counter()
    for report in reports:
        own = report.facts.get("gpus", []) if device != "cpu" else []
        local = before[report.host]
        before[report.host] += 1
        index = None if not own else 0 if len(own) == 1 else local
        identity = own[index] if index is not None and index < len(own) else None
        places.append(_Place(report.host, (), len(own), index, identity))
    try:
        _check_devices(places, device)
    except UserError as error:
        return sentence("GPUs", str(error))
    if not places[0].gpus:
        return ok("GPUs", "none used")
    return ok("GPUs", f"one a rank: {_short([f'{place.host} {place.gpus} visible' for place in places])}")


def ahead(links: Sequence[Mapping[str, Any]], reports: Sequence[Report]) -> dict[str, float]:
    """Seconds that each other host's clock is ahead of the first host's."""
    return {
        reports[link["b"]].host: link["ahead"]
        for link in links
        if "ahead" in link and link["a"] == 0 and reports[link["b"]].host != reports[0].host
    }


def clocks(ahead: Mapping[str, float], here: str) -> Check:
    """Whether the hosts' clocks agree.

    Args:
        ahead: seconds that each other host's clock is ahead.
        here: the host that it was measured from.
    """
    if not ahead:
        return ok("clocks", "one host")
    host = max(ahead, key=lambda name: abs(ahead[name]))
    found = f"{host} is {abs(ahead[host]):.3f} s {'ahead of' if ahead[host] > 0 else 'behind'} {here}"
    if abs(ahead[host]) < SKEW_WARN:
        return ok("clocks", f"at most: {found}")
    late = [f"{name} {value:+.1f} s" for name, value in ahead.items() if abs(value) >= SKEW_WARN]
    remedy = "let all hosts follow one time server (chronyc makestep, timedatectl set-ntp true)"
    judge = fail if abs(ahead[host]) >= SKEW_FAIL else warn
    return judge("clocks", f"{', '.join(late)} beside {here}", remedy)


def reachability(links: Sequence[Mapping[str, Any]], reports: Sequence[Report]) -> Check:
    """Whether each host reaches each other one by TCP, on any port."""
    hosts = [report.host for report in reports]
    for link in links:
        if "error" in link:
            found = f"{_pair(link, hosts, ' does not reach ')}: {link['error']}"
            others = sum("error" in other for other in links) - 1
            found += f"; and {others} more" if others else ""
            remedy = (
                f"open all ports between {hosts[link['a']]} and {hosts[link['b']]} (firewall), see that the link "
                "is up, or name the interface that connects them (-i)"
            )
            return fail("network", found, remedy)
    owners: dict[str, list[str]] = defaultdict(list)
    for host, report in {report.host: report for report in reports}.items():
        for address in report.facts.get("addresses", []):
            owners[address].append(host)
    double = {address: names for address, names in owners.items() if len(names) > 1}
    if double:
        address, names = next(iter(double.items()))
        found = f"{address} is an address of {' and of '.join(names[:2])}: MPI may try it, and hang"
        return warn("network", found, "name the interface that connects the hosts (-i eth0)")
    if not links:
        return ok("network", "one process")
    used = sorted({link["address"] for link in links if hosts[link["a"]] != hosts[link["b"]]})
    where = f"by {_short(used)}" if used else "on one host"
    return ok("network", f"{len(links)} connections {where}")


def pairs(links: Sequence[Mapping[str, Any]], reports: Sequence[Report]) -> Check:
    """Which pair is slowest, and whether it is too slow."""
    hosts = [report.host for report in reports]
    measured = [link for link in links if "rate" in link]
    if not measured:
        return warn("links", "not measured", "see the checks that failed") if links else ok("links", "one process")
    slowest = min(measured, key=lambda link: link["rate"])
    latest = max(measured, key=lambda link: link["rtt"])
    usual = statistics.median(link["rate"] for link in measured)
    found = f"slowest pair {_pair(slowest, hosts)}: {_rate(slowest['rate'])}, {_milliseconds(slowest['rtt'])}"
    if len(measured) > 1:
        found += f" ({len(measured)} pairs, median {_rate(usual)})"
    slow = [link for link in measured if link["rate"] < max(SLOW_LINK, SLOW_SHARE * usual * (len(measured) > 2))]
    common = set.intersection(*({hosts[link["a"]], hosts[link["b"]]} for link in slow)) if slow else set()
    if len(common) == 1:
        found += f"; every slow pair is with {common.pop()}"
    one_host = hosts[latest["a"]] == hosts[latest["b"]]
    if slow and not one_host:
        remedy = (
            "see that host's cable, switch port and interface speed (ethtool), or name a faster interface (-i)"
        )
        return warn("links", found, remedy)
    if latest["rtt"] > SLOW_PING and not one_host:
        found += f"; {_pair(latest, hosts)} takes {_milliseconds(latest['rtt'])}"
        return warn(
            "links", found, "see what else uses this network and these hosts; name a faster interface (-i)"
        )
    return ok("links", found)


def computing(speeds: Sequence[Mapping[str, float]], hosts: list[str]) -> Check:
    """Which rank computes slowest, and whether it holds the others up."""
    every = [speed["compute"] for speed in speeds]
    if len(every) == 1:
        return ok("computing", f"{every[0]:.0f} GFLOP/s")
    slowest = min(range(len(every)), key=every.__getitem__)
    usual = statistics.median(every[:slowest] + every[slowest + 1 :])
    found = f"slowest rank {slowest} on {hosts[slowest]}: {every[slowest]:.1f} GFLOP/s, the others {usual:.1f}"
    if every[slowest] < SLOW_SHARE * usual:
        remedy = (
            f"see what else runs on {hosts[slowest]} (top, nvidia-smi), its cores and OMP_NUM_THREADS, its clock "
            "and heat; or leave that host out"
        )
        return warn("computing", found, remedy)
    return ok("computing", found)


def summing(speeds: Sequence[Mapping[str, float]]) -> Check:
    """How fast Horovod sums over all ranks; nothing is asked of it."""
    latency = max(speed["latency"] for speed in speeds)
    size, seconds = speeds[0]["bytes"], max(speed["seconds"] for speed in speeds)
    large = f"{size / 1e6:.1f} MB in {seconds * 1e3:.1f} ms ({_rate(size / seconds)})"
    return ok("sums", f"{large}, 4 bytes in {latency * 1e3:.2f} ms")


def _pair(link: Mapping[str, Any], hosts: list[str], between: str = " and ") -> str:
    return between.join(f"rank {link[end]} on {hosts[link[end]]}" for end in ("a", "b"))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms there and back"


def _rate(bytes_a_second: float) -> str:
    return f"{bytes_a_second / 1e6:.0f} MB/s" if bytes_a_second >= 1e7 else f"{bytes_a_second / 1e6:.2f} MB/s"


def _short(texts: Sequence[str], most: int = 4) -> str:
    texts = list(dict.fromkeys(texts))
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
