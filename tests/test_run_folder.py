"""Two jobs with one run folder: the second waits for the first, or is refused.

Hazards: two jobs that write the same checkpoints; a lock that outlives its process, or is lost while the process
runs (another descriptor closed, a process forked); a job that waits forever, or without a message, or cannot be
stopped; a file system without locks.
"""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest
from helpers.training_runs import checkpoint, events, one_line, train

from hvd_adam.config import TrainConfig
from hvd_adam.training import run_dir

# With STOP, stops its process in the fifth training forward pass. WAIT sets the seconds to wait for another job.
MODEL = """
import os, signal
import torch
from hvd_adam.training import run_dir

run_dir.WAIT_SECONDS = float(os.environ.get("WAIT", "60"))

class Model(torch.nn.Linear):
    passes = 0

    def forward(self, images):
        self.passes += self.training
        if self.passes == 5 and "STOP" in os.environ:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().forward(images.flatten(1))

def build(in_channels, num_classes, image_size):
    return Model(in_channels * image_size[0] * image_size[1], num_classes)
"""
OPTIONS = "--model mine:build --max-steps 6 --checkpoint-every 2 --log-every 1".split()


@contextmanager
def running(command, **options):
    """Yields a process with readable stdout, and kills it at the end of the block."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_second_job_waits_for_the_first_and_resumes_or_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text(MODEL)
    folder = tmp_path / "run"
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "hvd_adam.train", *OPTIONS, "--output-dir", str(folder)]
    with running(command, env={**environ, "STOP": "1"}) as first:
        os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WNOWAIT)  # by now the checkpoint of update 2 is written
        before = (folder / "metrics.jsonl").read_bytes()

        refused = train(*OPTIONS, folder=folder, env={**environ, "WAIT": "0.5"})
        owner = f"process {first.pid} on {socket.gethostname()}"
        line = one_line(refused)
        assert f"another job writes to {folder}: {owner}; end it, or choose another --output-dir" in line
        assert (folder / "metrics.jsonl").read_bytes() == before

        with running(command, env=environ) as second:
            waiting = f"waiting up to 60 s for the job that holds the lock of {folder}: {owner}\n"
            assert second.stdout.readline() == waiting
            first.kill()
            output = second.communicate(timeout=250)[0]
        assert second.returncode == 0, output
    assert "resuming after 2 updates" in output or "resuming after 4 updates" in output
    assert [event["step"] for event in events(folder, "step")] == [1, 2, 3, 4, 5, 6]
    assert checkpoint(folder)["progress"]["step"] == 6


LOCK = """
import os, sys, time
from pathlib import Path
from hvd_adam import log
from hvd_adam.distributed.context import Cluster
from hvd_adam.errors import Preempted
from hvd_adam.recovery import preemption
from hvd_adam.training import run_dir

log.setup()
folder, run_dir.WAIT_SECONDS = Path(sys.argv[1]), float(sys.argv[2])
preemption.Preemption(Cluster(0, 1, 0, 1, 0, 1, None, "none"), None)
try:
    run_dir.lock(folder)
except Preempted:
    sys.exit(75)
print("locked", flush=True)
"""
STAY = "time.sleep(99)"
# Forks a process that outlives it, and locks the folder again through a symbolic link.
FORK_AND_LOCK_AGAIN = f"""
if os.fork() == 0:
    os.close(1), time.sleep(8), os._exit(0)
run_dir.lock(folder.parent / "link")
print("locked again", flush=True)
{STAY}
"""


def locking(folder, then="", seconds=0.2):
    """A process that waits up to `seconds` for the lock, prints "locked" and runs the code `then`."""
    return running([sys.executable, "-c", LOCK + then, str(folder), str(seconds)])


def can_lock(folder):
    """Returns whether another process can lock the folder."""
    with locking(folder) as process:
        output = process.communicate(timeout=250)[0]
    assert output == "locked\n" if process.returncode == 0 else output.startswith("waiting up to 0.2 s")
    return process.returncode == 0


def test_a_lock_lasts_exactly_as_long_as_its_process(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "link").symlink_to("run")
    with locking(folder, FORK_AND_LOCK_AGAIN) as process:
        assert [process.stdout.readline() for _ in range(2)] == ["locked\n", "locked again\n"]
        assert not can_lock(folder)
    assert can_lock(folder)


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_dir.time, "strftime", lambda form: "20260101-120000")
    opened = [run_dir.open_run(TrainConfig(), 1, None, {})[0] for _ in range(3)]
    assert [folder.name for folder in opened] == [f"20260101-120000-digits-cnn{n}" for n in ("", "-2", "-3")]
    assert all((folder / "config.yaml").exists() for folder in opened)


@pytest.mark.parametrize("line", ['{"loss": 1}', "[1]", '{"event": "st'])
def test_metrics_of_another_program_name_no_checkpoint_to_start_from(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n")
    assert run_dir.starting_checkpoint(tmp_path) is None


def test_a_waiting_job_can_be_stopped(tmp_path):
    with locking(tmp_path, STAY) as first:
        assert first.stdout.readline() == "locked\n"
        with locking(tmp_path, seconds=999) as second:
            assert second.stdout.readline().startswith("waiting up to 999 s")
            second.send_signal(signal.SIGTERM)
            assert second.wait(timeout=250) == 75


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_gives_a_warning(number, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            run_dir.lock(tmp_path)
    else:
        run_dir.lock(tmp_path)
        assert "does not support locks: let no other job write to the folder" in caplog.text
