"""The Python of `helpers.forked_python` behaves as the installed one.

Hazards: an exit code or a signal that does not pass through; a variable, folder or path that is the server's; a
fork that outlives the program that was started.
"""

import json
import os
import signal
import subprocess
import sys

import pytest
from helpers.cluster.hosts import Hosts, skip_reason
from helpers.forked_python import ForkServer
from helpers.training_runs import ROOT


@pytest.fixture(scope="module")
def python():
    server = ForkServer()
    yield server.python
    server.close()


def run(python, *argv, **options):
    return subprocess.run([python, *argv], capture_output=True, text=True, timeout=250, **options)


SHOWN = """
import json, os, sys, torch
def tell():
    names = ("argv", "orig_argv", "dont_write_bytecode", "executable")
    shown = {name: getattr(sys, name) for name in names} | {"path": sys.path[:3], "name": __name__}
    shown |= {"threads": torch.get_num_threads(), "cores": list(os.sched_getaffinity(0))}
    print(json.dumps([shown, os.getcwd(), dict(os.environ)]))
tell()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["-c", "-m", "script"])
def test_a_program_finds_what_it_would_find_in_a_new_process(python, how, tmp_path):
    (tmp_path / "mine.py").write_text(SHOWN)
    start = {"-c": ["-c", SHOWN], "-m": ["-m", "mine"], "script": ["mine.py"]}[how]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MINE": "a\n'b"}
    environ["PYTHONDONTWRITEBYTECODE"] = "1"
    options = {"cwd": tmp_path, "env": environ}
    found, expected = (run(each, *start, "x", "a  b", **options) for each in (python, sys.executable))
    assert found.stderr == expected.stderr == ""
    assert json.loads(found.stdout) == json.loads(expected.stdout)


@pytest.mark.parametrize(
    "code", ["raise SystemExit", "raise SystemExit(75)", "raise SystemExit('text')", "1 / 0", "print('\\u00e9')"]
)
def test_output_and_exit_code_are_those_of_a_new_process(python, code):
    found, expected = run(python, "-c", code), run(sys.executable, "-c", code)
    assert (found.returncode, found.stdout, found.stderr) == (
        expected.returncode,
        expected.stdout,
        expected.stderr,
    )


def test_the_signal_that_ends_a_fork_ends_the_program(python):
    assert run(python, "-c", "import os; os.abort()").returncode == -signal.SIGABRT
    assert run(python, "-c", "import os; os.kill(os.getpid(), 9)").returncode == -signal.SIGKILL


@pytest.fixture
def waiting(python):
    """A program that has started, and the number of its fork's process."""
    # It tells that it has started inside of `try`: the signal may follow at once.
    wait = "try:\n    print(os.getpid(), flush=True)\n    while True: time.sleep(0.1)\nfinally: print('ends')"
    code = f"import os, time\n{wait}"
    with subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, text=True) as program:
        yield program, int(program.stdout.readline())
        program.kill()


@pytest.mark.skipif(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="a background job ignores Ctrl-C")
def test_signals_reach_the_fork(waiting):
    program, _ = waiting
    program.send_signal(signal.SIGINT)
    assert (program.communicate(timeout=250)[0], program.returncode) == ("ends\n", -signal.SIGINT)


def test_a_fork_ends_with_its_program(waiting):
    program, fork = waiting
    end = os.pidfd_open(fork)
    program.kill()
    assert program.stdout.read() == ""  # until the fork has closed it, too
    os.close(end)


@pytest.mark.skipif(skip_reason() is not None, reason=f"no hosts made of namespaces: {skip_reason()}")
def test_a_program_on_another_host_is_a_fork_there_and_ends_with_the_host(python, tmp_path):
    shown = (
        "import os; print([os.readlink(f'/proc/self/ns/{kind}') for kind in ('net', 'uts', 'ipc', 'pid', 'mnt')])"
    )
    wait = "import socket, time; print(socket.gethostname(), flush=True); time.sleep(1000)"
    with Hosts(tmp_path / "hosts", ["node1"]) as hosts:
        found, expected = (hosts.run("node1", [each, "-c", shown]).stdout for each in (python, sys.executable))
        assert found == expected != run(python, "-c", shown).stdout
        program = hosts.popen("node1", [python, "-c", f"{shown}; {wait}"], stdout=subprocess.PIPE, text=True)
        assert [program.stdout.readline() for _ in range(2)] == [expected, "node1\n"]
        hosts.kill("node1")
        assert program.communicate(timeout=250)[0] == "" and program.returncode
    assert run(python, "-c", shown).stdout == run(sys.executable, "-c", shown).stdout
