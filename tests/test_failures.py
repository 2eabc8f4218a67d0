"""One rank fails, on real ranks: the job ends with one message that names rank, host, cause and remedy.

Hazards: ranks that wait for ever for one that hangs, or is frozen and cannot even say so (rank 0 too); a report
that blames those who wait, or comes once a rank; a slow rank, a suspended job or the set-up taken for a stall; N
tracebacks of one mistake, or of the ranks that only lost their peer; an exit code that gets lost on the way.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from helpers.forked_python import forked_python
from helpers.on_ranks import launch, on_ranks
from helpers.training_runs import ROOT, train

from hvd_adam.distributed.context import Cluster
from hvd_adam.recovery import watchdog
from hvd_adam.recovery.stall_report import behind, report, waits_for
from hvd_adam.recovery.watchdog import Watchdog

HOST = socket.gethostname()

# A model that goes wrong in a training pass of some ranks: FAULTS are KIND:RANKS:PASS.
MODEL = """
import os, signal, time
import torch, horovod.torch as hvd

def fail(*_):
    raise ArithmeticError("the first cause")

KINDS = {
    "sleep": lambda: time.sleep(1000),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda: os._exit(7),
    "raise": fail,
}

class Model(torch.nn.Linear):
    passes = 0

    def forward(self, images):
        self.passes += self.training
        logits = super().forward(images.flatten(1))
        for fault in os.environ["FAULTS"].split():
            kind, ranks, number = fault.split(":")
            if str(hvd.rank()) in ranks and self.passes == int(number):
                logits.register_hook(fail) if kind == "backward" else KINDS[kind]()
        return logits

def build(in_channels, num_classes, image_size, dropout=0.0):
    return Model(in_channels * image_size[0] * image_size[1], num_classes)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures")
    (folder / "mine.py").write_text(MODEL)
    return folder


def start(place, launcher, ranks, faults, *argv):
    """Trains under a script of launch/; returns exit code, stderr without the launcher's prefixes, and stdout."""
    name, *controller = launcher.split()
    command = ["bash", str(ROOT / "launch" / name), *controller, "-np", str(ranks), "--", "--model", "mine:build"]
    folder = place / f"{name}{faults}".replace(":", ".")
    path = f"{place}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [*command, "--output-dir", str(folder), *argv],
        env={**os.environ, "PYTHONPATH": path, "FAULTS": faults, "HVD_ADAM_PYTHON": forked_python()},
        capture_output=True,
        text=True,
        timeout=250,
    )
    prefix = re.compile(r"^\[(1,)?\d+\]<stderr>:", re.MULTILINE)
    return done.returncode, prefix.sub("", done.stderr), done.stdout


@pytest.mark.parametrize(("launcher", "frozen", "asleep"), [("horovodrun.sh --gloo", 0, 1), ("mpirun.sh", 1, 0)])
def test_a_rank_that_hangs_and_one_that_is_frozen_end_the_job_with_one_report(launcher, frozen, asleep, place):
    faults = f"freeze:{frozen}:3 sleep:{asleep}:3"
    code, stderr, _ = start(place, launcher, 3, faults, "--stall-timeout", "3")
    assert code == 1, stderr
    assert stderr.count("no progress for") == 1
    assert (
        f"hvd_adam: error: no progress for 3 s: rank {frozen} on {HOST} not answering (frozen, dead or cut off); "
        f"rank {asleep} on {HOST} behind; rank 2 on {HOST} waiting for hvd_adam."
    ) in stderr
    assert "resumes from the last checkpoint; if the job was only slow, use a longer --stall-timeout" in stderr
    since = "without progress since update 3:\n((?:  File .*\n)+)"
    stuck = re.search(f"rank {asleep} on {HOST}, not waiting for Horovod, {since}", stderr)[1]
    assert re.search(r'mine\.py", line \d+, in forward\n', stuck)
    waits = re.search(rf"rank 2 on {HOST}, waiting for hvd_adam\.\S+, {since}", stderr)[1]
    assert re.search(r'horovod/torch/mpi_ops\.py", line \d+, in synchronize\n.*, in wait\n$', waits)


def test_a_rank_that_is_frozen_in_a_comparison_ends_it_with_one_report(place):
    environ = {"PYTHONPATH": f"{place}:{os.environ.get('PYTHONPATH', '')}", "FAULTS": "freeze:1:3"}
    argv = "--model mine:build --optimizers adam --lrs 0.01 --seeds 2 --max-steps 6 --stall-timeout 3".split()
    done = train(*argv, ranks=2, folder=place / "comparison", module="hvd_adam.compare", env=environ)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("no progress for") == 1
    assert f"no progress for 3 s: rank 1 on {HOST} not answering (frozen, dead or cut off)" in done.stderr
    assert "with --resume and the folder as --output-dir makes the runs that are missing" in done.stderr
    assert len(list((place / "comparison/cells").glob("*.json"))) == 1  # rank 0's run is kept


@pytest.mark.parametrize(
    ("launcher", "ranks", "fault", "speaker"),
    [
        ("horovodrun.sh --gloo", 3, "backward:12:3", "[12]"),  # while rank 0 waits for them
        ("horovodrun.sh --mpi", 2, "raise:01:3", "0"),
    ],
)
def test_an_exception_ends_all_ranks_and_is_printed_once(launcher, ranks, fault, speaker, place):
    code, stderr, _ = start(place, launcher, ranks, fault)
    assert code == 1, stderr
    assert stderr.count("Traceback") == stderr.count("ArithmeticError: the first cause") == 1, stderr
    assert re.search(
        rf"hvd_adam\.train: rank {speaker} on {HOST} failed: ArithmeticError\('the first cause'\)", stderr
    )
    assert "lost the other ranks" not in stderr
    assert "no progress" not in stderr


@pytest.mark.parametrize("launcher", ["horovodrun.sh --gloo", "mpirun.sh"])
def test_a_rank_that_exits_is_named_and_the_launcher_returns_its_exit_code(launcher, place):
    code, stderr, output = start(place, launcher, 2, "exit:1:3")
    assert code == 7, stderr
    if launcher == "mpirun.sh":
        box = r"The first process to do so was:\s+Process name: \[\[\d+,1\],1\]\s+Exit code: +7\b"
        assert re.search(box, stderr), stderr
    else:
        assert "Process 1 exit with status code 7.\n" in output
    for needless in ("Traceback", "lost the other ranks", "no progress"):
        assert needless not in stderr


# The watchdog without a training.

SINGLE_RANK = Cluster(0, 1, 0, 1, 0, 1, None, "none")


@on_ranks(2)
def test_a_rank_that_waits_for_a_working_rank_does_not_end_the_job(cluster):
    import torch

    from hvd_adam.distributed.context import horovod

    dog = Watchdog(cluster, 5.0)
    dog.beat("a first update")
    dog.beat("the evaluation")
    for _ in range(35 * cluster.rank):  # 7 s on rank 1, while rank 0 waits
        dog.beat("the evaluation")
        time.sleep(0.2)
    horovod().allreduce(torch.zeros(1), name="scores")
    dog.close()


@pytest.mark.slow
def test_time_in_which_the_process_was_suspended_does_not_count():
    code = (
        "import time; from hvd_adam.distributed.context import Cluster; "
        "from hvd_adam.recovery.watchdog import Watchdog; "
        "dog = Watchdog(Cluster(0, 1, 0, 1, 0, 1, None, 'none'), 5.0); dog.beat('a'); dog.beat('b'); "
        "print('ready', flush=True); time.sleep(1); dog.close()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "ready\n"
        running.send_signal(signal.SIGSTOP)
        time.sleep(6)
        running.send_signal(signal.SIGCONT)
        assert running.wait(timeout=250) == 0


@pytest.fixture
def ended(monkeypatch):
    """Set when the watchdog ends the process."""
    event = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda _: event.set())
    return event


def test_requests_without_the_token_get_no_answer_and_the_set_up_may_take_longer(ended, capsys):
    dog = Watchdog(SINGLE_RANK, 0.4)
    port = dog._peers.server.port
    for line in (b"GET / HTTP/1.0\n", b"[1]\n", b"\xff\n", b'{"token": "x", "what": "end"}\n', b"{}\n", b""):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(line)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100) == b""
    dog.beat("update 1")
    assert not ended.wait(1.5)
    assert capsys.readouterr().err == ""
    dog.beat("update 2")
    assert ended.wait(250)
    dog.close()
    assert "without progress since update 2:\n" in capsys.readouterr().err


def test_a_closed_watchdog_ends_nothing(ended):
    dog = Watchdog(SINGLE_RANK, 1.5)
    dog.beat("update 1")
    dog.beat("update 2")
    dog.close()
    assert not ended.wait(3)


def frame_in(package, source, **names):
    """The innermost frame of a call into a module of that name."""
    space = {"__name__": package, "sys": sys, **names}
    exec(source, space)
    return space


def test_a_collective_is_identified_by_its_name_or_by_the_line_that_calls_it():
    horovods = frame_in(
        "horovod.torch.mpi_ops",
        "def synchronize(handle):\n return sys._getframe()\n"
        "def allreduce(tensor, name=None):\n return synchronize(1)",
    )
    assert waits_for(horovods["allreduce"](None, "loss")) == "loss"

    class Bucket:
        def __init__(self):
            self._name = "bucket.7"

        def wait(self):
            return horovods["synchronize"](1)

    def named():
        name = "parameters.3"  # noqa: F841  what the watchdog looks for
        return horovods["synchronize"](1)

    def unnamed():
        name = 3  # noqa: F841  another value of that name
        return horovods["allreduce"](None)

    assert waits_for(Bucket().wait()) == "bucket.7"
    assert waits_for(named()) == "parameters.3"
    assert re.fullmatch(r"unnamed \(test_failures\.py:\d+\)", waits_for(unnamed()))
    # Called by Horovod (its optimizer's step), but not in it.
    assert waits_for(frame_in("mine", "frame = sys._getframe()")["frame"]) is None


def state(waits_for, beats=5):
    return {"waits_for": waits_for, "beats": beats, "doing": "update 5", "idle": 9.0, "stack": "  File x\n"}


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([state("a"), state(None), state("a")], [1]),
        ([None, state("a"), state("a")], [0]),
        ([None, state("a"), state(None)], [0, 2]),
        ([state("a", 4), state("a", 9), state("a", 9)], [0]),
        ([state("a", 9), state(None, 9), state("a", 4)], [1]),  # it had more images to evaluate
        ([state("a"), state("b"), state("a")], [1]),
        ([state("a"), state("a")], []),
    ],
)
def test_behind_returns_the_ranks_that_the_others_wait_for(states, expected):
    assert behind(dict(enumerate(states))) == expected


def test_ranks_are_grouped_by_host_and_those_in_the_same_state_share_a_stack():
    states = {0: state("a"), 1: state("a"), 2: None, 3: state("a")}
    lines = report(
        states, ["head", "head", "node1", "node1"], "no progress for 600 s", "Use a longer limit"
    ).splitlines()
    assert lines[0].startswith(
        "hvd_adam: error: no progress for 600 s: rank 2 on node1 not answering (frozen, dead or cut off); "
        "ranks 0, 1 on head, rank 3 on node1 waiting for a. Use a longer limit"
    )
    assert lines[1] == "ranks 0, 1 on head, rank 3 on node1, waiting for a, without progress since update 5:"
    assert lines[2:] == ["  File x"]


def test_horovods_stall_shutdown_is_later_than_the_watchdog_unless_the_user_has_set_it(monkeypatch):
    monkeypatch.setenv("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "")  # as it was, when the test has ended
    for seconds, longest in ((1000.0, 1000), (4.0, watchdog.SETUP_SECONDS)):
        os.environ.pop("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", None)
        watchdog.defer_horovod_stall_shutdown(seconds)
        assert int(os.environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"]) > longest + watchdog.REPORT_SECONDS
    monkeypatch.setenv("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "7")
    watchdog.defer_horovod_stall_shutdown(1000.0)
    assert os.environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] == "7"


def test_a_rank_that_stops_before_another_leaves_no_error_of_horovods_thread(tmp_path):
    script = tmp_path / "stop.py"
    script.write_text(
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"  # of horovodrun, once the first rank has ended
        "from hvd_adam import init\n"
        "from hvd_adam.errors import Preempted\n"
        "from hvd_adam.recovery.failure import Failure, leave\n"
        "rank = init().rank\n"
        "time.sleep(rank)\n"
        "print('leaves', flush=True)\n"
        "leave(Failure.of(Preempted()))\n"
    )
    done = launch([str(script)], 2, "gloo", env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.count("leaves") == 2
    assert "background loop" not in done.stderr
