"""A run that is stopped anywhere and resumed by the same command ends with the uninterrupted run's result.

Hazards: a resumed run that differs in a bit (random generators, sample order, partial epoch, accumulation, loss
scale, schedule); ranks that exit before rank 0 has written; a damaged checkpoint that is loaded; an intact one
that is not found; a checkpoint of another run that is loaded; duplicate metrics; a failed write that ends the run
or is not logged.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.cifar_files import write_cifar10
from helpers.forked_commands import ForkedCommands
from helpers.forked_python import forked_python
from helpers.training_runs import ROOT, checkpoint, events, one_line, succeeded, train

# A model that draws from all random generators, unless DROPOUT is 0, and sends a signal to its process in a
# training forward pass: STOP is SIGNAL:RANK:PASS.
MODEL = """
import os, random, signal
import numpy, torch, horovod.torch as hvd

class Model(torch.nn.Sequential):
    passes = 0

    def forward(self, images):
        name, rank, number = os.environ.get("STOP", ":-1:0").split(":")
        self.passes += self.training
        if int(rank) == hvd.rank() and self.passes == int(number):
            os.kill(os.getpid(), getattr(signal, name))
        if self.training and self[3].p:
            images = images * random.uniform(0.8, 1.2) * float(numpy.random.uniform(0.8, 1.2))
        return super().forward(images)

def build(in_channels, num_classes, image_size, dropout=0.0):
    inputs = in_channels * image_size[0] * image_size[1]
    drop = torch.nn.Dropout(float(os.environ.get("DROPOUT", "0.5")))
    layers = (torch.nn.Linear(inputs, 32), torch.nn.GELU(), drop, torch.nn.Linear(32, num_classes))
    return Model(torch.nn.Flatten(), *layers)
"""

# 200 images: 6 updates per epoch, 24 in total; a forward pass is a micro-batch.
OPTIONS = (
    "--dataset cifar10 --model mine:build --epochs 4 --accumulate 2 --log-every 4 --checkpoint-every 5".split()
)
STEPS = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that contains the data set and the model."""
    folder = tmp_path_factory.mktemp("resume")
    write_cifar10(folder / "data")
    (folder / "mine.py").write_text(MODEL)
    return folder


def start(place, name, *argv, ranks=2, stop="", dropout="0.5", **options):
    environ = {"PYTHONPATH": str(place), "DROPOUT": dropout, **({"STOP": stop} if stop else {})}
    if not ranks:
        environ = {**os.environ, **environ}
    return train(*fixed_options(place), *argv, ranks=ranks, folder=place / name, env=environ, **options)


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory):
    """A function that trains without a launcher, in a fork of a process that has imported PyTorch."""
    with ForkedCommands(tmp_path_factory.mktemp("commands")) as commands:

        def alone(name, *argv, stop=""):
            argv = [*fixed_options(place), *argv, "--output-dir", place / name]
            return commands.run("hvd_adam.train", *argv, cwd=place, **({"STOP": stop} if stop else {}))

        yield alone


def fixed_options(place):
    return [*OPTIONS, "--global-batch-size", 32, "--data-dir", place / "data"]


def same_values(one, other):
    """Returns whether nested dictionaries have the same keys, values and bits."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_values(value, other[key]) for key, value in one.items())
    return one == other


def assert_same_end(place, one, other):
    a, b = checkpoint(place / one), checkpoint(place / other)
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
    for number, state in a["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["optimizer"]["state"][number][name]), (number, name)
    for one_bucket, other_bucket in zip(*((s["residuals"] or {}).get("buckets", []) for s in (a, b)), strict=True):
        assert one_bucket["worker"].any()
        for kind in ("worker", "server"):
            assert torch.equal(one_bucket[kind], other_bucket[kind])
    one_masters, other_masters = ((state["residuals"] or {}).get("masters", {}) for state in (a, b))
    assert one_masters.keys() == other_masters.keys()
    for name, master in one_masters.items():
        assert not torch.equal(master, a["model"][name]), name
        assert torch.equal(master, other_masters[name]), name
    for one_island, other_island in zip(
        *((state["islands"] or {}).get("islands", ()) for state in (a, b)), strict=True
    ):
        assert same_values(one_island, other_island)
    for part in ("progress", "loss_scaler", "schedule"):
        assert a[part] == b[part]
    for kind in ("step", "eval"):
        lines = [
            [
                {k: v for k, v in line.items() if k not in ("time", "images_per_second")}
                for line in events(path, kind)
            ]
            for path in (place / one, place / other)
        ]
        assert lines[0] == lines[1]
    assert events(place / other)[-1]["event"] == "end"


@pytest.mark.parametrize(
    ("ranks", "controller", "options"),
    [
        (
            2,
            "mpi",
            "--strategy sharded --max-grad-norm 0.5 --precision fp16 --state-format 8bit "
            "--noise-scale 2 --noise-scale-form adam",
        ),
        (4, "gloo", "--deterministic --precision bf16 --strategy sharded --compression int4"),
        (2, "gloo", "--strategy local --local-steps 4 --outer-momentum 0.9 --compression int4 --precision fp16"),
        (4, "mpi", "--strategy local --local-steps 4 --islands 2 --compression int8 --max-grad-norm 0.5"),
    ],
)
def test_a_stopped_and_killed_run_ends_bit_for_bit_as_an_uninterrupted_one(place, ranks, controller, options):
    case = f"{ranks}-{controller}-{options.replace(' ', '')}"
    common = {"ranks": ranks, "controller": controller}
    argv = options.split()
    succeeded(start(place, f"{case}-a", *argv, **common))
    # The signal is sent in the second micro-batch of update 9, on the last rank; all ranks stop after that update.
    stopped = start(place, f"{case}-b", *argv, stop=f"SIGUSR1:{ranks - 1}:18", **common)
    assert stopped.returncode != 0
    saved = checkpoint(place / f"{case}-b")["progress"]["step"]
    assert f"stopped after {saved} updates" in stopped.stdout
    # With islands of one rank, all ranks ask each other every 4 updates only.
    last, kept = (16, 20) if "local" in options and "islands" not in options else (10, 15)
    assert 9 <= saved <= last
    # The resumed run is killed two updates after a checkpoint.
    passes = 2 * (kept + 2 - saved)
    killed = start(place, f"{case}-b", *argv, stop=f"SIGKILL:{ranks - 1}:{passes}", **common)
    assert killed.returncode != 0
    done = succeeded(start(place, f"{case}-b", *argv, **common))
    assert f"resuming after {kept} updates" in done.stdout
    assert_same_end(place, f"{case}-a", f"{case}-b")
    state = checkpoint(place / f"{case}-b")
    assert ("exp_avg_codes" in state["optimizer"]["state"][0]) == ("8bit" in options)
    assert bool(state["progress"]["noise"]) == ("noise_scale" in events(place / f"{case}-b", "step")[-1])
    assert bool(state["progress"]["noise"]) == ("noise" in options)


def test_with_other_numbers_of_ranks_it_ends_at_the_same_weights_up_to_rounding(place):
    fixed = {"dropout": "0"}  # dropout masks differ between ranks
    argv = ["--precision", "float64", "--max-grad-norm", 1]
    succeeded(start(place, "same", *argv, **fixed))
    for ranks, stop in ((2, "SIGUSR2:1:14"), (0, "SIGTERM:0:12"), (4, "")):
        done = start(place, "changing", *argv, ranks=ranks, stop=stop, **fixed)
        assert (done.returncode == 0) == (not stop), done.stderr
    assert [event["world_size"] for event in events(place / "changing", "resume")] == [1, 4]
    one, other = (checkpoint(place / name) for name in ("same", "changing"))
    # 24 updates in float64; the sums over 32 images are in another order.
    for name, weight in one["model"].items():
        assert (weight - other["model"][name]).abs().max() < 1e-9, name


def test_a_preempted_run_exits_with_75_and_its_metrics_continue_without_gaps(alone, place):
    done = alone("75", stop="SIGTERM:0:15")
    assert (done.returncode, done.stderr) == (75, "")
    assert "stopped after 8 updates" in done.stdout
    with (place / "75" / "metrics.jsonl").open("a") as lines:
        lines.write('{"event": "step", "st')  # an incomplete line, as a killed process leaves it
    done = alone("75", "--max-time", "0.001")
    assert done.returncode == 75
    assert "stopped after 9 updates" in done.stdout
    done = succeeded(alone("75", "--state-format", "8bit"))
    assert "the optimizer state was held as float32 and continues as 8bit" in done.stdout + done.stderr
    assert [event["event"] for event in events(place / "75")].count("start") == 1
    assert [event["step"] for event in events(place / "75", "resume")] == [8, 9]
    assert [event["step"] for event in events(place / "75", "step")] == list(range(4, STEPS + 1, 4))
    before = (place / "75" / "checkpoints" / "latest").read_text()
    again = succeeded(alone("75"))  # no updates are left
    assert "already finished: 24 of 24 updates" in again.stdout
    assert (place / "75" / "checkpoints" / "latest").read_text() == before
    assert len(events(place / "75", "eval")) == 4


def test_ctrl_c_saves_a_checkpoint_with_one_message_and_exits_with_130(alone, place):
    done = alone("130", stop="SIGINT:0:15")
    assert (done.returncode, done.stderr) == (130, "")
    assert done.stdout.count("stopped after") == done.stdout.count("stopped after 8 updates") == 1
    assert checkpoint(place / "130")["progress"]["step"] == 8
    succeeded(alone("130"))
    assert [event["step"] for event in events(place / "130", "resume")] == [8]


def test_a_closed_terminal_saves_a_checkpoint_unless_the_job_ignores_it(place):
    done = start(place, "hangup", ranks=0, stop="SIGHUP:0:15", forked=False)
    assert (done.returncode, done.stderr) == (75, "")
    assert checkpoint(place / "hangup")["progress"]["step"] == 8
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup; processes inherit it
    try:
        succeeded(start(place, "nohup", ranks=0, stop="SIGHUP:0:15", forked=False))
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert events(place / "nohup")[-1]["step"] == STEPS


def test_a_run_that_a_shorter_length_ends_is_evaluated_where_it_stopped(alone, place):
    """Its last checkpoint is of an epoch that --eval-every has left out."""
    options = ["--eval-every", 3, "--checkpoint-every", 6, "--keep", 9, "--lr-decay", "constant"]
    succeeded(alone("shorter", *options))
    for step in (18, 24):  # as if it had been killed before them
        shutil.rmtree(place / "shorter" / "checkpoints" / f"step-{step:08}")
    for _ in range(2):
        done = succeeded(alone("shorter", *options, "--epochs", 2))
        assert [event["step"] for event in events(place / "shorter", "eval")] == [12]
        assert "test accuracy" in done.stdout
    assert "already finished: 12 of 12 updates" in done.stdout


@pytest.mark.parametrize("decay", ["constant", "step --lr-decay-epochs 1,2"])  # independent of the run's length
def test_a_run_ended_by_max_steps_resumes_within_the_epoch_with_a_larger_max_steps(alone, place, decay):
    argv, name = ["--lr-decay", *decay.split()], decay[:4]
    succeeded(alone(f"long-{name}", *argv))
    for steps in (3, 9):
        succeeded(alone(f"longer-{name}", *argv, "--max-steps", steps))
    assert "--lr-decay" not in succeeded(alone(f"longer-{name}", *argv)).stdout
    one, other = (checkpoint(place / f"{length}-{name}")["model"] for length in ("long", "longer"))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_a_resume_with_another_length_says_that_the_decay_is_stretched(alone, place):
    lengths = (["--max-steps", 3], ["--max-steps", 3], ["--epochs", 2], ["--max-steps", 6])
    said = [
        line
        for length in lengths
        for line in succeeded(alone("stretched", *length)).stdout.splitlines()
        if "--lr-decay" in line
    ]
    assert said == [
        "the run has 12 updates, and had 3: --lr-decay cosine now ends after 12, so the result is not that of a "
        "run of 12 updates from the start"
    ]


def test_a_run_killed_before_its_first_checkpoint_restarts_from_the_beginning(alone, place):
    assert alone("young", stop="SIGKILL:0:5").returncode == -signal.SIGKILL
    succeeded(alone("young"))
    assert [event["event"] for event in events(place / "young")].count("start") == 1
    assert events(place / "young")[-1]["event"] == "end"


def test_a_run_started_from_a_checkpoint_resumes_from_its_own_checkpoints(alone, place):
    source = place / "source"
    assert alone("source", stop="SIGTERM:0:9").returncode == 75
    argv = ["--resume", source]
    # A run killed before its first own checkpoint starts from the given one again.
    assert alone("branch", *argv, stop="SIGKILL:0:2").returncode == -signal.SIGKILL
    assert alone("branch", *argv, stop="SIGTERM:0:5").returncode == 75
    source.rename(place / "moved")
    succeeded(alone("branch", *argv))
    paths = [event["path"] for event in events(place / "branch", "resume")]
    assert paths == [str(source)] * 2 + [str(place / "branch" / "checkpoints" / "step-00000008")]
    assert events(place / "branch", "start") == []
    assert events(place / "branch")[-1]["event"] == "end"
    missing = alone("new", *argv)
    assert f"no checkpoint in {source}" in one_line(missing)
    assert not (place / "new").exists()


def test_a_run_killed_before_its_first_checkpoint_loads_the_weights_of_another_run_again(alone, place):
    succeeded(alone("trained", "--max-steps", 1))
    argv = ["--init-from", place / "trained"]
    assert alone("warm", *argv, stop="SIGKILL:0:2").returncode == -signal.SIGKILL
    assert [event["event"] for event in events(place / "warm")] == ["start"]
    again = alone("warm", *argv, stop="SIGTERM:0:5")
    assert again.returncode == 75 and "weights: 4 of 4 tensors from" in again.stdout, again.stdout + again.stderr
    # From then on its own checkpoints are loaded: those weights, which may be gone, are not read.
    (place / "trained").rename(place / "removed")
    assert "weights:" not in succeeded(alone("warm", *argv)).stdout
    assert "no checkpoint in" in one_line(alone("new", *argv)) and not (place / "new").exists()


def test_a_run_folder_to_start_from_stands_for_its_checkpoint_of_the_first_start(alone, place):
    assert alone("moving", "--keep", 99, stop="SIGTERM:0:9").returncode == 75
    argv = ["--resume", place / "moving"]
    assert alone("pinned", *argv, stop="SIGKILL:0:2").returncode == -signal.SIGKILL
    succeeded(alone("moving", "--keep", 99))
    assert alone("pinned", *argv, stop="SIGTERM:0:5").returncode == 75
    first, second = events(place / "pinned", "resume")
    assert first["step"] == second["step"] < STEPS and first["checkpoint"] == second["checkpoint"]


NEW_PROCESSES = (("mpirun.sh", signal.SIGTERM), ("horovodrun.sh --gloo", signal.SIGUSR1))


@pytest.mark.parametrize(
    ("script", "number", "code"),
    [
        ("mpirun.sh", signal.SIGTERM, 75),
        ("mpirun.sh", signal.SIGINT, 130),
        ("mpirun.sh", signal.SIGHUP, 75),
        ("horovodrun.sh --mpi", signal.SIGTERM, 75),
        ("horovodrun.sh --mpi", signal.SIGINT, 130),
        ("horovodrun.sh --gloo", signal.SIGUSR1, 75),  # turned into SIGTERM; for mpirun, see test_launch.py
        ("horovodrun.sh --gloo", signal.SIGINT, 130),
        ("horovodrun.sh --gloo", signal.SIGHUP, 75),
        ("elastic.sh -i lo --discovery 'echo localhost:2'", signal.SIGINT, 130),
    ],
)
def test_a_signal_to_the_launcher_reaches_the_ranks_which_save(script, number, code, place):
    folder = place / f"{script} {number}"
    name, *options = shlex.split(script)
    command = ["bash", str(ROOT / "launch" / name), *options, "-np", "2", "--", "--epochs", "500"]
    command += ["--output-dir", str(folder)]
    new_processes = (script, number) in NEW_PROCESSES  # the others are forks
    environ = {**os.environ, "HVD_ADAM_PYTHON": sys.executable if new_processes else forked_python()}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, env=environ, **streams) as running:
        while "step 10/" not in running.stdout.readline():
            assert running.poll() is None
        # A terminal sends Ctrl-C to the whole process group.
        (os.killpg if number == signal.SIGINT else os.kill)(running.pid, number)
        output, errors = running.communicate(timeout=250)
    errors = re.sub(r"^ERROR:root:failure count .*\n", "", errors)  # of Horovod's elastic driver
    assert (running.returncode, errors) == (code, ""), output
    assert checkpoint(folder)["progress"]["step"] >= 10
    assert output.count("the same command resumes the run") == 1


@pytest.mark.parametrize(
    ("before", "code"), [("pass", 128 + signal.SIGTERM), ("preemption.exit_on_second_signal(75)", 75)]
)
def test_a_second_signal_ends_the_process_at_once(before, code):
    program = (
        "import os, signal, time; from hvd_adam.recovery import preemption; "
        "from hvd_adam.distributed.context import Cluster; "
        f"{before}; one = Cluster(0, 1, 0, 1, 0, 1, None, 'none'); stop = preemption.Preemption(one, None); "
        "assert not stop.should_stop(); os.kill(os.getpid(), signal.SIGUSR1); "
        "os.kill(os.getpid(), signal.SIGTERM); "
        "assert stop.should_stop(); print('ready', flush=True); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "ready\n"
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):  # the first two only repeat the request
            time.sleep(0.5)
            assert running.poll() is None
            running.send_signal(number)
        assert running.wait(timeout=250) == code


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "0.01"], "--lr is 0.01, but 0.001 in checkpoint"),
        (["--precision", "bf16"], "--precision is 'bf16', but 'fp32' in checkpoint"),
        (["--model", "mlp"], "--model is 'mlp', but 'mine:build' in checkpoint"),
        (["--global-batch-size", "64"], "an update has 64 images, but 32 in checkpoint"),
        (["--resume", "never"], "holds a run already"),
        (["--resume", "data"], "holds a run that did not start from data"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_first_difference(alone, argv, message, place):
    folder = place / "refusing"
    if not folder.exists():
        assert alone("refusing", stop="SIGTERM:0:3").returncode == 75
    before = contents(folder)
    assert message in one_line(alone("refusing", *argv))
    assert contents(folder) == before


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in files}


def test_a_damaged_checkpoint_is_logged_and_the_previous_one_is_loaded(alone, place):
    assert alone("damaged", stop="SIGTERM:0:27").returncode == 75
    newest = sorted((place / "damaged" / "checkpoints").glob("step-*"))[-1]
    assert newest.name == "step-00000014"
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:-1])
    (newest.parent / "latest").write_text("../../elsewhere\n")
    (newest.parent / "best").write_bytes(b"\xff\0")
    done = succeeded(alone("damaged"))
    assert f"warning: checkpoint {newest} is damaged: state.pt does not match its checksum" in done.stderr
    assert "resuming after 12 updates" in done.stdout or "resuming after 10 updates" in done.stdout
    for part in (place / "damaged" / "checkpoints").glob("step-*/manifest.json"):
        part.write_bytes(part.read_bytes().replace(b"step", b"stEp", 1))
    line = one_line(alone("damaged", "--epochs", 5))
    assert f"{place / 'damaged'} has no intact checkpoint: checkpoint" in line
    assert "manifest.json does not match its checksum" in line


# From the end of the first epoch to the end of the third, files cannot grow past the limit.
FULL_DISK = """
import resource, signal
import torch

class Filling(torch.nn.Sequential):
    passes = 0

    def forward(self, images):
        self.passes += self.training
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        full = 8 <= self.passes < 15
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if full else -1, -1))
        return super().forward(images)

def build(in_channels, num_classes, image_size, dropout=0.0):
    inputs = in_channels * image_size[0] * image_size[1]
    return Filling(torch.nn.Flatten(), torch.nn.Linear(inputs, num_classes))
"""


def test_a_temporarily_full_disk_loses_only_the_checkpoints_of_that_time(alone, place):
    (place / "filling.py").write_text(FULL_DISK)
    argv = ["--model", "filling:build", "--accumulate", 1, "--checkpoint-every", 3, "--keep", 9]
    done = succeeded(alone("full", *argv))
    failed = [event["reason"] for event in events(place / "full", "checkpoint_failed")]
    assert failed
    assert all("cannot write the checkpoint" in reason for reason in failed)
    assert done.stderr.count("warning: cannot write the checkpoint") == len(failed)
    assert done.stderr.count("; training continues") == len(done.stderr.splitlines())
    names = {path.name for path in (place / "full" / "checkpoints").glob("step-*")}
    assert {"step-00000003", "step-00000018", "step-00000024"} <= names
    assert "step-00000009" not in names  # its write ends before update 12; later writes may be delayed
