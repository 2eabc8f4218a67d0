"""The command: examines this machine, other hosts, or the job that it runs in, and tells what came of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from hvd_adam.distributed.launch_env import LaunchInfo, detect_launcher, is_elastic
from hvd_adam.doctor import judge, measured, remote, show
from hvd_adam.doctor.checks import FAIL, Check, Report, fail, ok, warn, worst
from hvd_adam.doctor.config import DoctorConfig
from hvd_adam.doctor.follow import STAGES, WORKER, Findings, following
from hvd_adam.errors import UserError

NAME = "hvd_adam.doctor"
LEAVE_SECONDS = 30.0  # in which the launcher ends a rank, once rank 0 has waited for it and told what is wrong


def examine(config: DoctorConfig) -> None:
    """Runs on every rank. Rank 0 tells what all have found, and exits with 1 if a check has failed.

    Raises:
        UserError: options, or a launcher, that do not go together.
    """
    launch = detect_launcher()
    if config.hosts is not None and launch.launcher != "none":
        raise UserError(f"--hosts goes without a launcher, and {launch.launcher} started this")
    if is_elastic():
        raise UserError("under an elastic launcher ranks come and go: start the doctor without --min-np")
    if config.hosts is not None:
        _examine_hosts(config)
        return
    with following(WORKER, _task(config)) as findings:
        if launch.rank:
            _leave_to_rank_0(launch, findings, config.timeout)
            return
        checks = job_checks(findings, launch, config)
        if findings.gathered and not findings.ended:
            checks.append(_ssh(findings.reports, launch, config))
        by = f"started by {launch.launcher}" if launch.size > 1 else "no launcher"
        hosts = len({report.host for report in findings.reports})
        title = f"hvd_adam.doctor: {_number(launch.size, 'rank')} on {_number(hosts, 'host')}, {by}"
        code = _tell(title, checks, findings, config)
    if code:
        sys.exit(code)


def _task(config: DoctorConfig, *, alone: bool = False, local: bool = False) -> dict[str, Any]:
    """What a worker is told.

    Args:
        config: of the command.
        alone: not to look for the launcher that it may run under.
        local: to end before Horovod is started.
    """
    settings = {name: getattr(config, name) for name in ("output_dir", "device", "seconds", "timeout")}
    return {**settings, "alone": alone, "local": local}


def job_checks(findings: Findings, launch: LaunchInfo, config: DoctorConfig) -> list[Check]:
    """All checks of a job, from what its ranks have found.

    Args:
        findings: as rank 0 has them; of rank 0 alone where the others could not be heard.
        launch: what the launcher says of this rank.
        config: of the command.
    """
    reports = findings.reports
    who = judge.ranks_of(reports)
    checks = judge.merged(reports, who)
    if findings.gathered or launch.size == 1:
        checks.append(judge.cores(reports, together=True))
    if all("gpus" in report.facts for report in reports):
        checks.append(judge.gpus(reports, config.device))
    checks.append(judge.versions(reports, who))
    if findings.gathered:
        checks.append(ok("launcher", f"{launch.launcher}: {launch.size} ranks, each sees all"))
    if findings.missing is not None:
        checks.append(_missing(findings, who, config))
    if findings.links is not None:
        checks += [measured.reachability(findings.links, reports), measured.pairs(findings.links, reports)]
        checks.append(measured.clocks(measured.ahead(findings.links, reports), reports[0].host))
    if findings.started:
        checks.append(ok("Horovod starts", f"{_number(findings.started, 'rank')} on {findings.device}"))
    if findings.speeds:
        checks.append(measured.computing(findings.speeds, [report.host for report in reports]))
    if len(findings.speeds) > 1:
        checks.append(measured.summing(findings.speeds))
    return checks + findings.checks


def _missing(findings: Findings, who: judge.Who, config: DoctorConfig) -> Check:
    lost = findings.missing or []
    here = [number for number, report in enumerate(findings.reports) if report.rank not in lost]
    found = f"a rank was lost on the way, within {config.timeout:g} s"
    if lost:
        found = f"rank{'s' * (len(lost) > 1)} {', '.join(map(str, lost))} not here after {config.timeout:g} s"
    found += f"; here {'are' if len(here) > 1 else 'is'} {who(here)}" if lost and here else ""
    return fail("ranks", found, STAGES["arrival"][1])


def _ssh(reports: Sequence[Report], launch: LaunchInfo, config: DoctorConfig) -> Check:
    """Whether rank 0's host, where most launchers are started, may log in to the others."""
    others = list(dict.fromkeys(report.host for report in reports if report.host != reports[0].host))
    if not others:
        return ok("ssh", "not needed: one host")
    if launch.launcher not in ("horovodrun", "mpirun"):
        return ok("ssh", f"not needed by {launch.launcher}")
    check = remote.summary(remote.log_in(others, config), others)
    if check.status == FAIL:  # the ranks have been started, from another host perhaps
        return warn("ssh", f"from {reports[0].host}: {check.found}", check.remedy)
    return check


def _leave_to_rank_0(launch: LaunchInfo, findings: Findings, timeout: float) -> None:
    """Tells on stderr what rank 0 cannot know, and nothing else, and lets it end the job.

    Raises:
        SystemExit: with 1, if the examination has not come to its end.
    """
    if findings.done and findings.missing is None:
        return
    if findings.ended:
        sys.exit(1)
    unheard = [] if findings.gathered else [check for report in findings.reports for check in report.checks]
    if findings.missing == [0]:
        _say_aside(launch, [*unheard, fail("ranks", "rank 0 is not here", STAGES["arrival"][1])])
        sys.exit(1)
    if findings.overdue and findings.stage == "arrival":  # as on rank 0, if that is here
        _say_aside(launch, unheard)
        time.sleep(timeout + LEAVE_SECONDS)
        _say_aside(launch, findings.checks)
        sys.exit(1)
    if findings.missing is None:
        _say_aside(launch, unheard + findings.checks)
    time.sleep(timeout + LEAVE_SECONDS)
    sys.exit(1)


def _say_aside(launch: LaunchInfo, checks: Sequence[Check]) -> None:
    host = judge.this_host()
    for check in checks:
        if check.status == FAIL:
            line = f"{NAME}: rank {launch.rank} on {host}: {check.name}: {check.found}: {check.remedy}"
            print(line, file=sys.stderr, flush=True)


def _examine_hosts(config: DoctorConfig) -> None:
    hosts = config.host_names()
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(remote.examine, hosts, config, _task(config, alone=True, local=True))
        with following(WORKER, _task(config, alone=True)) as findings:
            reports, troubles = others.result()
            speeds, here = findings.speeds, findings.reports
            ahead = {report.host: report.facts["ahead"] for report in reports}
            findings = replace(findings, reports=[*here, *reports])
            who = judge.hosts_of(findings.reports)
            checks = judge.merged(findings.reports, who)
            checks.append(judge.cores(findings.reports, together=False))
            checks.append(judge.versions(findings.reports, who))
            checks.append(measured.clocks(ahead, judge.this_host()))
            if findings.started:
                checks.append(ok("Horovod starts", f"here, on {findings.device}"))
            if speeds:
                checks.append(measured.computing(speeds, [judge.this_host()]))
            checks += findings.checks
            checks += [check for check in troubles if check.name != "ssh"]
            checks.append(remote.summary(troubles, hosts))
            title = f"hvd_adam.doctor: this machine, and {_number(len(hosts), 'host')} by ssh"
            code = _tell(title, checks, findings, config)
    if code:
        sys.exit(code)


def _tell(title: str, checks: list[Check], findings: Findings, config: DoctorConfig) -> int:
    """Prints the outcome; the exit code that it means."""
    text = show.as_json(title, checks, findings) if config.json else show.table(title, checks)
    print(text, flush=True)
    return int(worst(check.status for check in checks) == FAIL)


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
