"""The benchmarks: they report what was measured, of every variant, and leave no process or file behind.

Hazards: a ratio that is not the quotient of the medians in its table; a variant that is missing without a message;
a variant that dies or hangs and ends the other variants or the benchmark; groups that compute during the turn of
another; stopped processes that outlive the benchmark; slow imports before the arguments have been checked.
"""

import json
import math
import os
import signal
import subprocess
import sys
import uuid

import pytest
import torch
from helpers.forked_python import forked_python

from hvd_adam.bench import (
    adam,
    allreduce,
    checkpoint,
    launchers,
    memory,
    memory_worker,
    optimizers,
    report,
    step,
    step_worker,
    workloads,
)
from hvd_adam.bench.__main__ import COMMANDS, measure
from hvd_adam.bench.config import AdamConfig, AllreduceConfig, CheckpointConfig, MemoryConfig, StepConfig
from hvd_adam.bench.interleave import Outcome, Plan, take_turns
from hvd_adam.bench.processes import marked
from hvd_adam.bench.report import Column, table
from hvd_adam.bench.stats import add_ratio, bus_bytes, quartiles, ratio, slowest, timing
from hvd_adam.bench.timer import WARM_UP_CALLS, mean_seconds, time_calls
from hvd_adam.cli import parse
from hvd_adam.distributed.api import STRATEGIES
from hvd_adam.distributed.launch_env import LaunchInfo
from hvd_adam.errors import UserError
from hvd_adam.optim.adam import Adam

OURS = [f"hvd_adam-{strategy}" for strategy in STRATEGIES]


# With a Python that has imported PyTorch, next to a horovodrun, also for the ranks.
FORKED = "import runpy, sys; sys.executable = {!r}; runpy.run_module('hvd_adam.bench', run_name='__main__')"


def bench(*argv, forked=False, **environ):
    start = ["-m", "hvd_adam.bench"]
    if forked:
        start = ["-c", FORKED.format(forked_python())]
    command = [forked_python() if forked else sys.executable, *start, *map(str, argv)]
    environ = {**os.environ, **environ}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environ, check=False)


def bench_json(*argv, forked=False):
    done = bench(*argv, "--json", forked=forked)
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)  # stdout has nothing else
    assert output["command"] == argv[0]
    assert output["machine"]["torch"] == torch.__version__
    assert [row["error"] for row in output["rows"] if "error" in row] == []
    return output


# Statistics.


def test_quartiles_are_interpolated_and_one_value_is_its_own_quartile():
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_timing_is_in_milliseconds():
    expected = {"median_ms": 2000, "low_ms": 1500, "high_ms": 2500, "samples": 3}
    assert timing([1.0, 3.0, 2.0]) == pytest.approx(expected)


def test_the_time_of_a_step_is_that_of_its_slowest_rank():
    assert slowest([[1.0, 5.0], [3.0, 2.0]]) == [3.0, 5.0]
    with pytest.raises(ValueError, match="shorter"):
        slowest([[1.0, 5.0], [3.0]])


def test_a_ratio_is_over_the_peers_median_and_missing_if_either_value_is():
    rows = [{"median_ms": 6.0}, {"error": "died"}]
    add_ratio(rows, "to_peer", {"median_ms": 4.0})
    assert [row["to_peer"] for row in rows] == [1.5, None]
    add_ratio(rows, "to_peer", None)
    assert [row["to_peer"] for row in rows] == [None, None]
    assert ratio(1.0, 0.0) is None


def test_a_ring_sends_nearly_twice_the_message():
    assert [bus_bytes(ranks, 100) for ranks in (1, 2, 4)] == [0, 100, 150]


def test_allreduce_rows_have_bandwidth_and_bound():
    times = {"copy": 0.001, "horovod": 0.004, "mpi": 0.002}
    outcomes = {name: Outcome({"1000": [seconds]}) for name, seconds in times.items()}
    outcomes["hvd_adam step"] = Outcome({"1000": [0.003], "1000 backward": [0.005]})
    outcomes["torch"] = Outcome(error="torch died")
    rows = {row["variant"]: row for row in allreduce.summarize(1000, outcomes, ranks=4)}
    assert list(rows) == ["copy", "horovod", "mpi", "hvd_adam step", "hvd_adam step with backward", "torch"]
    assert rows["copy"]["bus_gb_per_s"] == pytest.approx(4000 / 0.001 / 1e9)
    assert rows["mpi"]["bus_gb_per_s"] == pytest.approx(1.5 * 4000 / 0.002 / 1e9)
    assert rows["mpi"]["bound_ms"] == pytest.approx(1.5)
    assert rows["horovod"]["to_bound"] == pytest.approx(4 / 1.5)
    assert rows["hvd_adam step"]["to_horovod"] == pytest.approx(0.75)
    assert rows["hvd_adam step with backward"]["to_mpi"] == pytest.approx(2.5)
    assert rows["torch"]["error"] == "torch died"


def test_the_predicted_state_is_divided_by_sharding():
    assert memory.predicted("allreduce", 4)["state"] == 8
    assert memory.predicted("sharded", 4)["state"] == 2
    assert memory.predicted("sharded", 2, "8bit")["state"] == 2.125 / 2
    assert memory.predicted("allreduce-released", 4) == {"parameters": 4, "gradients": 0, "state": 8}
    assert memory.predicted("another", 4) is None


def test_memory_counts_a_shared_buffer_once_and_completely():
    buffer = torch.zeros(10)
    model = torch.nn.Linear(2, 2)
    model.weight.data, model.bias.data = buffer[:4].view(2, 2), buffer[4:6]
    optimizer = Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    held = memory_worker.held_bytes(model, optimizer)
    assert (held["parameters"], held["gradients"]) == (40, 24)
    assert held["state"] >= 2 * 24
    assert held["total"] <= held["parameters"] + held["gradients"] + held["state"]


def test_the_table_has_columns_of_fixed_width():
    columns = (Column("name", "name"), Column("ms", "ms", ".1f"))
    lines = table(columns, [{"name": "a", "ms": 12.34}, {"name": "long"}]).splitlines()
    assert lines == ["name    ms", "----  ----", "a     12.3", "long     -"]


# Arguments.


@pytest.mark.parametrize(
    ("config", "argv", "message"),
    [
        (AdamConfig, "--threads 0", "--threads is 0: it must be numbers from 1 to the"),
        (AdamConfig, "--threads x", "--threads is x: it must be numbers from 1 to the"),
        (AdamConfig, "--parameters 0", "--parameters is 0: it must be at least 1"),
        (AdamConfig, "--tensors 3", "--tensors needs --parameters"),
        (AdamConfig, "--parameters 2 --tensors 3", "--tensors is 3: it must be from 1 to --parameters"),
        (AdamConfig, "--parameters 2 --workloads 1M", "--parameters and --workloads exclude each other"),
        (
            AdamConfig,
            "--workloads 1M,vgg",
            "--workloads is 1M,vgg: it must be numbers of parameters, as in 16M,1G",
        ),
        (AdamConfig, "--workloads 0", "--workloads is 0: it must be numbers of parameters"),
        pytest.param(AdamConfig, f"--workloads {'1' * 5000}", "--workloads is 111", id="5000 digits"),
        (AdamConfig, "--workloads ,", "--workloads is ,: it must be numbers of parameters"),
        (AdamConfig, "--dtype float32-master", "--dtype is float32-master: it must be one of float32"),
        (AdamConfig, "--repeats 0", "--repeats is 0: it must be at least 1"),
        (AdamConfig, "--dtype int8", "--dtype is int8: it must be one of float32"),
        (AdamConfig, "--plot x.pdf", "--plot is x.pdf: it must be a file name that ends in .png"),
        (AdamConfig, "--plot nowhere/x.png", "--plot nowhere/x.png: there is no folder nowhere"),
        (StepConfig, "--np 0", "--np is 0: it must be at least 1"),
        (StepConfig, "--models ,", "--models is ',': it must be names of models"),
        (StepConfig, "--variants horovd", "--variants is horovd: it must be some of hvd_adam-STRATEGY, horovod"),
        (StepConfig, "--variants ,", "--variants is ',': it must be"),
        (
            StepConfig,
            "--variants compute,plain",
            "--variants plain trains one rank without distribution: use --np 1",
        ),
        (StepConfig, "--precision fp16", "--precision is fp16: it must be one of fp32, bf16"),
        (StepConfig, "--launcher slurm", "--launcher is slurm: it must be one of mpi, gloo"),
        (StepConfig, "--timeout 0", "--timeout is 0.0: it must be above 0"),
        (AllreduceConfig, "--np 1", "--np is 1: it must be at least 2"),
        (AllreduceConfig, "--sizes 1,-1", "--sizes is 1,-1: it must be sizes in MB"),
        (AllreduceConfig, "--sizes inf", "--sizes is inf: it must be sizes in MB"),
        (CheckpointConfig, "--steps 19", "--steps is 19: it must be at least twice --every"),
        (CheckpointConfig, "--every 0", "--every is 0: it must be at least 1"),
        (CheckpointConfig, "--folder nowhere", "--folder is nowhere: it must be a directory that exists"),
        (MemoryConfig, "--np 1,two", "--np is 1,two: it must be numbers of ranks"),
    ],
)
def test_bad_arguments_are_reported_in_one_line(config, argv, message):
    with pytest.raises(UserError, match=message) as error:
        parse(config, "hvd_adam.bench", argv.split())
    assert "\n" not in str(error.value)


def test_a_plot_replaces_a_file_only_with_force_and_never_one_of_a_run(tmp_path):
    plot = tmp_path / "curves.png"
    plot.write_text("curves")
    with pytest.raises(UserError, match="exists: choose another name, or replace it with --force"):
        AdamConfig(plot=str(plot))
    AdamConfig(plot=str(plot), force=True)
    (tmp_path / "metrics.jsonl").write_text("{}")
    with pytest.raises(UserError, match="is a file of the run itself"):
        AdamConfig(plot=str(plot), force=True)


def test_a_result_is_printed_also_if_its_plot_cannot_be_written(tmp_path, capsys):
    config = AdamConfig(plot=str(tmp_path / "a.png"))
    (tmp_path / "a.png").mkdir()  # during the benchmark
    result = report.Result([{"name": "one"}], [report.Column("name", "name")], ["a note"], lambda figure: None)
    with pytest.raises(UserError, match=f"--plot {config.plot} cannot be written"):
        report.show("adam", config, {"gpu": None, "cpu": "a CPU"}, result)
    shown = capsys.readouterr().out
    assert "one" in shown and "a note" in shown and "plot" not in shown
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_lists_in_arguments_are_parsed():
    assert parse(AdamConfig, "bench", ["--threads", "1"]).thread_counts() == (1,)
    assert AdamConfig(parameters=10, tensors=4).tensor_sizes() == (3, 3, 2, 2)
    assert AllreduceConfig(sizes="40,0.004").elements() == (1000, 10_000_000)
    assert MemoryConfig(np="1,2").rank_counts() == (1, 2)
    assert StepConfig(variants="compute, ddp-zero").variant_names(("x",)) == ("compute", "ddp-zero")
    assert StepConfig().variant_names(("x",))[:2] == ("hvd_adam-x", "horovod")
    assert StepConfig(variants="hvd_adam-x-deferred").variant_names(("x",)) == ("hvd_adam-x-deferred",)
    assert StepConfig(variants="hvd_adam-x-int4").variant_names(("x",)) == ("hvd_adam-x-int4",)
    assert {*StepConfig(np=1).variant_names(())} - {*StepConfig(np=2).variant_names(())} == {"plain"}
    with pytest.raises(UserError, match="--variants is hvd_adam-y: it must be some of hvd_adam-x, horovod"):
        StepConfig(variants="hvd_adam-y").variant_names(("x",))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], f"hvd_adam.bench: error: no benchmark given: use one of {', '.join(COMMANDS)}"),
        (["all"], f"hvd_adam.bench: error: 'all' is not a benchmark: use one of {', '.join(COMMANDS)}"),
    ],
)
def test_a_missing_or_unknown_benchmark_is_reported_in_one_line_with_exit_code_2(argv, message):
    done = bench(*argv)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message + "\n")


def test_a_start_by_a_launcher_is_refused_in_one_line():
    done = bench("adam", "--json", HOROVOD_RANK="0", HOROVOD_SIZE="2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "hvd_adam.bench adam: error: started by horovodrun: start it without a launcher, it starts the ranks "
        "itself\n"
    )


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--help"], 0, "memory     Measures bytes per parameter"),
        (["step", "--help"], 0, "--batch-size"),
        (["adam", "--threads", "999"], 2, ""),
        (["allreduce", "--foo"], 2, ""),
    ],
)
def test_torch_is_not_imported_for_help_or_a_bad_argument(argv, code, text):
    script = (
        "import atexit, os, runpy, sys; os._exit = sys.exit; heavy = {'torch', 'horovod', 'numpy'}; "
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules)))); "
        f"sys.argv = ['bench', *{argv!r}]; runpy.run_module('hvd_adam.bench', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == code
    assert "heavy: []" in done.stdout
    assert text in done.stdout
    assert done.stderr.count("\n") == (code != 0)


def test_help_lists_every_benchmark():
    done = bench("--help")
    assert done.returncode == 0
    assert all(f"  {command} " in done.stdout for command in COMMANDS)


# Turns.

# Two ranks without torch. The first stands for the launcher of real ranks.
RANKS = """
import os, sys, time
from pathlib import Path
from hvd_adam.bench.interleave import serve

kind, folder = sys.argv[1], Path(sys.argv[2])
rank = 0 if os.fork() else 1
if rank:
    os.setsid()  # like the ranks of a real launcher, not reached by a signal to its process group
turns = 0


def is_awake(process):
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "TZ"  # stopped or ended


def measure():
    global turns
    turns += 1
    if kind == "late" and turns == 3 and rank == 0:
        sys.exit("turn failed")
    others = [file.read_text() for file in folder.parent.glob("*/pid.*") if file.parent != folder]
    return {"awake": [float(sum(map(is_awake, others)))], "rank": [rank, turns]}


def prepare():
    if kind == "early":
        sys.exit("start failed") if rank == 0 else time.sleep(1000)
    if kind == "hanging":
        time.sleep(1000)
    return measure


serve(folder, rank, prepare)
"""


def plans(*kinds):
    return [Plan(kind, {}, (sys.executable, "-c", RANKS, kind)) for kind in kinds]


@pytest.fixture
def mark(monkeypatch):
    """An environment variable, "NAME=value", that every process started by this test has."""
    forked_python()  # starts its server, which has this environment
    name, value = "HVD_ADAM_TEST", uuid.uuid4().hex
    monkeypatch.setenv(name, value)
    return f"{name}={value}"


def test_groups_take_turns_while_all_other_groups_are_stopped(mark):
    outcomes = take_turns(plans("a", "b", "c"), ranks=2, rounds=2, timeout=250, log=print)
    assert {name: outcome.error for name, outcome in outcomes.items()} == dict.fromkeys("abc")
    for outcome in outcomes.values():
        assert outcome.times["awake"] == [0.0, 0.0]
        assert outcome.times["rank"] == [1, 2, 1, 3]  # of the slowest rank; the first turn was the warm-up
    assert marked(mark) == []


def test_a_variant_that_dies_or_hangs_is_reported_and_the_others_continue(mark):
    kinds = ("early", "good", "late", "hanging")
    outcomes = take_turns(plans(*kinds), ranks=2, rounds=3, timeout=15, log=print)
    assert outcomes["early"].error == "early ended with code 1:\n    start failed"
    assert outcomes["late"].error == "late ended with code 1:\n    turn failed"
    assert outcomes["hanging"].error == "hanging did not answer within 15 seconds:\n    (no output)"
    assert outcomes["good"].error is None
    assert len(outcomes["good"].times["awake"]) == 3
    assert marked(mark) == []


def test_a_command_that_does_not_exist_is_reported():
    outcomes = take_turns([Plan("none", {}, ("/no/such",))], ranks=1, rounds=1, timeout=5, log=print)
    assert "none cannot be started: " in outcomes["none"].error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_benchmark_leaves_no_process_behind(number, mark):
    script = (
        "import functools, sys; from hvd_adam.bench.interleave import Plan, take_turns; ranks = sys.argv[1]; "
        "plans = [Plan(kind, {}, (sys.executable, '-c', ranks, kind)) for kind in ('good', 'hanging')]; "
        "take_turns(plans, ranks=2, rounds=1, timeout=250, log=functools.partial(print, flush=True))"
    )
    command = [sys.executable, "-c", script, RANKS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        while running.stdout.readline() != "starting hanging\n":
            assert running.poll() is None, running.stderr.read()
        running.send_signal(number)
        assert "KeyboardInterrupt" in running.communicate(timeout=250)[1]
    assert marked(mark) == []


def test_a_failed_variant_has_a_row_without_ratios():
    outcomes = {"ddp-fused": Outcome({"step": [0.5]}), "compute": Outcome(error="compute died")}
    outcomes["plain"] = Outcome({"step": [0.4]})
    rows = step.summarize("cnn", outcomes, images=64)
    assert rows[0]["images_per_s"] == pytest.approx(128)
    assert (rows[0]["to_ddp_fused"], rows[0]["to_compute"], rows[0]["to_horovod"]) == (1.0, None, None)
    assert rows[0]["to_plain"] == pytest.approx(1.25)
    assert rows[1]["error"] == "compute died"
    assert table(step.COLUMNS, rows).splitlines()[3].split() == ["cnn", "compute", *"-" * 8]


def test_the_benchmark_fails_if_every_variant_fails(mark):
    argv = ("--variants", "compute", "--models", "cnn", "--launcher", "gloo", "--timeout", "0.01")
    done = bench("step", *argv)
    assert done.returncode == 1
    assert "failed: compute did not answer within 0.01 seconds:" in done.stdout
    assert marked(mark) == []


# Real runs, as small as possible.


@pytest.mark.slow
def test_adam_times_every_optimizer_and_a_copy(tmp_path):
    plot = tmp_path / "adam.png"
    argv = ("--parameters", 5000, "--tensors", 3, "--threads", "1", "--repeats", 3, "--device", "cpu")
    output = bench_json("adam", *argv, "--plot", plot)
    rows = {row["name"]: row for row in output["rows"]}
    assert {
        "hvd_adam foreach",
        "hvd_adam reference",
        "torch for-loop",
        "torch foreach",
        "copy",
        "in place",
    } <= set(rows)
    for row in rows.values():
        assert row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["samples"] == 3
        assert row["gb_per_s"] == pytest.approx(28 * 5000 / row["median_ms"] / 1e6)
        assert row["to_torch_foreach"] == pytest.approx(row["median_ms"] / rows["torch foreach"]["median_ms"])
        assert row["to_copy"] == pytest.approx(row["gb_per_s"] / rows["copy"]["gb_per_s"])
        assert (row["workload"], row["dtype"], row["parameters"], row["tensors"]) == ("custom", "float32", 5000, 3)
    everything = {*rows, *(note.partition(":")[0] for note in output["notes"])}
    assert {"torch fused", "apex FusedAdam", "deepspeed CPUAdam", "hvd_adam fused"} <= everything
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_adam_prints_the_machine_and_a_table(capsys):
    measure("adam", AdamConfig(parameters=100, threads="1", repeats=1, device="cpu"))
    output = capsys.readouterr().out
    assert "load average" in output
    assert f"torch {torch.__version__}" in output
    assert "threads  optimizer" in output
    assert "after 3 warm-up rounds" in output


def test_adam_times_every_workload_in_every_dtype(monkeypatch):
    factories = optimizers.factories

    def without_fused(*args):  # which would be compiled
        return {name: make for name, make in factories(*args).items() if name != "hvd_adam fused"}

    monkeypatch.setattr(optimizers, "factories", without_fused)
    dtypes = "bfloat16-master,float64"
    output = adam.measure(AdamConfig(workloads="30,2K", dtype=dtypes, threads="1", repeats=1, device="cpu"))
    by_dtype = {}
    for row in output.rows:
        by_dtype.setdefault((row["parameters"], row["dtype"]), []).append(row)
    assert [*by_dtype] == [(n, dtype) for n in (30, 2000) for dtype in ("bfloat16-master", "float64")]
    for (parameters, dtype), rows in by_dtype.items():
        size = {"float64": 56, "bfloat16-master": 30}[dtype]
        assert {"hvd_adam foreach", "hvd_adam reference", "torch foreach", "copy"} <= {row["name"] for row in rows}
        for row in rows:
            assert row["gb_per_s"] == pytest.approx(size * parameters / row["median_ms"] / 1e6)
    assert any("float64 56" in note and "bfloat16-master 30" in note for note in output.notes)


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("resnet18", 62, 11_689_512),
        ("resnet50", 161, 25_557_032),
        ("transformer", 292, 1_315_723_264),
        ("16M", 1, 16_000_000),
    ],
)
def test_workloads_have_the_tensor_shapes_of_their_models(name, tensors, parameters):
    shapes = workloads.shapes(AdamConfig(), name)
    assert (len(shapes), sum(map(math.prod, shapes))) == (tensors, parameters)


def test_the_default_workload_is_resnet18_on_a_cpu_and_all_on_a_gpu():
    assert (AdamConfig().workload_names("cpu"), AdamConfig().dtype_names("cpu")) == (("resnet18",), ("float32",))
    names = AdamConfig().workload_names("cuda")
    assert names == ("1M", "16M", "100M", "1G", "resnet18", "resnet50", "transformer")
    assert AdamConfig().dtype_names("cuda") == ("float32", "bfloat16-master")


def workload(*sizes, dtype="float32", device="cpu"):
    return workloads.Workload("test", dtype, tuple((size,) for size in sizes), torch.device(device))


@pytest.mark.parametrize("gradients", ["new", "kept"])
def test_adam_gives_every_step_new_gradients_or_the_same(monkeypatch, gradients):
    seen = []

    def factory(tensors):
        return lambda: seen.append(tensors.parameters[0].grad)

    monkeypatch.setattr(optimizers, "factories", lambda *_: {"torch fused": factory})
    config = AdamConfig(workloads="30", threads="1", repeats=2, device="cpu", gradients=gradients)
    output = adam.measure(config)
    assert len(set(map(id, seen))) == (len(seen) if gradients == "new" else 1)
    assert all(torch.equal(gradient, seen[0]) for gradient in seen)
    assert f"gradients: {gradients}" in output.notes[0]


def test_peers_with_master_weights_make_the_same_step_as_hvd_adam():
    ended = {}
    for name, make in optimizers.factories(workload(300, 7, dtype="bfloat16-master"), reference=False).items():
        if name in ("hvd_adam reference", "torch for-loop", "torch foreach"):
            tensors = optimizers.Tensors(workload(300, 7, dtype="bfloat16-master"))
            before = [parameter.detach().clone() for parameter in tensors.parameters]
            step = make(tensors)
            for _ in range(3):
                step()
            assert not any(map(torch.equal, before, tensors.parameters))
            ended[name] = torch.cat([parameter.detach() for parameter in tensors.parameters])
    assert len(ended) == 3
    for parameters in ended.values():
        assert parameters.dtype == torch.bfloat16
        torch.testing.assert_close(parameters, ended["hvd_adam reference"])


def test_a_large_copy_uses_small_buffers_several_times_to_move_the_same_number_of_bytes(monkeypatch):
    monkeypatch.setattr(optimizers, "COPY_BYTES", 400)
    copied = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda goal, origin: copied.append((goal.nbytes, origin.nbytes)))
    optimizers.copies(workload(64))["copy"]()
    assert copied == [(400, 400), (400, 400), (96, 96)]  # half of 28 bytes for each of 64 parameters


def test_on_a_gpu_only_fast_implementations_are_timed_with_many_parameters():
    largest, large, small = (workload(size, device="cuda") for size in (2 * 10**9, 10**9, 10**6))
    fast = ["hvd_adam fused", "torch foreach", "torch fused", "apex FusedAdam"]
    assert list(optimizers.factories(largest, reference=False)) == fast
    formats = ["hvd_adam fused bfloat16", "hvd_adam fused 8bit"]
    assert {*optimizers.factories(large, reference=False)} == {*fast, *formats}
    slow = ["hvd_adam foreach", "torch for-loop"]
    assert {*fast, *formats, *slow} < {*optimizers.factories(small, reference=False)}


def test_on_a_gpu_peers_share_parameters_and_one_out_of_memory_is_reported(monkeypatch):
    given = {}

    def factory(name, error=None):
        def make(tensors):
            given[name] = tensors
            if error is not None:
                raise error
            return lambda: None

        return make

    full, odd = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried\nto"), RuntimeError("no kernel\nimage")
    factories = {
        "hvd_adam fused": factory("ours"),
        "a": factory("a", full),
        "b": factory("b"),
        "c": factory("c", odd),
    }
    monkeypatch.setattr(optimizers, "factories", lambda *_: factories)
    monkeypatch.setattr(optimizers, "Tensors", lambda _: object())
    released = []
    monkeypatch.setattr(optimizers, "release", lambda _: released.append([*given]))
    found = optimizers.build(workload(1, device="cuda"), reference=False)
    assert given["a"] is given["b"] is given["c"] is not given["ours"]
    assert list(found.calls) == ["hvd_adam fused", "b"]
    assert released == [["ours", "a"]]  # before the next one
    assert (found.errors, found.missing) == ({"a": "CUDA out of memory. Tried"}, ["c: no kernel"])


def test_on_a_gpu_a_turn_is_a_block_of_calls_with_one_synchronization(monkeypatch):
    synchronized, called = [], []
    monkeypatch.setattr(adam, "synchronizer", lambda _: lambda: synchronized.append(len(called)))
    monkeypatch.setattr(adam, "mean_seconds", lambda call, calls, synchronize: (synchronize(), call(calls))[1])

    def full(calls):
        raise torch.cuda.OutOfMemoryError("full")

    takes = {"short": 1e-3, "long": 1.0, "nothing": 1e-9}
    calls = {name: lambda calls, name=name: called.append((name, calls)) or takes[name] for name in takes}
    times, errors = adam.interleaved(calls | {"full": full}, 2, torch.device("cuda"))
    assert times == {name: [seconds] * 2 for name, seconds in takes.items()}
    assert errors == {"full": "full"}
    assert {*called[-3:]} == {("short", 10), ("long", adam.MIN_CALLS), ("nothing", adam.MAX_CALLS)}
    called.clear()
    adam.interleaved(calls, 2, torch.device("cpu"))
    assert {calls for _, calls in called} == {1}


def test_the_mean_of_a_block_of_calls_needs_one_synchronization():
    done = []
    assert 0 <= mean_seconds(lambda: done.append("call"), 3, lambda: done.append("synchronize")) < 60
    assert done == ["call", "call", "call", "synchronize"]


def test_step_trains_every_variant(tmp_path, mark):
    plot = tmp_path / "step.png"
    argv = ("--models", "cnn", "--batch-size", 2, "--repeats", 1, "--steps", 2, "--device", "cpu")
    output = bench_json("step", *argv, "--launcher", "gloo", "--plot", plot, forked=True)
    rows = {row["variant"]: row for row in output["rows"]}
    assert list(rows) == [*OURS, "horovod", "horovod-fused", "ddp-fused", "ddp-zero", "compute"]
    for row in rows.values():
        assert row["samples"] == 2
        assert row["to_plain"] is None
        assert row["images_per_s"] == pytest.approx(4 / row["median_ms"] * 1e3)
        for peer in ("ddp-fused", "horovod", "compute"):
            expected = row["median_ms"] / rows[peer]["median_ms"]
            assert row[f"to_{peer.replace('-', '_')}"] == pytest.approx(expected)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert marked(mark) == []


def test_plain_pytorch_is_timed_on_one_rank_without_a_launcher(mark):
    argv = ("--np", 1, "--models", "mlp", "--variants", "plain", "--batch-size", 2, "--repeats", 2, "--steps", 3)
    output = bench_json("step", *argv, "--precision", "bf16", "--channels-last", "--device", "cpu")
    (row,) = output["rows"]
    assert (row["variant"], row["samples"], row["to_plain"]) == ("plain", 6, 1.0)
    assert output["notes"][0].startswith("1 rank without a launcher, on cpu")
    assert "bf16, channels-last; parameters: mlp 10.5 M" in output["notes"][0]
    assert marked(mark) == []


def test_one_rank_needs_neither_launcher_nor_horovod(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # a directory without horovodrun
    assert launchers.horovodrun("x", {}, 1, "mpi").command == launchers.WORKER
    assert launchers.horovodrun("x", {}, 1, "gloo").environ["HOROVOD_CONTROLLER"] == "gloo"
    with pytest.raises(UserError, match="horovodrun does not exist"):
        launchers.horovodrun("x", {}, 2, "gloo")


class Probe(torch.nn.Module):
    """A model that records its inputs."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 10, 3)
        self.seen = []

    def forward(self, images):
        logits = self.layer(images)
        order = [t.is_contiguous(memory_format=torch.channels_last) for t in (images, self.layer.weight)]
        self.seen.append((*order, logits.dtype))
        return logits.mean((2, 3))


def needs_fused_adam_of_pytorch():
    try:
        torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], fused=True)
    except RuntimeError as error:
        pytest.skip(f"PyTorch has no fused Adam for CPUs: {error}")


@pytest.mark.parametrize("variant", ["plain", "compute"])
def test_precision_memory_format_and_compilation_follow_the_options(variant, monkeypatch, tmp_path):
    compiled, probes = [], []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    monkeypatch.setattr(step_worker, "build_model", lambda _: probes.append(Probe()) or probes[-1])
    if variant == "plain":
        needs_fused_adam_of_pytorch()
    task = {"variant": variant, "model": "probe", "batch_size": 2, "device": "cpu", "steps": 2}
    for options in (
        {"precision": "fp32", "channels_last": False, "compile": False},
        {"precision": "bf16", "channels_last": True, "compile": True},
    ):
        before = len(compiled)
        times = step_worker.prepare(task | options, LaunchInfo("none", 0, 1), tmp_path)()
        assert len(times["step"]) == 2
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options["precision"]]
        assert {*probes[-1].seen} == {(options["channels_last"], options["channels_last"], dtype)}
        assert (compiled[before:] == probes[-1:]) == options["compile"]


def test_steps_of_a_turn_are_synchronized_once(monkeypatch):
    done = []
    times = time_calls(lambda: done.append("step"), 4, lambda: done.append("synchronize"), calls_per_sync=4)
    assert (len(times), done) == (1, [*["step"] * WARM_UP_CALLS, "synchronize", *["step"] * 4, "synchronize"])


def test_variants_that_need_mpi_are_reported_as_missing_without_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    plans, missing = allreduce.plans(AllreduceConfig(launcher="gloo"), "cpu")
    assert [plan.name for plan in plans] == ["copy", "hvd_adam step", "hvd_adam", "horovod", "torch"]
    assert "mpi: there is no mpirun on PATH" in missing
    described = report.describe(report.machine(0.0))
    assert described.endswith(", no MPI")


def test_allreduce_times_every_variant_at_every_size(tmp_path, mark):
    plot = tmp_path / "allreduce.png"
    argv = ("--sizes", "0.004,0.02", "--repeats", 1, "--calls", 3, "--device", "cpu", "--plot", plot)
    output = bench_json("allreduce", *argv, forked=True)
    assert {row["megabytes"] for row in output["rows"]} == {0.004, 0.02}
    for size in (0.004, 0.02):
        rows = {row["variant"]: row for row in output["rows"] if row["megabytes"] == size}
        ours = ["hvd_adam step", "hvd_adam step with backward", "hvd_adam"]
        assert list(rows)[:7] == ["copy", *ours, "horovod", "torch", "mpi"]
        assert "mpi-tuned" in rows or any(note.startswith("mpi-tuned: ") for note in output["notes"])
        for name in set(rows) - {"copy"}:
            row = rows[name]
            assert row["bound_ms"] == pytest.approx(rows["copy"]["median_ms"])  # 2(N−1)/N is 1 for two ranks
            assert row["to_bound"] == pytest.approx(row["median_ms"] / row["bound_ms"])
            assert row["to_horovod"] == pytest.approx(row["median_ms"] / rows["horovod"]["median_ms"])
            assert row["bus_gb_per_s"] == pytest.approx(size / row["median_ms"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert marked(mark) == []


def test_checkpoint_times_runs_with_and_without_checkpoints(tmp_path, mark):
    argv = ("--models", "mlp", "--np", 1, "--every", 2, "--steps", 7, "--repeats", 1, "--folder", tmp_path)
    output = bench_json("checkpoint", *argv, "--launcher", "gloo", "--device", "cpu", forked=True)
    without, with_them = output["rows"]
    assert (without["variant"], with_them["variant"]) == ("without", "with")
    # Without the first interval, and the update after the last one.
    assert without["samples"] == with_them["samples"] == 2
    assert without["to_without"] == 1
    assert with_them["to_without"] == pytest.approx(with_them["median_ms"] / without["median_ms"])
    assert with_them["megabytes"] > 1
    assert list(tmp_path.iterdir()) == []
    assert marked(mark) == []


def test_checkpoint_reports_the_run_that_failed():
    runs = {"without": [{"seconds": [0.1, 0.3], "megabytes": 2.0}], "with": [{"error": "with: died"}]}
    without, with_them = checkpoint.summarize("mlp", runs)
    assert without["median_ms"] == pytest.approx(200)
    assert with_them == {"model": "mlp", "variant": "with", "error": "with: died", "to_without": None}


def test_memory_of_every_strategy_matches_the_prediction(tmp_path):
    plot = tmp_path / "memory.png"
    options = ("--model", "cnn", "--np", "2", "--device", "cpu", "--plot", plot)
    output = bench_json("memory", *options, forked=True)
    variants = (*STRATEGIES, "allreduce-released")
    expected = [(name, held, 2) for name in variants for held in ("float32", "8bit")]
    assert [(row["strategy"], row["state_format"], row["np"]) for row in output["rows"]] == expected
    for row in output["rows"]:
        assert row["total"] == pytest.approx(row["parameters"] + row["gradients"] + row["state"], rel=0.01)
        assert row["total"] == pytest.approx(row["predicted_total"], rel=0.05)
        assert row["to_predicted"] == pytest.approx(row["total"] / row["predicted_total"])
        assert row["peak"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_data_reads_a_folder_in_every_way(tmp_path, mark):
    argv = ("--images", 100, "--image-size", 16, "--workers", 0, "--batch-size", 4, "--batches", 2, "--repeats", 2)
    plot = tmp_path / "data.png"
    output = bench_json("data", *argv, "--plot", plot)
    rows = output["rows"]
    assert [row["variant"] for row in rows] == ["torch DataLoader", "imagefolder", "imagefolder --cache"]
    for row in rows:
        assert row["images"] == 100 and row["low"] <= row["rate"] <= row["high"] and row["megabytes"] > 50
        assert row["to_torch"] == pytest.approx(row["rate"] / rows[0]["rate"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert marked(mark) == []
