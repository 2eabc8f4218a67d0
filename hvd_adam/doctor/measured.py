"""Judges what was measured between hosts and ranks: reachability, links, clocks, speeds. Pure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from hvd_adam.doctor.checks import Check, Report, fail, ok, shortened, warn

SLOW_LINK = 12.5e6  # bytes/s: 100 Mbit/s, over which a step of 10 M parameters takes seconds
SLOW_PING = 2e-3  # seconds there and back between hosts
SLOW_SHARE = 0.6  # of the usual, below which a pair or a rank is called slow
SKEW_WARN, SKEW_FAIL = 1.0, 300.0  # seconds; munge and Kerberos refuse from the second on


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
    where = f"by {shortened(used)}" if used else "on one host"
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
    every = sum(link["a"] < link["b"] for link in links)
    if every > 1:  # of many hosts not all in the time that there is
        found += f" ({len(measured)} of {every} pairs, median {_rate(usual)})"
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
