"""Checks the hosts of a job before the launcher starts ranks there: one line and exit code 2 on a mismatch.

    python -m hvd_adam.doctor.hosts --hosts host1,host2 --ssh-port 2222 --ssh-key FILE

The scripts in launch/ call it. It loads neither torch nor Horovod, here or there, and takes a second or two for
all hosts.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hvd_adam.cli import run
from hvd_adam.doctor import remote
from hvd_adam.doctor.config import DoctorConfig
from hvd_adam.errors import UserError
from hvd_adam.versions import code_hash, installed_version

NAME = "hvd_adam.doctor.hosts"
TIMEOUT_SECONDS = 45.0

# The message for each key of `installed_versions` that differs.
MISMATCHES = {
    "torch": "torch {there} is installed there, {here} here",
    "horovod": "Horovod {there} is installed there, {here} here",
    "code": "the code of hvd_adam there differs from the code here",
}


@dataclass(frozen=True)
class _Problem:
    host: str
    found: str
    remedy: str


def installed_versions() -> dict[str, str]:
    """Returns the versions that must be identical on all hosts, and a hash of the package's code."""
    return {"torch": _torch_version(), "horovod": installed_version("horovod", "none"), "code": code_hash()}


def _torch_version() -> str:
    """Returns `torch.__version__` without importing torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return "none"
    file = Path(spec.origin).with_name("version.py")
    match = re.search(r"^__version__ = '(.+)'", file.read_text(), re.MULTILINE) if file.exists() else None
    return match[1] if match else installed_version("torch", "none")


def require_identical(config: DoctorConfig) -> None:
    """Checks all hosts in parallel.

    Raises:
        UserError: the ssh login to a host fails, or something is missing or different there. Names the first such
            host.
    """
    hosts = [host for host in config.host_names() if not is_local(host)]
    here = installed_versions()
    with ThreadPoolExecutor(remote.MAX_PARALLEL) as pool:
        problems = list(pool.map(lambda host: _check_host(host, here, config), hosts))
    for problem in filter(None, problems):
        raise UserError(f"{problem.host}: {problem.found}; {problem.remedy}")


def is_local(host: str) -> bool:
    """Returns whether launchers start ranks on this host without ssh."""
    return host in ("localhost", "127.0.0.1", socket.gethostname(), socket.gethostname().partition(".")[0])


def _check_host(host: str, here: Mapping[str, str], config: DoctorConfig) -> _Problem | None:
    remote_python = remote.python_command(NAME, "--json")
    command = [*remote.ssh(host, config), f"cd {shlex.quote(os.getcwd())} 2>/dev/null; {remote_python}"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except FileNotFoundError:
        return _Problem(host, "no ssh client on this host", "install openssh-client")
    except subprocess.TimeoutExpired:
        return _Problem(host, "no answer in time", f"run `ssh -o BatchMode=yes {host} true` to see why")
    if done.returncode:
        check = remote.explain(host, done.returncode, done.stderr.splitlines())
        return _Problem(host, check.found.removeprefix(f"{host}: "), check.remedy)
    there = json.loads(done.stdout.splitlines()[-1])
    for name, text in MISMATCHES.items():
        if there[name] != here[name]:
            found = text.format(here=here[name], there=there[name])
            return _Problem(
                host, found, "install the same software on every host: a shared directory or the same set-up"
            )
    return None


def _main(config: DoctorConfig) -> None:
    if config.hosts is None:
        print(json.dumps(installed_versions()))
    else:
        require_identical(config)


if __name__ == "__main__":
    run(_main, DoctorConfig, NAME)
