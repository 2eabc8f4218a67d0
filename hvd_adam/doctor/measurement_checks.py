"""Checks of what was measured between hosts and ranks: reachability, links, clocks, speeds. Pure functions."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from hvd_adam.doctor.report import Check, Report, fail, join_distinct, ok, warn

SLOW_LINK = 12.5e6  # bytes/s: 100 Mbit/s, over which a step of 10 M parameters takes seconds
SLOW_ROUND_TRIP = 2e-3  # seconds, between hosts
SLOW_FRACTION = 0.6  # of the median, below which a pair or a rank is reported as slow
NOISE_FACTOR = 2.0  # by which a rank must be slower than ranks vary between turns
SKEW_WARN, SKEW_FAIL = 1.0, 300.0  # seconds; munge and Kerberos refuse credentials beyond the second


def clock_offsets(links: Sequence[Mapping[str, Any]], reports: Sequence[Report]) -> dict[str, float]:
    """Returns by host the seconds that its clock is ahead of the clock of rank 0's host."""
    return {
        reports[link["b"]].host: link["ahead"]
        for link in links
        if "ahead" in link and link["a"] == 0 and reports[link["b"]].host != reports[0].host
    }


def clocks(ahead: Mapping[str, float], here: str) -> Check:
    """Checks that the hosts' clocks agree.

    Args:
        ahead: seconds that each other host's clock is ahead.
        here: the host that it was measured from.
    """
    if not ahead:
        return ok("clocks", "one host")
    host = max(ahead, key=lambda name: abs(ahead[name]))
    if abs(ahead[host]) < SKEW_WARN:
        side = "ahead of" if ahead[host] > 0 else "behind"
        return ok("clocks", f"largest difference: {host} is {abs(ahead[host]):.3f} s {side} {here}")
    skewed = [f"{name} {value:+.1f} s" for name, value in ahead.items() if abs(value) >= SKEW_WARN]
    remedy = "synchronize all hosts with one time server (chronyc makestep, timedatectl set-ntp true)"
    result = fail if abs(ahead[host]) >= SKEW_FAIL else warn
    return result("clocks", f"{', '.join(skewed)} compared with {here}", remedy)


def reachability(links: Sequence[Mapping[str, Any]], reports: Sequence[Report]) -> Check:
    """Checks that each host reaches each other host by TCP, on any port."""
    hosts = [report.host for report in reports]
    for link in links:
        if "error" in link:
            found = f"{_pair(link, hosts, ' does not reach ')}: {link['error']}"
            others = sum("error" in other for other in links) - 1
            found += f"; and {others} more" if others else ""
            remedy = (
                f"open all ports between {hosts[link['a']]} and {hosts[link['b']]} (firewall), check that the "
                "link is up, or name the interface that connects them (-i)"
            )
            return fail("network", found, remedy)
    duplicate = _duplicate_address(reports)
    if duplicate is not None:
        found = f"{duplicate}: MPI may try it, and hang"
        return warn("network", found, "name the interface that connects the hosts (-i eth0)")
    if not links:
        return ok("network", "one process")
    used = sorted({link["address"] for link in links if hosts[link["a"]] != hosts[link["b"]]})
    where = f"over {join_distinct(used)}" if used else "on one host"
    return ok("network", f"{len(links)} connections {where}")


def _duplicate_address(reports: Sequence[Report]) -> str | None:
    """Returns the first address that two hosts share, with their names; None if there is none."""
    owners: dict[str, list[str]] = defaultdict(list)
    for host, report in {report.host: report for report in reports}.items():
        for address in report.facts.get("addresses", []):
            owners[address].append(host)
    shared = (
        f"{address} is an address of {' and of '.join(own[:2])}" for address, own in owners.items() if own[1:]
    )
    return next(shared, None)


def links(links: Sequence[Mapping[str, Any]], reports: Sequence[Report]) -> Check:
    """Names the slowest pair, and checks whether it is too slow."""
    hosts = [report.host for report in reports]
    measured = [link for link in links if "rate" in link]
    if not measured:
        return warn("links", "not measured", "see the checks that failed") if links else ok("links", "one process")
    slowest = min(measured, key=lambda link: link["rate"])
    longest = max(measured, key=lambda link: link["rtt"])
    median = statistics.median(link["rate"] for link in measured)
    found = f"slowest pair {_pair(slowest, hosts)}: {_rate(slowest['rate'])}, {_round_trip(slowest['rtt'])}"
    total = sum(link["a"] < link["b"] for link in links)
    if total > 1:  # the time limit may leave out pairs of many hosts
        found += f" ({len(measured)} of {total} pairs, median {_rate(median)})"
    limit = max(SLOW_LINK, SLOW_FRACTION * median * (len(measured) > 2))
    slow = [link for link in measured if link["rate"] < limit]
    common = set.intersection(*({hosts[link["a"]], hosts[link["b"]]} for link in slow)) if slow else set()
    if len(common) == 1:
        found += f"; {common.pop()} is in every slow pair"
    one_host = hosts[longest["a"]] == hosts[longest["b"]]
    if slow and not one_host:
        remedy = (
            "check that host's cable, switch port and interface speed (ethtool), or name a faster interface (-i)"
        )
        return warn("links", found, remedy)
    if longest["rtt"] > SLOW_ROUND_TRIP and not one_host:
        found += f"; {_pair(longest, hosts)}: {_round_trip(longest['rtt'])}"
        remedy = "check what else uses this network and these hosts, or name a faster interface (-i)"
        return warn("links", found, remedy)
    return ok("links", found)


def computing(speeds: Sequence[Mapping[str, Any]], hosts: list[str]) -> Check:
    """Names the rank that computes slowest, and checks whether it slows the others down.

    A warning needs a rank that is slow in the median of its turns, in all turns but one, and by more than ranks
    vary between turns: a rank that something has interrupted once is not slow.

    Args:
        speeds: by rank, "turns" (GFLOP/s in each turn; all ranks start it together) and "compute" (their median).
        hosts: host names by rank.
    """
    rates = [speed["compute"] for speed in speeds]
    if len(rates) == 1:
        return ok("computing", f"{rates[0]:.0f} GFLOP/s")
    slowest = min(range(len(rates)), key=rates.__getitem__)
    others = [rank for rank in range(len(rates)) if rank != slowest]
    median = statistics.median(rates[rank] for rank in others)
    found = f"slowest rank {slowest} on {hosts[slowest]}: {rates[slowest]:.1f} GFLOP/s, others {median:.1f}"
    turns = [speed["turns"] for speed in speeds]
    parts = [
        rate / statistics.median(turns[rank][number] for rank in others)
        for number, rate in enumerate(turns[slowest])
    ]
    part, slow_turns = statistics.median(parts), sum(part < SLOW_FRACTION for part in parts)
    if slow_turns == 0:
        return ok("computing", found)
    noise = max(map(_variation, turns)) / median  # as a fraction of what the slow rank is compared with
    if part >= SLOW_FRACTION or slow_turns < len(parts) - 1 or 1 - part <= NOISE_FACTOR * noise:
        found += f"; not steady (slow in {slow_turns} of {len(parts)} turns, ranks vary by {noise:.0%})"
        return ok("computing", found)
    remedy = (
        f"check what else runs on {hosts[slowest]} (top, nvidia-smi), its cores and OMP_NUM_THREADS, its "
        "clock rate and temperature; or leave that host out"
    )
    return warn("computing", found, remedy)


def _variation(values: Sequence[float]) -> float:
    """Returns the mean absolute difference from the median."""
    median = statistics.median(values)
    return statistics.fmean(abs(value - median) for value in values)


def sums(speeds: Sequence[Mapping[str, float]]) -> Check:
    """Reports how fast Horovod sums over all ranks; has no limit."""
    latency = max(speed["latency"] for speed in speeds)
    size, seconds = speeds[0]["bytes"], max(speed["seconds"] for speed in speeds)
    large = f"{size / 1e6:.1f} MB in {seconds * 1e3:.1f} ms ({_rate(size / seconds)})"
    return ok("sums", f"{large}, 4 bytes in {latency * 1e3:.2f} ms")


def _pair(link: Mapping[str, Any], hosts: list[str], between: str = " and ") -> str:
    return between.join(f"rank {link[end]} on {hosts[link[end]]}" for end in ("a", "b"))


def _round_trip(seconds: float) -> str:
    return f"round trip {seconds * 1e3:.2f} ms"


def _rate(bytes_per_second: float) -> str:
    unit = bytes_per_second / 1e6
    return f"{unit:.0f} MB/s" if unit >= 10 else f"{unit:.2f} MB/s"
