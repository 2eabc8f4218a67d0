"""The command `python -m hvd_adam.doctor`: checks this machine, other hosts or the job, and prints the result."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from hvd_adam.distributed.launch_env import LaunchInfo, detect_launcher, is_elastic
from hvd_adam.doctor import job_checks, measurement_checks, output, remote
from hvd_adam.doctor.config import DoctorConfig
from hvd_adam.doctor.report import FAIL, Check, Report, fail, ok, warn, worst
from hvd_adam.doctor.worker_process import STAGES, WORKER, Findings, run_worker
from hvd_adam.errors import UserError
from hvd_adam.log import write_result

NAME = "hvd_adam.doctor"
TERMINATE_SECONDS = 30.0  # in which the launcher ends this rank after rank 0 has printed the result


def diagnose(config: DoctorConfig) -> None:
    """Runs on every rank. Rank 0 prints the result and exits with 1 if a check failed.

    Raises:
        UserError: --hosts under a launcher, or an elastic launcher.
    """
    launch = detect_launcher()
    if config.hosts is not None and launch.launcher != "none":
        raise UserError(f"--hosts cannot be used under a launcher, and {launch.launcher} started this process")
    if is_elastic():
        raise UserError("the doctor needs a fixed number of ranks: start it without --min-np")
    if config.hosts is not None:
        _diagnose_hosts(config)
        return
    with run_worker(WORKER, _task(config)) as findings:
        if launch.rank:
            _leave_to_rank_0(launch, findings, config.timeout)
            return
        checks = checks_of_job(findings, launch, config)
        if findings.gathered and not findings.job_ended:
            checks.append(_login_check(findings.reports, launch, config))
        by = f"started by {launch.launcher}" if launch.size > 1 else "no launcher"
        hosts = len({report.host for report in findings.reports})
        title = f"{NAME}: {_count(launch.size, 'rank')} on {_count(hosts, 'host')}, {by}"
        code = _print_result(title, checks, findings, config)
    if code:
        sys.exit(code)


def _task(config: DoctorConfig, *, single_rank: bool = False, local: bool = False) -> dict[str, Any]:
    """Returns the task of a worker.

    Args:
        config: configuration of the command.
        single_rank: ignore the launcher that the worker may run under.
        local: end before Horovod is started.
    """
    settings = {name: getattr(config, name) for name in ("output_dir", "device", "seconds", "timeout")}
    return {**settings, "single_rank": single_rank, "local": local}


def checks_of_job(findings: Findings, launch: LaunchInfo, config: DoctorConfig) -> list[Check]:
    """Returns all checks of a job.

    Args:
        findings: of rank 0's worker; only rank 0's own if the other ranks could not be reached.
        launch: launcher, rank and size of this process.
        config: configuration of the command.
    """
    reports = findings.reports
    name_ranks = job_checks.ranks_of(reports)
    checks = job_checks.merged(reports, name_ranks)
    if findings.gathered or launch.size == 1:
        checks.append(job_checks.cores(reports, together=True))
    if all("gpus" in report.facts for report in reports):
        checks.append(job_checks.gpus(reports, config.device))
    checks.append(job_checks.versions(reports, name_ranks))
    if findings.gathered:
        checks.append(ok("launcher", f"{launch.launcher}: {launch.size} ranks, all connected"))
    if findings.missing is not None:
        checks.append(_missing_ranks(findings, name_ranks, config))
    if findings.links is not None:
        ahead = measurement_checks.clock_offsets(findings.links, reports)
        checks.append(measurement_checks.reachability(findings.links, reports))
        checks.append(measurement_checks.links(findings.links, reports))
        checks.append(measurement_checks.clocks(ahead, reports[0].host))
    if findings.started:
        checks.append(ok("Horovod starts", f"{_count(findings.started, 'rank')} on {findings.device}"))
    if findings.speeds:
        checks.append(measurement_checks.computing(findings.speeds, [report.host for report in reports]))
    if len(findings.speeds) > 1:
        checks.append(measurement_checks.sums(findings.speeds))
    return checks + findings.checks


def _missing_ranks(findings: Findings, name_ranks: job_checks.Namer, config: DoctorConfig) -> Check:
    missing = findings.missing or []
    present = [number for number, report in enumerate(findings.reports) if report.rank not in missing]
    found = f"a rank stopped responding within {config.timeout:g} s"
    if missing:
        ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        found = f"{ranks} missing after {config.timeout:g} s"
    found += f"; present: {name_ranks(present)}" if missing and present else ""
    return fail("ranks", found, STAGES["arrival"][1])


def _login_check(reports: Sequence[Report], launch: LaunchInfo, config: DoctorConfig) -> Check:
    """Checks the ssh login from rank 0's host, where most launchers are started, to the other hosts."""
    others = list(dict.fromkeys(report.host for report in reports if report.host != reports[0].host))
    if not others:
        return ok("ssh", "not needed: one host")
    if launch.launcher not in ("horovodrun", "mpirun"):
        return ok("ssh", f"not needed by {launch.launcher}")
    check = remote.login_check(remote.failed_logins(others, config), others)
    if check.status == FAIL:  # only a warning: the ranks were started, perhaps from another host
        return warn("ssh", f"from {reports[0].host}: {check.found}", check.remedy)
    return check


def _leave_to_rank_0(launch: LaunchInfo, findings: Findings, timeout: float) -> None:
    """Prints on stderr only what rank 0 cannot know, and lets rank 0 end the job.

    Raises:
        SystemExit: with 1, unless the worker has completed.
    """
    if findings.done and findings.missing is None:
        return
    if findings.job_ended:
        sys.exit(1)
    not_sent = [] if findings.gathered else [check for report in findings.reports for check in report.checks]
    if findings.missing == [0]:
        _print_failures(launch, [*not_sent, fail("ranks", "rank 0 is missing", STAGES["arrival"][1])])
        sys.exit(1)
    if findings.overdue and findings.stage == "arrival":  # rank 0, if present, reports this too
        _print_failures(launch, not_sent)
        time.sleep(timeout + TERMINATE_SECONDS)
        _print_failures(launch, findings.checks)
        sys.exit(1)
    if findings.missing is None:
        _print_failures(launch, not_sent + findings.checks)
    time.sleep(timeout + TERMINATE_SECONDS)
    sys.exit(1)


def _print_failures(launch: LaunchInfo, checks: Sequence[Check]) -> None:
    host = job_checks.this_host()
    for check in checks:
        if check.status == FAIL:
            line = f"{NAME}: rank {launch.rank} on {host}: {check.name}: {check.found}: {check.remedy}"
            print(line, file=sys.stderr, flush=True)


def _diagnose_hosts(config: DoctorConfig) -> None:
    hosts = config.host_names()
    with ThreadPoolExecutor(1) as pool:
        remote_task = _task(config, single_rank=True, local=True)
        remote_results = pool.submit(remote.check_hosts, hosts, config, remote_task)
        with run_worker(WORKER, _task(config, single_rank=True)) as local_findings:
            reports, failures = remote_results.result()
            findings = replace(local_findings, reports=[*local_findings.reports, *reports])
            checks = _checks_of_hosts(findings, {report.host: report.facts["ahead"] for report in reports})
            checks += [check for check in failures if check.name != "ssh"]
            checks.append(remote.login_check(failures, hosts))
            title = f"{NAME}: this machine, and {_count(len(hosts), 'host')} over ssh"
            code = _print_result(title, checks, findings, config)
    if code:
        sys.exit(code)


def _checks_of_hosts(findings: Findings, ahead: dict[str, float]) -> list[Check]:
    reports, here = findings.reports, job_checks.this_host()
    name_hosts = job_checks.hosts_of(reports)
    checks = job_checks.merged(reports, name_hosts)
    checks.append(job_checks.cores(reports, together=False))
    checks.append(job_checks.versions(reports, name_hosts))
    checks.append(measurement_checks.clocks(ahead, here))
    if findings.started:
        checks.append(ok("Horovod starts", f"here, on {findings.device}"))
    if findings.speeds:
        checks.append(measurement_checks.computing(findings.speeds, [here]))
    return checks + findings.checks


def _print_result(title: str, checks: list[Check], findings: Findings, config: DoctorConfig) -> int:
    """Prints the result and returns the exit code."""
    text = output.as_json(title, checks, findings) if config.json else output.table(title, checks)
    write_result(f"{text}\n")
    return int(worst(check.status for check in checks) == FAIL)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
