"""launch/horovodrun.sh, mpirun.sh, slurm.sh and the filter of mpirun's stderr, with real launchers and real ranks.

Hazards: a rank's exit code lost by a launcher (horovodrun with Gloo turns it into 1 and a traceback); a launcher's
boxes and tracebacks around a one-line message; helpful reports hidden with them; progress bars held back until a
line's end; signals that stop at the script and leave ranks behind; quoting of arguments; environment that remote
ranks do not get; a SIGTERM that mpirun takes for an order to kill; fewer cores than ranks; bad options answered by
anything but one line and 2.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
BIN = str(Path(sys.executable).parent)
LAUNCHERS = [["mpirun.sh"], ["horovodrun.sh", "--mpi"], ["horovodrun.sh", "--gloo"]]
RULE = b"-" * 74 + b"\n"

# A stand-in for the training. Rank 0 says one line; the others wait for that, as the training's ranks do, because
# horovodrun with Gloo ends all ranks as soon as one has ended.
RANKS = """
import os, signal, sys, time
from pathlib import Path
rank = int(os.environ.get("HOROVOD_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", 0)))
mode, folder = sys.argv[1], Path(sys.argv[2])
if mode in ("wait", "stubborn"):
    stop = lambda *_: ((folder / f"usr1.{rank}").touch(), sys.exit(75))
    signal.signal(signal.SIGUSR1, stop if mode == "wait" else signal.SIG_IGN)
    (folder / f"pid.{rank}.new").write_text(str(os.getpid()))
    (folder / f"pid.{rank}.new").rename(folder / f"pid.{rank}")
    while True:
        signal.pause()
if mode == "show":
    (folder / f"shown.{rank}").write_text(repr((sys.argv[3:], os.environ.get("FOO"))))
    sys.exit(0)
if rank == 0:
    print("rank 0: one line", file=sys.stderr, flush=True)
    (folder / "said").touch()
while not (folder / "said").exists():
    time.sleep(0.01)
sys.exit(int(mode))
"""


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    unwanted = ("HOROVOD_", "OMPI_", "PMIX_", "NCCL_", "OMP_", "SLURM_", "HVD_ADAM_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    clean.pop("LD_LIBRARY_PATH", None)
    return clean | {"PYTHONPATH": str(tmp_path), "HVD_ADAM_PYTHON": sys.executable}


def run(script, *arguments, env):
    command = ["bash", str(LAUNCH / script), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)


def untagged(text):
    """The lines that hold more than the launchers' rank tags, without these."""
    return list(filter(None, (re.sub(r"\[[\d,]+\]<std(out|err)>:", "", line) for line in text.splitlines())))


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=" ".join)
@pytest.mark.parametrize("code", [2, 75])
def test_ranks_that_say_why_they_end_are_heard_alone_and_keep_their_code(launcher, code, environment, tmp_path):
    script, *options = launcher
    ended = run(script, "-np", 2, *options, "--module", "ranks", "--", code, tmp_path, env=environment)
    assert ended.returncode == code
    assert untagged(ended.stderr) == ["rank 0: one line"]


def test_other_exit_codes_pass_with_mpiruns_report_of_them(environment, tmp_path):
    ended = run("mpirun.sh", "-np", 2, "--module", "ranks", "--", 3, tmp_path, env=environment)
    assert ended.returncode == 3
    assert "rank 0: one line" in ended.stderr and "Exit code:    3" in ended.stderr


def test_gloo_passes_other_exit_codes_and_the_ranks_own_words(environment, tmp_path):
    ended = run("horovodrun.sh", "-np", 2, "--gloo", "--module", "ranks", "--", 3, tmp_path, env=environment)
    assert ended.returncode == 3
    assert untagged(ended.stderr) == ["rank 0: one line"]


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=" ".join)
def test_arguments_and_variables_reach_more_ranks_than_there_are_cores(launcher, environment, tmp_path):
    script, *options = launcher
    ranks = (os.cpu_count() or 1) + 1
    arguments = ["--module", "ranks", "-x", "FOO=a b", "--", "show", tmp_path, "it's", "a b", "$HOME"]
    ended = run(script, "-np", ranks, *options, *arguments, env=environment)
    assert ended.returncode == 0
    shown = [(tmp_path / f"shown.{rank}").read_text() for rank in range(ranks)]
    assert shown == [repr((["it's", "a b", "$HOME"], "a b"))] * ranks


def start_waiting_ranks(launcher, environment, folder, mode="wait"):
    script, *options = launcher
    command = ["bash", LAUNCH / script, "-np", "2", *options, "--module", "ranks", "--", mode, folder]
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    while not all((folder / f"pid.{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None, "the launcher ended before its ranks started"
        time.sleep(0.02)
    return process, [int((folder / f"pid.{rank}").read_text()) for rank in (0, 1)]


def wait_for_end(pids):
    """The test's own time limit ends this where a rank is left behind."""
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.02)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("launcher", LAUNCHERS, ids=" ".join)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_script_leaves_no_rank_behind(launcher, number, environment, tmp_path):
    process, pids = start_waiting_ranks(launcher, environment, tmp_path)
    process.send_signal(number)
    assert process.wait() != 0
    wait_for_end(pids)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("launcher", LAUNCHERS[:2], ids=" ".join)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_mpirun_hands_usr1_to_every_rank_and_their_75_comes_back(launcher, number, environment, tmp_path):
    process, pids = start_waiting_ranks(launcher, environment, tmp_path)
    # To its group, as a scheduler or "timeout" does it, of which mpirun must hear nothing.
    os.killpg(process.pid, number)
    assert process.wait() == 75
    wait_for_end(pids)
    assert any((tmp_path / f"usr1.{rank}").exists() for rank in (0, 1))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("launcher", LAUNCHERS, ids=" ".join)
def test_a_second_sigterm_ends_ranks_that_do_not_stop(launcher, environment, tmp_path):
    process, pids = start_waiting_ranks(launcher, environment, tmp_path, "stubborn")
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert process.returncode != 0
    wait_for_end(pids)


def test_a_rank_that_horovodrun_ends_is_not_taken_for_one_that_is_done():
    # As Horovod's helper does it, one after the other, where it is a race.
    code = """if True:
        import subprocess, psutil
        rank = subprocess.Popen(["sleep", "60"])
        rank.terminate()
        psutil.Process(rank.pid).wait(timeout=30)
        print(rank.wait())
    """
    for before, said in (("", "0"), ("import run_horovod\n", str(-signal.SIGTERM))):
        command = [sys.executable, "-c", before + code]
        done = subprocess.run(command, cwd=LAUNCH, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == said, done.stderr


@pytest.mark.timeout(60)
@pytest.mark.parametrize("launcher", LAUNCHERS, ids=" ".join)
def test_a_launcher_that_is_killed_takes_its_ranks_along(launcher, environment, tmp_path):
    process, pids = start_waiting_ranks(launcher, environment, tmp_path)
    process.kill()
    wait_for_end(pids)


def dry_run(script, *arguments, env):
    shown = run(script, "--dry-run", *arguments, env=env)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.replace(sys.executable, "PYTHON").replace(str(LAUNCH), "LAUNCH")


def test_horovodrun_shows_its_command(environment, tmp_path):
    (tmp_path / "key").touch()
    arguments = [
        "-np",
        6,
        "-H",
        "a:4,b:4",
        "-i",
        "eth0",
        "--ssh-port",
        2222,
        "--ssh-key",
        tmp_path / "key",
        "--gloo",
    ]
    assert dry_run("horovodrun.sh", *arguments, "--", "--lr", "1e-3", "x y", env=environment) == (
        "PYTHON LAUNCH/run_horovod.py -np 6 -H a:4\\,b:4 --network-interfaces eth0 --ssh-port 2222 "
        f"--ssh-identity-file {tmp_path}/key --gloo PYTHON -m hvd_adam.train --lr 1e-3 x\\ y\n"
    )


def test_mpirun_shows_its_command(environment, tmp_path):
    (tmp_path / "key").touch()
    environment |= {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "2", "HOROVOD_CYCLE_TIME": "5", "SECRET": "x"}
    arguments = [
        "-np",
        6,
        "-H",
        "a:4,b:4",
        "-i",
        "eth0",
        "--ssh-port",
        2222,
        "--ssh-key",
        tmp_path / "key",
        "-x",
        "HOME",
    ]
    root = "--allow-run-as-root " if os.geteuid() == 0 else ""
    shown = dry_run("mpirun.sh", *arguments, "--module", "hvd_adam.evaluate", env=environment)
    before, after = shown.split(" -x ", 1)
    assert before == (
        f"PYTHON -I LAUNCH/pass_signals.py mpirun -np 6 -H a:4\\,b:4 {root}--bind-to none --map-by slot "
        "--mca pml ob1 --mca btl \\^openib "
        f"--mca btl_tcp_if_include eth0 --mca plm_rsh_args -p\\ 2222\\ -i\\ {tmp_path}/key"
    )
    *names, last = after.split(" -x ")
    handed_on = {"PATH", "PYTHONPATH", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS", "HOROVOD_CYCLE_TIME"}
    assert {*names, last.split()[0]} == handed_on | {"HOROVOD_GLOO_IFACE", "HOME"}
    assert last == "HOME PYTHON -m hvd_adam.evaluate\n"


def test_without_hosts_this_machine_gets_all_ranks_and_in_slurm_the_allocation(environment):
    assert " -H localhost:3 " in dry_run("mpirun.sh", "-np", 3, env=environment)
    assert " -H localhost:3 " in dry_run("horovodrun.sh", "-np", 3, env=environment)
    assert " -H " not in dry_run("mpirun.sh", "-np", 3, env=environment | {"SLURM_JOB_ID": "1"})


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh"])
def test_a_host_file_may_have_comments_and_sets_the_number_of_ranks(script, environment, tmp_path):
    (tmp_path / "hosts").write_text("# the cluster\nnode1 slots=4\n\nnode2   slots=2  # half\n")
    shown = dry_run(script, "--hostfile", tmp_path / "hosts", env=environment)
    assert "-np 6 -H node1:4\\,node2:2 " in shown


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh"])
@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--nodes", "2"], "--nodes"),
        (["--lr", "1e-3"], "go after --"),
        (["-np"], "-np needs a value"),
        (["-np", "--", "x"], "-np needs a value"),
        (["-np", "two"], "-np two"),
        (["-np", "0"], "-np 0"),
        (["-np", "3", "-H", "a:1,b:1"], "the hosts offer 2"),
        (["-H", "a,b"], "host1:4"),
        (["-H", "a:1", "--hostfile", "/dev/null"], "exclude"),
        (["--hostfile", "/no/such"], "/no/such"),
        (["--hostfile", "/dev/null"], "names no host"),
        (["-x", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
        (["-x", "1A=2"], "1A"),
        (["--ssh-port", "ssh"], "--ssh-port ssh"),
        (["--ssh-key", "/no/such"], "/no/such"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else None,
)
def test_bad_options_get_one_line_and_2(script, arguments, named, environment):
    answer = run(script, *arguments, env=environment)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.count("\n") == 1 and named in answer.stderr and answer.stderr.startswith(script)


def test_the_two_controllers_exclude_each_other(environment):
    answer = run("horovodrun.sh", "--gloo", "--mpi", env=environment)
    assert answer.returncode == 2 and "exclude" in answer.stderr


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh", "slurm.sh", "quickstart.sh", "setup.sh"])
def test_help_shows_how_to_call_the_script(script, environment):
    answer = run(script, "--help", env=environment | {"SLURM_SUBMIT_DIR": str(LAUNCH.parent)})
    assert answer.returncode == 0 and f"launch/{script}" in answer.stdout and "set -euo" not in answer.stdout


def filtered(text):
    command = [sys.executable, LAUNCH / "filter_stderr.py"]
    return subprocess.run(command, input=text, capture_output=True, check=True).stdout


def test_the_filter_drops_reports_of_2_and_75_alone():
    general = (
        RULE + b"Primary job  terminated normally, but 1 process returned\na non-zero exit code. Per\n" + RULE
    )
    report = (
        RULE
        + b"mpirun detected that one or more processes exited with non-zero status, thus causing\n"
        + b"the job to be terminated. The first process to do so was:\n\n"
        + b"  Process name: [[1,1],0]\n  Exit code:    %d\n"
        + RULE
    )
    table = RULE + b"epoch loss\n1 0.5\n" + RULE
    for code in (2, 75):
        assert filtered(b"a\n" + general + b"b\n" + report % code + b"c") == b"a\nb\nc"
    for kept in (
        report % 1,
        report % 20,
        report % 139,
        table,
        RULE + b"There are not enough slots\n" + RULE,
        RULE,
    ):
        assert filtered(b"a\n" + general + kept) == b"a\n" + kept


def test_the_filter_drops_the_shells_word_on_ranks_that_horovodrun_ended():
    assert filtered(b"[1]<stderr>:Terminated\n[12]<stderr>:Terminated\n[0]<stderr>:a\n") == b"[0]<stderr>:a\n"
    for kept in (
        b"Terminated\n",
        b"[1]<stderr>:Terminated by the user\n",
        b"[1]<stderr>:Killed\n",
        b"[1",
        b"\n\n",
    ):
        assert filtered(kept) == kept


def test_the_filter_passes_half_lines_at_once():
    command = [sys.executable, LAUNCH / "filter_stderr.py"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        os.write(process.stdin.fileno(), b"10%|#")
        assert os.read(process.stdout.fileno(), 100) == b"10%|#"
        os.write(process.stdin.fileno(), b"\r20%|##\n---")
        assert os.read(process.stdout.fileno(), 100) == b"\r20%|##\n"


# Slurm has no GPUs here: these stand in for its commands, and say that it has.
SRUN = """#!/bin/sh
if [ "$1" = --mpi=list ]; then printf 'MPI plugin types are...\\n\\tnone\\n'; exit; fi
exit 1
"""
SINFO = """#!/bin/sh
echo gpu:a100:4
"""


@pytest.fixture
def slurm(environment, tmp_path):
    for name, text in (("srun", SRUN), ("sinfo", SINFO)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(LAUNCH.parent), "SLURM_JOB_ID": "1", "SLURM_JOB_PARTITION": "p"}
    job |= {"SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2"}
    return environment | job | {"PATH": f"{tmp_path}:{environment['PATH']}"}


@pytest.mark.parametrize(
    ("arguments", "gpus", "message"),
    [
        ([], "4", "4 GPUs but 2 tasks a node: give sbatch --ntasks-per-node=4"),
        ([], "0", "partition p has GPUs, but this job has none: give sbatch --gpus-per-node=N"),
        (["--launcher", "srun"], "2", "--launcher srun: this Slurm has no PMIx"),
        (["--launcher", "torchrun"], "2", "--launcher torchrun: srun, mpirun or horovodrun"),
        (["--epochs", "2"], "2", "unknown option --epochs; options of the training go after --"),
    ],
)
def test_slurm_refuses_what_would_not_train_as_meant(arguments, gpus, message, slurm):
    ended = run("slurm.sh", *arguments, env=slurm | {"SLURM_GPUS_ON_NODE": gpus})
    assert ended.returncode == 2 and message in ended.stderr and ended.stderr.count("\n") == 1


def test_slurm_says_what_to_do_outside_a_job_and_outside_the_repository(environment, slurm, tmp_path):
    home = {"SLURM_SUBMIT_DIR": str(LAUNCH.parent)}
    for script in ("slurm.sh", "slurm_container.sh image.sif"):
        name, *image = script.split()
        assert f"sbatch launch/{name}" in run(name, *image, env=environment | home).stderr
        elsewhere = run(name, *image, env=slurm | {"SLURM_SUBMIT_DIR": str(tmp_path)})
        assert "repository's root" in elsewhere.stderr
    assert "neither pyxis" in run("slurm_container.sh", "image.sif", env=slurm).stderr
    assert "which image?" in run("slurm_container.sh", env=slurm).stderr


def test_elastic_sh_hands_on_what_horovodrun_needs_to_ask_for_hosts(environment, tmp_path):
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    shown = dry_run(
        "elastic.sh",
        "-np",
        3,
        "--min-np",
        2,
        "--hostfile",
        tmp_path / "hosts",
        "-i",
        "eth0",
        "--",
        "--lr",
        1,
        env=environment,
    )
    for part in (
        f"-np 3 --min-np 2 --host-discovery-script bash\\ LAUNCH/discover_hosts.sh\\ {tmp_path}/hosts\\ 22",
        "--blacklist-cooldown-range 10 60 --gloo-timeout-seconds 30 --network-interfaces eth0",
        "-m hvd_adam.train --elastic --lr 1",
    ):
        assert part in shown
    shown = dry_run(
        "elastic.sh", "--discovery", "echo a:2; echo b", "--cooldown", 5, 9, "--max-np", 8, env=environment
    )
    assert "-np 3 --min-np 1 --max-np 8 --host-discovery-script echo\\ a:2\\;\\ echo\\ b" in shown
    assert "--blacklist-cooldown-range 5 9" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-np 2", "which hosts?"),
        ("-np 2 -H a:2", "use --hostfile"),
        ("--min-np 0", "--min-np 0: a whole number"),
        ("--cooldown 5", "--cooldown : a whole number"),
        ("--discovery true", "no host answers"),
        ("-np 2 --min-np 3 --discovery true", "--min-np 3 is more than the 2 ranks"),
        ("--discovery true --hostfile /none", "no such readable file"),
    ],
)
def test_elastic_sh_answers_bad_options_with_one_line(arguments, message, environment):
    ended = run("elastic.sh", *arguments.split(), env=environment)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_hosts_that_do_not_answer_are_not_discovered(environment, tmp_path):
    with socket.create_server(("127.0.0.2", 0)) as server:
        (tmp_path / "hosts").write_text("# ours\n127.0.0.2 slots=3\n127.0.0.3 slots=1\n\nlocalhost slots=2\n")
        found = run("discover_hosts.sh", tmp_path / "hosts", server.getsockname()[1], env=environment)
    assert sorted(found.stdout.splitlines()) == ["127.0.0.2:3", "localhost:2"]
    (tmp_path / "hosts").write_text("a 2\n")
    assert "not of the form" in run("discover_hosts.sh", tmp_path / "hosts", env=environment).stderr
