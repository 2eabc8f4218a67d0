"""A quick look at a job's hosts before the launcher goes there: one line, and exit code 2, if one does not fit.

    python -m hvd_adam.doctor.hosts --hosts host1,host2 --ssh-port 2222 --ssh-key FILE

The scripts in launch/ call it. Neither torch nor Horovod is loaded, here or there: a second or two for all hosts.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from hvd_adam.cli import run
from hvd_adam.doctor import remote
from hvd_adam.doctor.config import DoctorConfig
from hvd_adam.doctor.software import PACKAGE, code_hash
from hvd_adam.errors import UserError

NAME = "hvd_adam.doctor.hosts"
ANSWER_SECONDS = 45.0

# What differs, and how it is said.
ALIKE = {
    "torch": "torch {there} is installed there, {here} here",
    "horovod": "Horovod {there} is installed there, {here} here",
    "code": "the hvd_adam there is another one than here",
}


@dataclass(frozen=True)
class _Problem:
    host: str
    wrong: str
    remedy: str


def identity() -> dict[str, str]:
    """What must be alike on all hosts."""
    return {"torch": _torch_version(), "horovod": _version("horovod"), "code": code_hash(PACKAGE)}


def _torch_version() -> str:
    """As torch says it itself, without loading it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return "none"
    file = Path(spec.origin).with_name("version.py")
    said = re.search(r"^__version__ = '(.+)'", file.read_text(), re.MULTILINE) if file.exists() else None
    return said[1] if said else _version("torch")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def require_alike(config: DoctorConfig) -> None:
    """Looks at all hosts at once.

    Raises:
        UserError: one does not let us in, has not what is here, or has something else; names the first.
    """
    hosts = [host for host in config.host_names() if not is_here(host)]
    here = identity()
    with ThreadPoolExecutor(remote.AT_ONCE) as pool:
        problems = list(pool.map(lambda host: _look_at(host, here, config), hosts))
    for problem in filter(None, problems):
        raise UserError(f"{problem.host}: {problem.wrong}; {problem.remedy}")


def is_here(host: str) -> bool:
    """Whether launchers start ranks there without ssh."""
    return host in ("localhost", "127.0.0.1", socket.gethostname(), socket.gethostname().partition(".")[0])


def _look_at(host: str, here: Mapping[str, str], config: DoctorConfig) -> _Problem | None:
    variables = [f"{name}={shlex.quote(os.environ[name])}" for name in remote.PASSED_ON if os.environ.get(name)]
    there = ["exec", "env", *variables, shlex.quote(sys.executable), "-m", NAME, "--json"]
    command = [*remote.ssh(host, config), f"cd {shlex.quote(os.getcwd())} 2>/dev/null; {' '.join(there)}"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False
        )
    except FileNotFoundError:
        return _Problem(host, "there is no ssh here to reach it with", "install openssh-client")
    except subprocess.TimeoutExpired:
        return _Problem(host, "no answer in time", f"see what `ssh -o BatchMode=yes {host} true` does")
    if done.returncode:
        check = remote.explain(host, done.returncode, done.stderr.splitlines())
        return _Problem(host, check.found.removeprefix(f"{host}: "), check.remedy)
    theirs = json.loads(done.stdout.splitlines()[-1])
    for name, text in ALIKE.items():
        if theirs[name] != here[name]:
            wrong = text.format(here=here[name], there=theirs[name])
            return _Problem(host, wrong, "have the same on every host: a shared folder, or the same set-up")
    return None


def _main(config: DoctorConfig) -> None:
    if config.hosts is None:
        print(json.dumps(identity()))
    else:
        require_alike(config)


if __name__ == "__main__":
    run(_main, DoctorConfig, NAME)
