"""Checks other hosts over ssh: the login, and what each host's own checks find. Never asks for a password."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hvd_adam.distributed.launch_env import SETUP_COMMAND
from hvd_adam.doctor.config import DoctorConfig
from hvd_adam.doctor.report import Check, Report, fail, ok
from hvd_adam.doctor.worker_process import error_line, run_worker

CONNECT_SECONDS = 5
LOGIN_SECONDS = 30.0  # a shell starts slowly on a busy host
MAX_PARALLEL = 16
FORWARDED_VARIABLES = ("PYTHONPATH", "LD_LIBRARY_PATH")

NO_SSH = fail("ssh", "no ssh client on this host", "install openssh-client")

# Text in the output of ssh or of the remote shell; what is wrong; the remedy. The first match is reported.
CAUSES = (
    ("Could not resolve hostname", "unknown host", "check its name, and its entry in DNS or /etc/hosts"),
    (
        "Host key verification failed",
        "its host key is unknown or has changed",
        "ssh-keyscan {host} >> ~/.ssh/known_hosts, after you have verified the key",
    ),
    ("Permission denied", "ssh key rejected", "ssh-copy-id {host}, or name the right key with --ssh-key"),
    ("Too many authentication failures", "ssh keys rejected", "name the right key with --ssh-key"),
    ("Connection refused", "its ssh port is closed", "start sshd there, or name its port with --ssh-port"),
    ("timed out", "no answer at its ssh port", "check that the host is up and no firewall drops the connection"),
    ("No route to host", "no route to host", "check that the host is up and on this network"),
    ("Network is unreachable", "network unreachable", "check the network of this host"),
    ("Connection reset", "sshd closed the connection", "see its log there, MaxStartups and /etc/hosts.deny"),
    ("Connection closed", "sshd closed the connection", "see its log there, MaxStartups and /etc/hosts.deny"),
    ("No module named", "{line}", f"install the project there (`{SETUP_COMMAND}`), at the same path as here"),
    (
        "cd: ",
        "the directory {folder} does not exist there",
        "use the same paths on every host: a shared directory or a copy",
    ),
    (
        "not found",
        "{python} does not exist there",
        f"run `{SETUP_COMMAND}` there, or share the environment at the same path",
    ),
    (
        "No such file",
        "{python} does not exist there",
        f"run `{SETUP_COMMAND}` there, or share the environment at the same path",
    ),
)


def explain(host: str, code: int | None, stderr: Sequence[str]) -> Check:
    """Returns why a host could not be checked.

    Args:
        host: name of the host.
        code: exit code of ssh; None if it did not end in time.
        stderr: the lines that ssh wrote to stderr.
    """
    for text, problem, remedy in CAUSES:
        line = next((line for line in stderr if text in line), None)
        if line is not None:
            values = {
                "host": host,
                "line": line.strip().split(": ")[-1],
                "folder": os.getcwd(),
                "python": sys.executable,
            }
            return fail("ssh", f"{host}: {problem.format(**values)}", remedy.format(**values))
    how = "no answer in time" if code is None else f"exit code {code}{error_line(stderr)}"
    return fail("ssh", f"{host}: {how}", f"run `ssh -o BatchMode=yes {host} true` to see why")


def failed_logins(hosts: Sequence[str], config: DoctorConfig) -> list[Check]:
    """Tries to log in to each host; returns a failure for each host where that does not work."""
    with ThreadPoolExecutor(MAX_PARALLEL) as pool:
        return [check for check in pool.map(lambda host: _failed_login(host, config), hosts) if check is not None]


def _failed_login(host: str, config: DoctorConfig) -> Check | None:
    command = [*ssh(host, config), "true"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LOGIN_SECONDS, check=False
        )
    except FileNotFoundError:
        return NO_SSH
    except subprocess.TimeoutExpired:
        return explain(host, None, [])
    return explain(host, done.returncode, done.stderr.splitlines()) if done.returncode else None


def check_hosts(
    hosts: Sequence[str], config: DoctorConfig, task: dict[str, Any]
) -> tuple[list[Report], list[Check]]:
    """Runs the worker on each host, with the path of this Python, in this directory, with the code that is there.

    Returns:
        The reports, with fact "ahead" (seconds that the host's clock is ahead of this host's); and a failure for
        each host that could not be checked completely.
    """
    with ThreadPoolExecutor(MAX_PARALLEL) as pool:
        results = list(pool.map(lambda host: _check_host(host, config, task), hosts))
    reports = [report for report, _ in results if report is not None]
    return reports, [check for _, check in results if check is not None]


def _check_host(host: str, config: DoctorConfig, task: dict[str, Any]) -> tuple[Report | None, Check | None]:
    command = f"cd {shlex.quote(os.getcwd())} && {python_command('hvd_adam.doctor.worker')}"
    try:
        with run_worker([*ssh(host, config), command], task) as findings:
            received = time.time()
            if not findings.reports:
                return None, explain(host, findings.code, tuple(findings.stderr))
            report = findings.reports[0]
            report.facts["ahead"] = report.facts["time"] - received
            report.host = host  # the name given by the user: several hosts may have the same host name
            check = findings.checks[0] if findings.checks else None
            return report, check and fail(check.name, f"{host}: {check.found}", check.remedy)
    except FileNotFoundError:
        return None, NO_SSH


def python_command(module: str, *arguments: str) -> str:
    """Returns a shell command that runs a module in this Python on another host, with the same search paths."""
    variables = [f"{name}={shlex.quote(os.environ[name])}" for name in FORWARDED_VARIABLES if os.environ.get(name)]
    return " ".join(["exec", "env", *variables, shlex.quote(sys.executable), "-m", module, *arguments])


def ssh(host: str, config: DoctorConfig) -> list[str]:
    """Returns an ssh command for a host that never asks for input; append the command to run there."""
    command = ["ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    command += ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=2"]
    if config.ssh_port is not None:
        command += ["-p", str(config.ssh_port)]
    if config.ssh_key is not None:
        command += ["-i", config.ssh_key]
    return [*command, host]


def login_check(failures: Sequence[Check], hosts: Sequence[str]) -> Check:
    """Merges the failed checks named "ssh" into one check.

    Args:
        failures: as `failed_logins` or `check_hosts` returns them; those of another name are ignored.
        hosts: all hosts that were tried.
    """
    failed = [check for check in failures if check.name == "ssh"]
    if not failed:
        return ok("ssh", f"login works: {', '.join(hosts)}")
    remedies = dict.fromkeys(check.remedy for check in failed)
    return fail("ssh", "; ".join(check.found for check in failed), "; ".join(remedies))
