"""`guard` in scripts on real ranks: an exception on one rank ends all of them, with one error.

Hazards: N tracebacks of one mistake; Horovod's error after the real one, or instead of it; ranks that wait for
ever in a collective, in Horovod's shutdown or for a launcher that does not end them; an exit code that gets lost;
a remedy that only the training command has; threads, hooks and signal handlers that stay after the block.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest
from helpers.forked_python import forked_python
from helpers.on_ranks import launch, on_ranks
from helpers.training_runs import ROOT

from hvd_adam import guard
from hvd_adam.distributed.context import Cluster
from hvd_adam.errors import CollectiveError, JobError, UserError
from hvd_adam.recovery import guard as module
from hvd_adam.recovery.failure import Failure
from hvd_adam.recovery.guard import Judge

HOST = socket.gethostname()
SINGLE_RANK = Cluster(0, 1, 0, 1, 0, 1, None, "none")

# Each name is what goes wrong; ranks that it does not name continue to the next collective.
SCRIPT = """
import atexit, sys, time
import torch, horovod.torch as hvd
from hvd_adam import Adam, distribute, guard, init
from hvd_adam.errors import Preempted, UserError

cluster = init()
fault, rank = sys.argv[1], cluster.rank
options = {"stall_timeout": 60.0 + rank} if fault == "options" else {}
if fault == "hang":
    options = {"stall_timeout": 2.0}

def fail(*_):
    raise ArithmeticError("the first cause")

def fail_and_shut_down():
    try:
        fail()
    finally:
        hvd.shutdown()

def refuse():
    raise UserError("wrong input; right it")

def stop():
    raise Preempted

FAULTS = {
    "raise on rank 1": lambda: rank == 1 and fail(),
    "raise on all ranks": fail,
    "shut down": lambda: rank == 1 and fail_and_shut_down(),
    "mismatch": lambda: hvd.allreduce(torch.zeros(1 + rank), name="sum"),
    "hang": lambda: rank == 1 and time.sleep(1000),
    "refuse on rank 1": lambda: rank == 1 and refuse(),
    "refuse on all ranks": refuse,
    "exit on rank 1": lambda: rank == 1 and sys.exit(3),
    "exit with a text": lambda: rank == 1 and sys.exit("no more samples"),
    "stop": stop,
}
model = torch.nn.Linear(2, 2)
print("starts", flush=True)
with guard(cluster, **options):
    optimizer = distribute(Adam(model.parameters()), model)
    for update in range(4):
        if update == 3:
            atexit.register(time.sleep, 1000)  # like Horovod's shutdown, which may wait for ever
            if fault == "raise in backward":
                model.weight.register_hook(fail if rank == 1 else lambda gradient: None)
            else:
                FAULTS[fault]()
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    hvd.allreduce(torch.zeros(1), name="the end")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    (folder / "mine.py").write_text(SCRIPT)
    return folder


def start(place, launcher, ranks, fault, forked=True):
    """Runs the script; returns the exit code and what the ranks wrote to stderr, without the launcher's prefixes.

    "patient" is an mpirun that lets the other ranks run when one has failed; the exit code is that of every rank.
    """
    environ = {"PYTHONPATH": f"{place}:{ROOT}"}
    if launcher in ("gloo", "mpi"):
        done = launch([str(place / "mine.py"), fault], ranks, launcher, forked=forked, env=environ, timeout=250)
    else:
        environ["OMPI_MCA_orte_abort_on_non_zero_status"] = "0"
        environ |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        mpirun = ["mpirun", "--oversubscribe", "-np", str(ranks)]
        code_on_stdout = ["sh", "-c", '"$@"; code=$?; echo "exit code $code"; exit $code', "sh"]
        done = subprocess.run(
            [*mpirun, *code_on_stdout, forked_python(), str(place / "mine.py"), fault],
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
            timeout=250,
        )
    assert done.stdout.count("starts") == ranks
    stderr = re.sub(r"^\[(1,)?\d+\]<stderr>:", "", done.stderr, flags=re.MULTILINE)
    # What launchers add: horovodrun's own traceback, a shell's line for each rank that it terminated, boxes.
    stderr = re.sub(r'^Traceback .*\n  File "\S*/horovodrun\.py"(.*\n)*', "", stderr, flags=re.MULTILINE)
    stderr = re.sub(r"^(-{70,}\n(?:.*\n)*?-{70,}|Terminated)\n", "", stderr, flags=re.MULTILINE)
    stderr = re.sub(r"^.* ranks on \S+ share \d+ cores? and wait .*\n", "", stderr, flags=re.MULTILINE)
    codes = re.findall(r"exit code (\d+)\n", done.stdout)
    if codes:
        assert len(codes) == ranks and len(set(codes)) == 1, codes
    return int(codes[0]) if codes else done.returncode, stderr


@pytest.mark.parametrize(
    ("launcher", "ranks", "fault"),
    [
        ("gloo", 3, "raise in backward"),
        ("mpi", 2, "raise on rank 1"),
        ("patient", 3, "raise on rank 1"),
        ("gloo", 2, "shut down"),
        ("patient", 2, "shut down"),
    ],
)
def test_an_exception_on_one_rank_is_the_only_error_and_the_last_line(launcher, ranks, fault, place):
    code, stderr = start(place, launcher, ranks, fault)
    assert code == 1, stderr
    assert stderr.startswith("Traceback (most recent call last):\n"), stderr
    assert stderr.count("Traceback") == stderr.count("ArithmeticError: the first cause") == 1, stderr
    assert re.search(r'File ".*mine\.py", line \d+, in fail\n', stderr), stderr
    last = stderr.splitlines()[-1]
    assert re.fullmatch(rf"mine\.py:\d+: rank 1 on {HOST} failed: ArithmeticError\('the first cause'\)", last), (
        stderr
    )
    assert "HorovodInternalError" not in stderr


@pytest.mark.parametrize("launcher", ["gloo", "patient"])
def test_an_exception_that_all_ranks_raise_is_printed_once(launcher, place):
    code, stderr = start(place, launcher, 2, "raise on all ranks")
    assert code == 1, stderr
    assert stderr.count("Traceback") == stderr.count("ArithmeticError: the first cause") == 1, stderr
    assert f"ranks 0, 1 on {HOST} failed: ArithmeticError('the first cause')\n" in stderr


def test_a_collective_that_horovod_refuses_on_all_ranks_shows_the_line_that_called_it(place):
    code, stderr = start(place, "gloo", 2, "mismatch")
    assert code == 1, stderr
    assert stderr.count("HorovodInternalError: Mismatched ALLREDUCE tensor shapes") == 1, stderr
    assert f"ranks 0, 1 on {HOST} failed: HorovodInternalError(" in stderr.splitlines()[-1]
    assert "lost the other ranks" not in stderr


@pytest.mark.parametrize(
    ("launcher", "fault", "expected_code", "expected"),
    [
        ("gloo", "refuse on rank 1", 2, rf"mine\.py:\d+: error: wrong input; right it \[rank 1 on {HOST}\]\n"),
        ("patient", "refuse on all ranks", 2, r"mine\.py:\d+: error: wrong input; right it\n"),
        ("mpi", "exit on rank 1", 3, rf"mine\.py:\d+: rank 1 on {HOST} exited with code 3 while .*\n"),
        ("patient", "exit with a text", 1, rf"mine\.py:\d+: no more samples \[rank 1 on {HOST}\]\n"),
        ("gloo", "stop", 75, ""),
        (
            "patient",
            "options",
            2,
            r"mine\.py: error: the ranks have different options of guard: stall_timeout is 60\.0 on rank 0 "
            rf"and 61\.0 on rank 1 on {HOST}; start all ranks with the same options of guard\n",
        ),
    ],
)
def test_expected_exceptions_are_one_line_with_their_exit_code(launcher, fault, expected_code, expected, place):
    code, stderr = start(place, launcher, 2, fault)
    assert re.fullmatch(expected, stderr), stderr
    assert code == expected_code or launcher == "gloo", stderr  # horovodrun itself exits with 1


def test_a_rank_that_hangs_ends_the_job_with_a_report_whose_remedy_a_script_has(place):
    code, stderr = start(place, "gloo", 2, "hang", forked=False)  # the report shows the whole stack
    assert code == 1, stderr
    assert stderr.count("no progress for 2 s") == 1
    assert f"rank 1 on {HOST} behind; rank 0 on {HOST} waiting for " in stderr
    assert "If the job was only slow, give guard a longer stall_timeout, or call beat() more often\n" in stderr
    assert "--stall-timeout" not in stderr
    assert re.search(
        rf"rank 1 on {HOST}, not waiting for Horovod, without progress since the last optimizer step:\n"
        r'  File ".*mine\.py"',
        stderr,
    ), stderr


@on_ranks(2)
def test_nothing_remains_after_the_block_and_it_can_be_used_again(cluster):
    from torch.optim.optimizer import _global_optimizer_post_hooks

    handlers = [signal.getsignal(number) for number in range(1, 32)]
    threads, hooks = set(threading.enumerate()), dict(_global_optimizer_post_hooks)
    same = guard(cluster, stall_timeout=100)
    for block in (same, guard(cluster), same):
        with block as progress:
            assert threading.active_count() > len(threads)
            progress.beat("the evaluation")
        assert set(threading.enumerate()) == threads
        assert _global_optimizer_post_hooks == hooks
        with pytest.raises(SystemExit), guard(cluster):
            sys.exit()
    assert set(threading.enumerate()) == threads
    assert [signal.getsignal(number) for number in range(1, 32)] == handlers


# One rank.


def run_alone(statement, *, inside="from hvd_adam import errors, guard"):
    code = f"from hvd_adam.distributed.context import Cluster\n{inside}\n"
    code += f"with guard(Cluster(0, 1, 0, 1, 0, 1, None, 'none')):\n    {statement}\n"
    return subprocess.run([forked_python(), "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=250)


@pytest.mark.parametrize(
    ("statement", "code", "stderr"),
    [
        ("raise errors.UserError('wrong')", 2, "<string>:4: error: wrong\n"),
        ("raise errors.JobError('lost')", 1, "<string>:4: error: lost\n"),
        ("raise errors.Preempted", 75, ""),
        ("raise KeyboardInterrupt", 130, "<string>:4: interrupted\n"),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('text')", 1, "text\n"),
        ("raise SystemExit", 0, ""),
        ("pass", 0, ""),
    ],
)
def test_one_rank_has_the_same_exit_codes(statement, code, stderr):
    done = run_alone(statement)
    assert (done.returncode, done.stderr) == (code, stderr)


def test_on_one_rank_an_exception_passes_unchanged():
    with pytest.raises(ArithmeticError, match="the cause") as raised, guard(SINGLE_RANK, stall_timeout=9):
        raise ArithmeticError("the cause")
    assert raised.value.__context__ is None
    done = run_alone("raise ArithmeticError('the cause')")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.endswith("ArithmeticError: the cause\n")


def test_an_exception_in_a_forked_child_is_the_childs_own(monkeypatch):
    block = guard(SINGLE_RANK, stall_timeout=9)
    with block:
        monkeypatch.setattr(os, "getpid", lambda: 0)
        error = UserError("in a worker")
        assert not block.__exit__(UserError, error, None)
        assert block._watchdog is not None  # it belongs to the parent
        monkeypatch.undo()


def test_closing_a_generator_in_the_block_is_not_an_error():
    def values():
        with guard(SINGLE_RANK):
            yield 1

    iterator = values()
    next(iterator)
    iterator.close()


def test_options_that_cannot_work_are_refused(monkeypatch):
    for timeout in (0, -1.0, float("nan")):
        with pytest.raises(UserError, match=r"stall_timeout is .*: use seconds above 0, or None"):
            guard(SINGLE_RANK, stall_timeout=timeout)
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    with pytest.raises(UserError, match="this launcher restarts them"):
        guard(SINGLE_RANK)


# Which error is printed.


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_the_first_error_is_printed_by_the_lowest_rank_that_has_it(clock):
    judge = Judge(4)
    assert judge.decide(3, "a", False)["ranks"] == []
    assert judge.decide(0, "b", False)["ranks"] == []
    assert judge.decide(2, "a", False)["ranks"] == []
    clock[0] += module.SAME_ERROR_SECONDS
    assert judge.decide(3, "a", False) == {"ranks": [2, 3], "reported": 3}
    assert judge.decide(1, "a", False)["ranks"] == [2, 3]  # it is printed already


def test_an_error_is_printed_at_once_when_all_ranks_have_failed(clock):
    judge = Judge(2)
    judge.decide(1, "a", False)
    assert judge.decide(0, "a", False) == {"ranks": [0, 1], "reported": 2}


def test_lost_connections_wait_for_the_error_that_caused_them(clock):
    judge = Judge(4)
    assert judge.decide(0, "lost", True)["ranks"] == []
    clock[0] += module.GRACE_SECONDS - 1
    assert judge.decide(2, "lost", True)["ranks"] == []
    assert judge.decide(3, "a", False)["ranks"] == []
    clock[0] += module.SAME_ERROR_SECONDS
    assert judge.decide(0, "lost", True)["ranks"] == [3]


def test_a_lost_connection_without_another_error_is_printed_in_the_end(clock):
    judge = Judge(3)
    judge.decide(2, "lost", True)
    judge.decide(1, "lost", True)
    clock[0] += module.GRACE_SECONDS
    assert judge.decide(2, "lost", True) == {"ranks": [1, 2], "reported": 2}


class HorovodInternalError(RuntimeError):
    """Recognized by its name: Horovod need not be installed."""


def lost(cause=None):
    """Returns Horovod's error, raised while this one was handled."""
    try:
        try:
            raise cause or RuntimeError("shut down")
        except Exception:
            raise HorovodInternalError("shut down")  # noqa: B904  as Horovod does
    except HorovodInternalError as error:
        return error


def raised_from(cause):
    try:
        raise ValueError("the training failed") from cause
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (lost(), True),
        (raised_from(lost()), True),  # a script that catches Horovod's error
        (lost(KeyError("the cause")), False),  # a collective in `finally`
        (ValueError("x"), False),
        (HorovodInternalError("x"), True),
    ],
)
def test_horovods_error_is_recognized_as_the_consequence_of_anothers(error, is_lost):
    failure = Failure.of(error)
    assert bool(failure.lost_ranks) == is_lost
    assert failure.traceback


def test_expected_errors_have_one_line():
    assert Failure.of(CollectiveError("a")) == Failure(2, "error: a")
    assert Failure.of(JobError("a")) == Failure(1, "error: a")
    assert len(Failure.of(HorovodInternalError("long " * 1000)).lost_ranks) < 500
