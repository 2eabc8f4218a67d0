"""Other hosts by ssh: whether they let us in, and what an examination there finds. Never asks for a password."""

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
from hvd_adam.doctor.checks import Check, Report, fail, ok
from hvd_adam.doctor.config import DoctorConfig
from hvd_adam.doctor.follow import following, telling

CONNECT_SECONDS = 5
LOGIN_SECONDS = 30.0  # for a shell on a busy host
AT_ONCE = 16
PASSED_ON = ("PYTHONPATH", "LD_LIBRARY_PATH")

# What ssh, or the shell there, says; what is wrong; what to do. The first that is said counts.
CAUSES = (
    ("Could not resolve hostname", "unknown host", "see its name, and that DNS or /etc/hosts knows it"),
    (
        "Host key verification failed",
        "its host key is unknown or has changed",
        "ssh-keyscan {host} >> ~/.ssh/known_hosts, if it is right",
    ),
    ("Permission denied", "ssh refuses our key", "ssh-copy-id {host}, or name the right key with --ssh-key"),
    ("Too many authentication failures", "ssh refuses our keys", "name the right key with --ssh-key"),
    ("Connection refused", "its ssh port is closed", "start sshd there, or name its port with --ssh-port"),
    ("timed out", "no answer at its ssh port", "see that the host is up and no firewall drops the connection"),
    ("No route to host", "no way to it", "see that the host is up and on this network"),
    ("Network is unreachable", "no way to it", "see the network of this host"),
    ("Connection reset", "sshd ends the connection", "see its log there, MaxStartups and /etc/hosts.deny"),
    ("Connection closed", "sshd ends the connection", "see its log there, MaxStartups and /etc/hosts.deny"),
    ("No module named", "{line}", f"set the project up there (`{SETUP_COMMAND}`), at the same path as here"),
    ("cd: ", "the folder {folder} is not there", "have the same paths on every host: a shared folder, or a copy"),
    ("not found", "{python} is not there", f"`{SETUP_COMMAND}` there, or a shared environment at the same path"),
    (
        "No such file",
        "{python} is not there",
        f"`{SETUP_COMMAND}` there, or a shared environment at the same path",
    ),
)


def explain(host: str, code: int | None, said: Sequence[str]) -> Check:
    """Why a host could not be examined.

    Args:
        host: its name.
        code: exit code of ssh; None if it did not end.
        said: what it wrote to stderr.
    """
    for mark, wrong, remedy in CAUSES:
        line = next((line for line in said if mark in line), None)
        if line is not None:
            values = {
                "host": host,
                "line": line.strip().split(": ")[-1],
                "folder": os.getcwd(),
                "python": sys.executable,
            }
            return fail("ssh", f"{host}: {wrong.format(**values)}", remedy.format(**values))
    how = "no answer in time" if code is None else f"exit code {code}{telling(said)}"
    return fail("ssh", f"{host}: {how}", f"see what `ssh -o BatchMode=yes {host} true` does")


def log_in(hosts: Sequence[str], config: DoctorConfig) -> list[Check]:
    """Tries to log in to hosts; a failed check for each that does not let us."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [check for check in pool.map(lambda host: _log_in(host, config), hosts) if check is not None]


def _log_in(host: str, config: DoctorConfig) -> Check | None:
    command = [*ssh(host, config), "true"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LOGIN_SECONDS, check=False
        )
    except FileNotFoundError:
        return fail("ssh", "there is no ssh here", "install openssh-client")
    except subprocess.TimeoutExpired:
        return explain(host, None, [])
    return explain(host, done.returncode, done.stderr.splitlines()) if done.returncode else None


def examine(hosts: Sequence[str], config: DoctorConfig, task: dict[str, Any]) -> tuple[list[Report], list[Check]]:
    """Has hosts examine themselves, with this Python, in this folder, with the code that is there.

    Returns:
        The reports that came, with how far a host's clock is ahead in their facts; and what went wrong on the way.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = list(pool.map(lambda host: _examine(host, config, task), hosts))
    reports = [report for report, _ in outcomes if report is not None]
    return reports, [check for _, check in outcomes if check is not None]


def _examine(host: str, config: DoctorConfig, task: dict[str, Any]) -> tuple[Report | None, Check | None]:
    variables = [f"{name}={shlex.quote(os.environ[name])}" for name in PASSED_ON if os.environ.get(name)]
    there = ["exec", "env", *variables, shlex.quote(sys.executable), "-m", "hvd_adam.doctor.worker"]
    command = f"cd {shlex.quote(os.getcwd())} && {' '.join(there)}"
    try:
        with following([*ssh(host, config), command], task) as findings:
            arrived = time.time()
            if not findings.reports:
                return None, explain(host, findings.code, tuple(findings.said))
            report = findings.reports[0]
            report.facts["ahead"] = report.facts["time"] - arrived
            report.host = host  # as it was asked for; what it calls itself may be alike on several
            check = findings.checks[0] if findings.checks else None
            return report, check and fail(check.name, f"{host}: {check.found}", check.remedy)
    except FileNotFoundError:
        return None, fail("ssh", "there is no ssh here", "install openssh-client")


def ssh(host: str, config: DoctorConfig) -> list[str]:
    """A command that logs in to a host, and never asks; the command for there is to be appended."""
    command = ["ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    command += ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=2"]
    if config.ssh_port is not None:
        command += ["-p", str(config.ssh_port)]
    if config.ssh_key is not None:
        command += ["-i", config.ssh_key]
    return [*command, host]


def summary(checks: Sequence[Check], hosts: Sequence[str]) -> Check:
    """One check of ssh from those that failed."""
    failed = [check for check in checks if check.name == "ssh"]
    if not failed:
        return ok("ssh", f"lets us in: {', '.join(hosts)}")
    remedies = dict.fromkeys(check.remedy for check in failed)
    return fail("ssh", "; ".join(check.found for check in failed), "; ".join(remedies))
