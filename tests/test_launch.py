"""launch/*.sh and hvd_adam/launch/, with real launchers and real ranks.

Hazards: a launcher loses a rank's exit code (horovodrun with Gloo exits with 1 and a traceback); a launcher's
boxes and tracebacks hide a one-line message; the filter removes helpful reports with them, or delays progress bars
until the end of the line; a signal reaches only the script, and ranks keep running; mpirun kills at a SIGTERM;
Horovod's helper processes run without the patches; arguments lose their quoting; remote ranks do not get the
environment; there are more ranks than cores; bad options do not get one line and exit code 2; a script does not
find its files because of CDPATH, a symbolic link or a space.
"""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from hvd_adam.launch.signal_proxy import ECHO_SECONDS

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
PACKAGE = ROOT / "hvd_adam" / "launch"
BIN = str(Path(sys.executable).parent)
LAUNCHERS = [["mpirun.sh"], ["horovodrun.sh", "--mpi"], ["horovodrun.sh", "--gloo"]]
RULE = b"-" * 74 + b"\n"

# A stub of the training. Rank 0 prints one line. The others wait for it, as the training's ranks do, because
# horovodrun with Gloo terminates all ranks as soon as one has exited.
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
        time.sleep(0.1)  # signal.pause() would miss a signal that arrives just before it
if mode == "show":
    (folder / f"shown.{rank}").write_text(repr((sys.argv[3:], os.environ.get("FOO"))))
    sys.exit(0)
if rank == 0:
    print("rank 0: one line", file=sys.stderr, flush=True)
    (folder / "printed").touch()
while not (folder / "printed").exists():
    time.sleep(0.01)
sys.exit(int(mode))
"""


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    unwanted = ("HOROVOD_", "OMPI_", "PMIX_", "NCCL_", "OMP_", "SLURM_", "HVD_ADAM_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    clean.pop("LD_LIBRARY_PATH", None)
    return clean | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "HVD_ADAM_PYTHON": sys.executable}


def run(script, *arguments, env):
    command = ["bash", str(LAUNCH / script), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=250, check=False)


def untagged(text):
    """The lines without the launchers' rank tags; lines with nothing else are left out."""
    return list(filter(None, (re.sub(r"\[[\d,]+\]<std(out|err)>:", "", line) for line in text.splitlines())))


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=" ".join)
@pytest.mark.parametrize("code", [2, 75])
def test_message_of_a_rank_that_exits_with_2_or_75_is_the_only_line_on_stderr(
    launcher, code, environment, tmp_path
):
    script, *options = launcher
    ended = run(script, "-np", 2, *options, "--module", "ranks", "--", code, tmp_path, env=environment)
    assert ended.returncode == code
    assert untagged(ended.stderr) == ["rank 0: one line"]


def test_mpirun_passes_other_exit_codes_and_its_report(environment, tmp_path):
    ended = run("mpirun.sh", "-np", 2, "--module", "ranks", "--", 3, tmp_path, env=environment)
    assert ended.returncode == 3
    assert "rank 0: one line" in ended.stderr and "Exit code:    3" in ended.stderr


def test_gloo_passes_other_exit_codes_and_the_message_of_the_rank(environment, tmp_path):
    ended = run("horovodrun.sh", "-np", 2, "--gloo", "--module", "ranks", "--", 3, tmp_path, env=environment)
    assert ended.returncode == 3
    assert untagged(ended.stderr) == ["rank 0: one line"]


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=" ".join)
def test_arguments_and_variables_reach_every_rank_with_more_ranks_than_cores(launcher, environment, tmp_path):
    script, *options = launcher
    ranks = (os.cpu_count() or 1) + 1
    arguments = ["--module", "ranks", "-x", "FOO=a b", "--", "show", tmp_path, "it's", "a b", "$HOME"]
    ended = run(script, "-np", ranks, *options, *arguments, env=environment)
    assert ended.returncode == 0
    shown = [(tmp_path / f"shown.{rank}").read_text() for rank in range(ranks)]
    assert shown == [repr((["it's", "a b", "$HOME"], "a b"))] * ranks


def test_variables_that_the_shell_drops_are_named_once(environment, tmp_path):
    environment |= {"A.B": "1", "C-D": "2", "FOO": "f", "BASH_FUNC_module%%": "() { :; }"}
    arguments = ["-np", 2, "--module", "ranks", "--", "show", tmp_path, "-x", "A.B"]
    ended = run("horovodrun.sh", "--mpi", *arguments, env=environment)
    assert ended.returncode == 0
    assert ended.stderr.startswith("horovodrun.sh: warning: the ranks do not get A.B, C-D: ")
    assert ended.stderr.count("\n") == 1
    shown = [(tmp_path / f"shown.{rank}").read_text() for rank in (0, 1)]
    assert shown == [repr((["-x", "A.B"], "f"))] * 2


def start_waiting_ranks(launcher, environment, folder, mode="wait"):
    script, *options = launcher
    command = ["bash", LAUNCH / script, "-np", "2", *options, "--module", "ranks", "--", mode, folder]
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    while not all((folder / f"pid.{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None, "the launcher ended before its ranks started"
        time.sleep(0.02)
    return process, [int((folder / f"pid.{rank}").read_text()) for rank in (0, 1)]


def wait_for_exit(pids):
    """Waits for all processes to exit; the test's time limit fails it if one keeps running."""
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.02)


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=" ".join)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_script_ends_every_rank(launcher, number, environment, tmp_path):
    process, pids = start_waiting_ranks(launcher, environment, tmp_path)
    process.send_signal(number)
    assert process.wait() == 130 if number == signal.SIGINT else process.wait()
    wait_for_exit(pids)


@pytest.mark.parametrize("launcher", LAUNCHERS[:2], ids=" ".join)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_mpirun_forwards_usr1_to_every_rank_and_returns_their_exit_code_75(
    launcher, number, environment, tmp_path
):
    process, pids = start_waiting_ranks(launcher, environment, tmp_path)
    # To its process group, like a scheduler or "timeout"; mpirun must not receive it directly.
    os.killpg(process.pid, number)
    assert process.wait() == 75
    wait_for_exit(pids)
    assert any((tmp_path / f"usr1.{rank}").exists() for rank in (0, 1))


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=" ".join)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_ranks_that_ignore_the_first(launcher, number, environment, tmp_path):
    process, pids = start_waiting_ranks(launcher, environment, tmp_path, "stubborn")
    while process.poll() is None:
        process.send_signal(number)
        time.sleep(0.3)
    assert process.returncode == 130 if number == signal.SIGINT else process.returncode, process.returncode
    wait_for_exit(pids)


def test_signal_while_the_proxy_exits_does_not_change_the_exit_code():
    proxy = str(ROOT / "hvd_adam" / "launch" / "signal_proxy.py")
    # The object is deleted after Python has replaced signal handlers by the default.
    code = f"""if True:
        import os, runpy, signal, sys
        class Late:
            def __del__(self, kill=os.kill, pid=os.getpid()):
                kill(pid, {signal.SIGINT:d})
        late = Late()
        sys.argv = ["proxy", "sh", "-c", "exit 3"]
        runpy.run_path({proxy!r}, run_name="__main__")
    """
    assert subprocess.run([sys.executable, "-c", code]).returncode == 3


def test_signal_before_the_launcher_starts_is_forwarded_when_it_has_started():
    code = f"""if True:
        import os, runpy, signal, subprocess, sys
        def popen(*arguments, start=subprocess.Popen, **options):
            os.kill(os.getpid(), signal.SIGINT)
            return start(*arguments, **options)
        subprocess.Popen = popen
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a background command of a script
        sys.argv = ["proxy", "sleep", "1000"]
        runpy.run_path({str(PACKAGE / "signal_proxy.py")!r}, run_name="__main__")
    """
    assert subprocess.run([sys.executable, "-c", code], timeout=250).returncode == 130


def test_rank_that_horovodrun_terminates_does_not_count_as_successful():
    # The steps of Horovod's helper process in the order that fails; there they are a race.
    code = """if True:
        import subprocess, psutil
        rank = subprocess.Popen(["sleep", "1000"])
        rank.terminate()
        psutil.Process(rank.pid).wait(timeout=250)
        print(rank.wait())
    """
    for setup, exit_code in (("", "0"), ("import hvd_adam.launch.horovodrun\n", str(-signal.SIGTERM))):
        command = [sys.executable, "-c", setup + code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
        assert done.stdout.strip() == exit_code, done.stderr


def test_a_signal_at_the_end_of_a_helper_process_does_not_change_its_exit_code():
    # Python restores the default of each handler before it removes what modules hold.
    code = """if True:
        import os, signal, sys
        from hvd_adam.launch import horovod_helpers
        class Late:
            def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGUSR1):
                kill(process, number)
        sys.late = Late()
        horovod_helpers.patch_helper()
        os.setsid()
        print("started", flush=True)
    """
    command, streams = [sys.executable, "-c", code], {"cwd": ROOT, "capture_output": True, "text": True}
    done = subprocess.run(command, **streams, timeout=250)
    assert (done.returncode, done.stdout) == (0, "started\n"), done.stderr


def run_on_interface(interface, controller):
    module = "hvd_adam.launch.check_allreduce"
    options = ("-np", 2, controller, "-i", interface, "--module", module)
    return run("horovodrun.sh", *options, env={**os.environ, "HVD_ADAM_PYTHON": sys.executable})


@pytest.mark.parametrize("controller", ["--gloo", "--mpi"])
def test_ranks_on_this_host_may_use_another_interface_than_loopback(controller):
    addresses = psutil.net_if_addrs().items()
    others = sorted(
        name for name, each in addresses if name != "lo" and any(a.family == socket.AF_INET for a in each)
    )
    if not others:
        pytest.skip("this host has only a loopback interface")
    done = run_on_interface(others[0], controller)
    assert (done.returncode, done.stdout.count("the sum is 3.0")) == (0, 2), done.stderr


@pytest.mark.parametrize("controller", ["--gloo", "--mpi"])
def test_an_interface_that_this_host_does_not_have_is_one_line(controller):
    done = run_on_interface("eth77", controller)
    line = r"horovodrun.sh: error: this host has no network interface eth77 with .*: use .*\blo\b.*\n"
    assert done.returncode == 2 and re.fullmatch(line, done.stderr), done.stderr


def test_mpirun_refuses_an_interface_that_this_host_does_not_have_if_ranks_run_here(environment, tmp_path):
    # Open MPI itself warns and uses other interfaces. The stub shows what it would get.
    (tmp_path / "mpirun").write_text("#!/bin/sh\necho started\n")
    (tmp_path / "mpirun").chmod(0o755)
    environment |= {"PATH": f"{tmp_path}:{environment['PATH']}"}
    line = r"mpirun.sh: error: this host has no network interface eth77 with an IPv4 address: use .*\blo\b.*\n"
    on_node = {"SLURM_JOB_ID": "1", "SLURMD_NODENAME": "a"}
    for hosts, job in ([], {}), (["-H", f"a:1,{socket.gethostname()}:1"], {}), ([], on_node):
        ended = run("mpirun.sh", "-np", 2, *hosts, "--no-check", "-i", "eth77", env=environment | job)
        assert (ended.returncode, ended.stdout) == (2, "") and re.fullmatch(line, ended.stderr), ended.stderr
    for hosts, interface, job in (
        (["-H", "a:2"], "eth77", {}),  # other hosts may have it
        ([], "eth77", {"SLURM_JOB_ID": "1"}),
        ([], "eth77,lo", {}),
        ([], "127.0.0.0/8", {}),
    ):
        ended = run("mpirun.sh", "-np", 2, *hosts, "--no-check", "-i", interface, env=environment | job)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "started\n", "")


@pytest.mark.parametrize("package", ["Horovod", "psutil"])
@pytest.mark.parametrize("script", ["horovodrun.sh", "elastic.sh"])
def test_a_python_without_horovod_is_one_line(script, package, environment, tmp_path):
    name = package.lower()
    (tmp_path / "python").write_text(
        f'#!/bin/bash\n[[ $1 != -I ]] || exec {sys.executable} "$@"\n'
        f'exec {sys.executable} -c \'import runpy, sys; sys.modules["{name}"] = None; sys.argv = sys.argv[1:]; '
        'runpy.run_path(sys.argv[0], run_name="__main__")\' "$@"\n'
    )
    (tmp_path / "python").chmod(0o755)
    hosts = ["--discovery", "echo localhost:2", "-i", "lo"] if script == "elastic.sh" else []
    ended = run(script, "-np", 2, *hosts, env=environment | {"HVD_ADAM_PYTHON": str(tmp_path / "python")})
    missing = {"Horovod": "Horovod", "psutil": "the package psutil"}[package]
    line = rf"horovodrun.sh: error: \S+ does not have {missing}: run 'bash launch/setup.sh', or set .*\n"
    assert ended.returncode == 2 and re.fullmatch(line, ended.stderr), ended.stderr


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh", "elastic.sh"])
def test_a_module_that_does_not_exist_is_one_line_before_ranks_start(script, environment, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "__init__.py").write_text("print('imported')")
    hosts = ["--discovery", "echo localhost:2", "-i", "lo"] if script == "elastic.sh" else []
    for name in ("no_such", "hvd_adam.no_such", "ranks.no_such", "plain", "no_such.train"):
        ended = run(script, "-np", 2, *hosts, "--module", name, env=environment)
        line = rf"{script}: error: \S+ finds no module {name} to run: is its folder the current one, or .*\n"
        assert (ended.returncode, ended.stdout) == (2, "") and re.fullmatch(line, ended.stderr), ended.stderr


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh"])
def test_a_python_without_the_package_is_one_line_with_hosts_and_without(script, environment, tmp_path):
    (tmp_path / "python").write_text(f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')
    (tmp_path / "python").chmod(0o755)
    bare = environment | {"HVD_ADAM_PYTHON": str(tmp_path / "python"), "PYTHONPATH": ""}
    command = ["bash", str(LAUNCH / script), "-np", "1"]
    for hosts in (["-H", "localhost:1"], ["-H", "a:1"], *([[]] if script == "mpirun.sh" else [])):
        ended = subprocess.run(
            [*command, *hosts], env=bare, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        line = rf"{script}: error: \S+ finds no module hvd_adam\S+ to run: run 'bash launch/setup.sh', or set .*\n"
        assert (ended.returncode, ended.stdout) == (2, "") and re.fullmatch(line, ended.stderr), ended.stderr


@pytest.mark.parametrize(
    "module", ["fails", "fails.inner", "missing.inner", "ranks", "hvd_adam", "json.tool", "space.a"]
)
def test_a_module_that_may_run_is_left_to_the_ranks(module, tmp_path):
    for package, code in {"fails": "print(1); raise OSError", "missing": "import no_such_package"}.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(code)
        (tmp_path / package / "__main__.py").touch()
    (tmp_path / "ranks.py").touch()
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "a.py").touch()
    command = [sys.executable, ROOT / "hvd_adam" / "launch" / "find_module.py", "x.sh", module]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("options", [[], ["--mpi"]], ids=" ".join)
def test_horovodrun_without_mpirun_is_one_line(options, environment, tmp_path):
    (tmp_path / "bin").mkdir()
    for program in ("awk", "basename", "bash", "dirname", "env", "grep", "sed", "sh", "tr"):
        (tmp_path / "bin" / program).symlink_to(shutil.which(program))
    environment |= {"PATH": str(tmp_path / "bin")}
    ended = run("horovodrun.sh", "-np", 2, *options, "--module", "ranks", "--", 0, tmp_path, env=environment)
    line = "no mpirun found: run 'bash launch/setup.sh', load your cluster's MPI module, or use --gloo"
    assert (ended.returncode, ended.stderr) == (2, f"horovodrun.sh: error: {line}\n")


@pytest.mark.parametrize(
    "start",
    [
        'runpy.run_module("hvd_adam.launch.horovodrun", run_name="__main__", alter_sys=True)',
        'runpy.run_path("hvd_adam/launch/horovodrun.py", run_name="__main__")',
    ],
    ids=["python -m", "by its path"],
)
def test_helper_processes_of_horovodrun_get_the_patches(start):
    # horovodrun starts its helpers with "spawn", which imports the main module again.
    code = f"""if True:
        import multiprocessing, runpy
        import horovod.runner.launch
        def run_commandline():
            show = "import psutil, sys; print(psutil.Process.wait.__name__, sys.modules['__mp_main__'].__name__)"
            helper = multiprocessing.get_context("spawn").Process(target=exec, args=(show,))
            helper.start()
            helper.join()
        horovod.runner.launch.run_commandline = run_commandline
        {start}
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.stdout == "wait_without_reaping __mp_main__\n", done.stderr


def test_the_launcher_uses_the_package_that_it_lies_in(tmp_path):
    # Not the one that this Python has installed, which may be another version or missing.
    shutil.copytree(ROOT / "hvd_adam", tmp_path / "hvd_adam", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); import hvd_adam; print(hvd_adam.__file__)"
    command = [sys.executable, "-c", code, tmp_path / "hvd_adam" / "launch" / "horovodrun.py"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=250)
    assert done.stdout == f"{tmp_path / 'hvd_adam' / '__init__.py'}\n", done.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=" ".join)
def test_ranks_end_when_the_launcher_is_killed(launcher, environment, tmp_path):
    process, pids = start_waiting_ranks(launcher, environment, tmp_path)
    process.kill()
    wait_for_exit(pids)


@pytest.mark.parametrize(("seconds", "signals", "code"), [(7, 1, 75), (1000, 2, 3)])
def test_ranks_under_gloo_have_time_to_save_after_a_signal_and_none_after_a_second_one(seconds, signals, code):
    # Horovod itself kills them after 5 s.
    rank = f"""if True:
        import os, signal, time
        received = []
        def stop(*_):
            received.append(1)
            print("signal", flush=True)
            if len(received) == 2:
                os._exit(3)
        signal.signal(signal.SIGTERM, stop)
        print("ready", flush=True)
        while not received:
            time.sleep(0.05)
        end = time.monotonic() + {seconds}
        while time.monotonic() < end:
            time.sleep(0.05)
        os._exit(75)
    """
    launcher = [sys.executable, "-m", "hvd_adam.launch.horovodrun", "-np", "1", "--gloo"]
    command, environ = [*launcher, sys.executable, "-c", rank], {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as running:
        for line in ["ready", *["signal"] * (signals - 1)]:
            while line not in running.stdout.readline():
                assert running.poll() is None
            running.terminate()
            time.sleep(2 * ECHO_SECONDS)  # a signal that comes sooner counts as the same
        assert running.wait(timeout=250) == code


def dry_run(script, *arguments, env):
    shown = run(script, "--dry-run", *arguments, env=env)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.replace(sys.executable, "PYTHON").replace(str(ROOT), "ROOT")


@pytest.mark.parametrize("controller", ["--gloo", "--mpi"])
def test_horovodrun_starts_ranks_without_importing_torch(controller, tmp_path):
    (tmp_path / "torch.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    command = [sys.executable, "-m", "hvd_adam.launch.horovodrun", "-np", "1", controller, "echo", "a rank"]
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0 and "a rank" in done.stdout, done.stderr
    assert not (tmp_path / "imported").exists()


def test_dry_run_of_horovodrun_prints_the_command(environment, tmp_path):
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
        "PYTHON ROOT/hvd_adam/launch/horovodrun.py -np 6 -H a:4\\,b:4 --network-interfaces eth0 --ssh-port 2222 "
        f"--ssh-identity-file {tmp_path}/key --gloo PYTHON -m hvd_adam.train --lr 1e-3 x\\ y\n"
    )


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh"])
def test_a_value_of_tune_is_written_so_that_mpirun_does_not_take_it_for_its_own(environment, script):
    shown = dry_run(script, "-np", 2, "--", "--tune", "any", "--lr", "1e-3", "--tune=off", env=environment)
    assert shown.endswith(" -m hvd_adam.train --tune=any --lr 1e-3 --tune=off\n")


def test_dry_run_of_mpirun_prints_the_command(environment, tmp_path):
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
        "PYTHON -I ROOT/hvd_adam/launch/signal_proxy.py mpirun "
        f"-np 6 -H a:4\\,b:4 {root}--bind-to none --map-by slot --mca pml ob1 --mca btl \\^openib "
        f"--mca btl_tcp_if_include eth0 --mca plm_rsh_args -p\\ 2222\\ -i\\ {tmp_path}/key"
    )
    *names, last = after.split(" -x ")
    exported = {"PATH", "PYTHONPATH", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS", "HOROVOD_CYCLE_TIME"}
    assert {*names, last.split()[0]} == exported | {"HOROVOD_GLOO_IFACE", "HOME"}
    assert last == "HOME PYTHON -m hvd_adam.evaluate\n"


def test_default_hosts_are_this_machine_or_the_slurm_allocation(environment):
    assert " -H localhost:3 " in dry_run("mpirun.sh", "-np", 3, env=environment)
    assert " -H localhost:3 " in dry_run("horovodrun.sh", "-np", 3, env=environment)
    assert " -H " not in dry_run("mpirun.sh", "-np", 3, env=environment | {"SLURM_JOB_ID": "1"})


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh"])
def test_host_file_sets_the_number_of_ranks_and_may_have_comments(script, environment, tmp_path):
    (tmp_path / "hosts").write_text("# the cluster\nnode1 slots=4\n\nnode2   slots=2  # half\n")
    shown = dry_run(script, "--hostfile", tmp_path / "hosts", env=environment)
    assert "-np 6 -H node1:4\\,node2:2 " in shown


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh", "elastic.sh", "discover_hosts.sh"])
def test_a_host_file_with_too_many_slots_is_refused(script, environment, tmp_path):
    (tmp_path / "hosts").write_text(f"a slots=1\nb slots={10**19}\n")
    option = [] if script == "discover_hosts.sh" else ["--dry-run", "--hostfile"]
    ended = run(script, *option, tmp_path / "hosts", env=environment)
    line = f"--hostfile {tmp_path}/hosts: host b has {10**19} slots: use at most 999999\n"
    assert (ended.returncode, ended.stderr) == (2, f"{script}: {line}")


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh"])
def test_slots_of_a_host_that_is_named_twice_add_up(script, environment, tmp_path):
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=08\nnode1 slots=2\n")
    for hosts in (["--hostfile", tmp_path / "hosts"], ["-H", "node1:1,node2:08,node1:2"]):
        assert " -np 11 -H node1:3\\,node2:8 " in dry_run(script, *hosts, env=environment)


def test_a_relative_environment_is_an_absolute_path_for_the_ranks(environment, tmp_path):
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    env = {name: value for name, value in environment.items() if name != "HVD_ADAM_PYTHON"}
    command = ["bash", LAUNCH / "horovodrun.sh", "-np", "1", "--dry-run"]
    env |= {"HVD_ADAM_VENV": "venv"}
    shown = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"{tmp_path}/venv/bin/python ")


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh", "elastic.sh"])
def test_an_environment_without_python_is_refused(script, environment, tmp_path):
    env = {name: value for name, value in environment.items() if name != "HVD_ADAM_PYTHON"}
    hosts = ["--discovery", "echo a:2"] if script == "elastic.sh" else []
    ended = run(script, "--dry-run", "-np", 1, *hosts, env=env | {"HVD_ADAM_VENV": str(tmp_path)})
    line = f"HVD_ADAM_VENV={tmp_path} has no bin/python: run 'bash launch/setup.sh', which makes it, or unset the"
    assert (ended.returncode, ended.stdout) == (2, "") and ended.stderr == f"{script}: {line} variable\n"


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh", "elastic.sh"])
def test_a_user_without_home_and_name_is_refused(script, environment):
    # mpirun crashes there.
    env = {name: value for name, value in environment.items() if name != "HOME"}
    env |= {"HVD_ADAM_PYTHON": shutil.which("true")}
    hosts = ["--discovery", "echo a:2"] if script == "elastic.sh" else []
    user = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups"]
    with TemporaryDirectory() as folder:  # not tmp_path, which only root can read
        for name in ("launch", "hvd_adam/build_horovod"):
            shutil.copytree(ROOT / name, Path(folder, name))
        Path(folder).chmod(0o755)
        command = [*user, "bash", Path(folder, "launch", script), "--dry-run", "-np", "1", *hosts]
        refused = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True)
        accepted = subprocess.run(command, env=env | {"HOME": folder}, cwd="/", capture_output=True, text=True)
    line = "HOME is not set and user 54321 has no entry in passwd: set HOME to a folder of yours"
    assert (refused.returncode, refused.stderr) == (2, f"{script}: {line}\n")
    assert accepted.returncode == 0, accepted.stderr


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
        (["-np", "1000000"], "-np 1000000: must be a whole number from 1 to 999999"),
        (["-H", f"a:1,b:{10**19}"], f"-H: host b has {10**19} slots: use at most 999999"),
        (["-H", "a:999999,b:1"], "the hosts have 1000000 slots: use at most 999999"),
        (["-np", "3", "-H", "a:1,b:1"], "only 2 slot"),
        (["-H", "a,b"], "host1:4"),
        (["-H", "a:1", "--hostfile", "/dev/null"], "exclude"),
        (["--hostfile", "/no/such"], "/no/such"),
        (["--hostfile", "/dev/null"], "names no host"),
        (["--hostfile", "/usr"], "/usr: no such readable file"),
        (["-x", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
        (["-x", "1A=2"], "1A"),
        (["-x", "A.B=2"], "A.B"),
        (["--ssh-port", "ssh"], "--ssh-port ssh"),
        (["--ssh-port", "65536"], "--ssh-port 65536: must be a port number from 1 to 65535"),
        (["--ssh-key", "/no/such"], "/no/such"),
        (["--ssh-key", "/usr"], "--ssh-key /usr: no such readable file"),
        (["--module", "./examples/mine.py"], "name a module, not a file: examples.mine"),
        (["--module", "/examples/mine.py"], "must be the name of a Python module"),
        (["--module", "no such"], "must be the name of a Python module"),
        (["--module", "a..b"], "must be the name of a Python module"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else None,
)
def test_bad_options_get_one_line_and_exit_code_2(script, arguments, named, environment):
    answer = run(script, *arguments, env=environment)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.count("\n") == 1 and named in answer.stderr and answer.stderr.startswith(script)


def test_every_name_that_python_takes_for_a_module_is_accepted(environment):
    for name in ("mine", "a_1.b2.__main__", "my-tool", "examples.01_mine", "größe", "mypackage"):
        assert dry_run("mpirun.sh", "-np", 1, "--module", name, env=environment).endswith(f" -m {name}\n"), name


def test_both_controllers_together_are_refused(environment):
    answer = run("horovodrun.sh", "--gloo", "--mpi", env=environment)
    assert answer.returncode == 2 and "exclude" in answer.stderr


@pytest.mark.parametrize("script", ["mpirun.sh", "horovodrun.sh", "slurm.sh", "quickstart.sh", "setup.sh"])
def test_help_prints_how_to_call_the_script(script, environment):
    answer = run(script, "--help", env=environment | {"SLURM_SUBMIT_DIR": str(LAUNCH.parent)})
    assert answer.returncode == 0 and f"launch/{script}" in answer.stdout and "set -euo" not in answer.stdout


def filtered(text):
    command = [sys.executable, "-I", PACKAGE / "stderr_filter.py"]
    return subprocess.run(command, input=text, capture_output=True, check=True).stdout


GENERAL = RULE + b"Primary job  terminated normally, but 1 process returned\na non-zero exit code. Per\n" + RULE
REPORT = (
    RULE
    + b"mpirun detected that one or more processes exited with non-zero status, thus causing\n"
    + b"the job to be terminated. The first process to do so was:\n\n"
    + b"  Process name: [[1,1],0]\n  Exit code:    %d\n"
    + RULE
)


def test_filter_drops_only_reports_of_exit_codes_2_and_75():
    table = RULE + b"epoch loss\n1 0.5\n" + RULE
    for code in (2, 75):
        assert filtered(b"a\n" + GENERAL + b"b\n" + REPORT % code + b"c") == b"a\nb\nc"
    for kept in (
        REPORT % 1,
        REPORT % 20,
        REPORT % 139,
        table,
        RULE + b"There are not enough slots\n" + RULE,
        RULE,
    ):
        assert filtered(b"a\n" + GENERAL + kept) == b"a\n" + kept


@pytest.fixture(scope="module")
def disconnected():
    """The box in which Open MPI reports that a rank on another host has ended."""
    prefix = Path(shutil.which("mpirun")).resolve().parents[1]
    text = (prefix / "share/openmpi/help-mpi-btl-tcp.txt").read_text()
    lines = text.partition("[peer hung up]\n")[2].partition("#\n")[0]
    return RULE + (lines % ("node2", 142, "node1")).encode() + RULE


MORE_DISCONNECTED = (
    b"[head:00597] 2 more processes have sent help message help-mpi-btl-tcp.txt / peer hung up\n"
    b'[head:00597] Set MCA parameter "orte_base_help_aggregate" to 0 to see all help / error messages\n'
)


@pytest.mark.parametrize("code", [2, 75])
def test_filter_drops_the_report_of_a_disconnected_rank_that_has_printed_the_reason(code, disconnected):
    before = b"a\n" + disconnected + b"b\n" + GENERAL + REPORT % code + MORE_DISCONNECTED + b"c\n"
    after = b"a\n" + GENERAL + b"b\n" + REPORT % code + b"c\n" + disconnected + disconnected
    assert filtered(before) == filtered(after) == b"a\nb\nc\n"


def test_filter_keeps_the_report_of_a_disconnected_rank_that_crashed(disconnected):
    crash = (
        RULE + b"mpirun noticed that process rank 1 with PID 0 on node node1 exited on signal 9 (Killed).\n" + RULE
    )
    for last in (REPORT % 1, crash, b""):
        text = b"a\n" + disconnected + b"b\n" + GENERAL + last + MORE_DISCONNECTED + b"c\n"
        assert filtered(text) == b"a\nb\n" + last + b"c\n" + disconnected + MORE_DISCONNECTED
    other = MORE_DISCONNECTED.replace(b"peer hung up", b"client connect fail")
    assert filtered(other + REPORT % 2) == other


def test_filter_drops_terminated_lines_of_ranks_that_horovodrun_terminated():
    race = b"[head:00597] plm:rsh: Warning: setpgid(602,602) failed in parent with errno=Permission denied(13)\n"
    assert filtered(race + b"a\n" + race) == b"a\n"
    assert filtered(b"[1]<stderr>:Terminated\n[12]<stderr>:Terminated\n[0]<stderr>:a\n") == b"[0]<stderr>:a\n"
    for kept in (
        b"Terminated\n",
        b"[1]<stderr>:Terminated by the user\n",
        b"[1]<stderr>:Killed\n",
        b"[1",
        b"\n\n",
    ):
        assert filtered(kept) == kept


def test_filter_drops_the_report_of_a_signal_that_mpirun_has_forwarded():
    line = b"mpirun: Forwarding signal 10 to job\n"
    ended = b"mpirun noticed that process rank 1 with PID 0 on node n exited on signal %s.\n"
    by_usr1, crash = (RULE + ended % cause + RULE for cause in (b"10 (User defined signal 1)", b"9 (Killed)"))
    assert filtered(b"a\n" + line + b"b\n" + by_usr1 + b"c\n") == b"a\nb\nc\n"
    for kept in (by_usr1, line[:-1].replace(b"signal", b"the") + b"\n", crash):
        assert filtered(b"a\n" + kept) == b"a\n" + kept
    assert filtered(line + crash) == crash


def test_filter_drops_lines_on_lost_connections_only_where_a_rank_has_named_the_cause():
    report = b"[2]<stderr>:[2]: Horovod background loop uncaught exception: "
    lost = report + b"[pair.cc:589] Read error: Connection reset by peer\n"
    error = b"[0]<stderr>:hvd_adam.train: error: lr differs\n"
    assert filtered(lost + error) == filtered(error + lost) == error
    crash = b"[0]<stderr>:Traceback (most recent call last):\n"
    assert filtered(lost + crash) == crash + lost


def test_filter_passes_incomplete_lines_immediately():
    command = [sys.executable, "-I", PACKAGE / "stderr_filter.py"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        os.write(process.stdin.fileno(), b"10%|#")
        assert os.read(process.stdout.fileno(), 100) == b"10%|#"
        os.write(process.stdin.fileno(), b"\r20%|##\n---")
        assert os.read(process.stdout.fileno(), 100) == b"\r20%|##\n"


# Stubs of Slurm's commands that report GPUs.
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
        ([], "4", "4 GPUs but 2 tasks per node: use sbatch --ntasks-per-node=4"),
        ([], "0", "partition p has GPUs, but this job has none: use sbatch --gpus-per-node=N"),
        (["--launcher", "srun"], "2", "--launcher srun: this Slurm has no PMIx"),
        (["--launcher", "torchrun"], "2", "--launcher torchrun: must be srun, mpirun or horovodrun"),
        (["--epochs", "2"], "2", "unknown option --epochs; options of the training go after --"),
        (["-i"], "2", "-i needs a value"),
        (["-i", "--", "--epochs", "2"], "2", "-i needs a value"),
        (["--module"], "2", "--module needs a value"),
        (
            ["--module", "examples/mine.py"],
            "2",
            "--module examples/mine.py: name a module, not a file: examples.mine",
        ),
    ],
)
def test_slurm_script_refuses_wrong_resources_and_options(arguments, gpus, message, slurm):
    ended = run("slurm.sh", *arguments, env=slurm | {"SLURM_GPUS_ON_NODE": gpus})
    assert ended.returncode == 2 and message in ended.stderr and ended.stderr.count("\n") == 1


def test_slurm_scripts_explain_how_to_submit_them(environment, slurm, tmp_path):
    home = {"SLURM_SUBMIT_DIR": str(LAUNCH.parent)}
    for script in ("slurm.sh", "slurm_container.sh image.sif"):
        name, *image = script.split()
        assert f"sbatch launch/{name}" in run(name, *image, env=environment | home).stderr
        elsewhere = run(name, *image, env=slurm | {"SLURM_SUBMIT_DIR": str(tmp_path)})
        assert "repository's root" in elsewhere.stderr
    assert "neither pyxis" in run("slurm_container.sh", "image.sif", env=slurm).stderr
    assert "no image given" in run("slurm_container.sh", env=slurm).stderr


def test_elastic_script_passes_the_hosts_and_limits_to_horovodrun(environment, tmp_path):
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
        f"-np 3 --min-np 2 --host-discovery-script bash\\ ROOT/launch/discover_hosts.sh\\ {tmp_path}/hosts\\ 22",
        "--blacklist-cooldown-range 10 60 --gloo-timeout-seconds 30 --network-interfaces eth0",
        "-m hvd_adam.train --elastic --lr 1",
    ):
        assert part in shown
    shown = dry_run(
        "elastic.sh", "--discovery", "echo a:2; echo b", "--cooldown", 5, 9, "--max-np", 8, env=environment
    )
    script = "--host-discovery-script echo\\ a:2\\;\\ echo\\ b"
    assert f"-np 3 --min-np 1 --max-np 8 {script} --slots-per-host 1 " in shown
    assert "--blacklist-cooldown-range 5 9" in shown
    shown = dry_run("elastic.sh", "--discovery", "echo a:2; echo b", "--max-np", 2, env=environment)
    assert "-np 2 --min-np 1 --max-np 2 " in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-np 2", "no hosts given"),
        ("-np 2 -H a:2", "use --hostfile"),
        ("--min-np 0", "--min-np 0: must be a whole number"),
        (f"--max-np {10**19}", "must be a whole number from 1 to 999999"),
        (f"--discovery 'echo a:{10**19}'", f"prints {10**19} slots for the host a: use at most 999999"),
        ("--cooldown 5", "--cooldown 5: needs two whole numbers of seconds"),
        ("--cooldown 5 --discovery true", "--cooldown 5 --discovery: needs two whole numbers of seconds"),
        ("--cooldown", "--cooldown : needs two whole numbers"),
        ("--cooldown 10 7200 --discovery true", "--cooldown 10 7200: needs two whole numbers of seconds"),
        ("--cooldown 60 10 --discovery true", "with 1 <= MIN <= MAX <= 3600"),
        ("--discovery true", "no host is reachable"),
        ("-np 2 --min-np 3 --discovery true", "--min-np 3 is more than the 2 ranks"),
        ("--discovery true --hostfile /none", "no such readable file"),
        ("-np 2 --min-np 2 --max-np 1 --discovery true", "--max-np 1 is less than the 2 ranks to wait for (-np)"),
        ("-np 2 -i lo --discovery false", "the discovery command failed with exit code 1: false"),
        (
            "-np 2 -i lo --discovery 'echo a; echo a 2'",
            "prints 'a 2', which is not of the form HOST or HOST:SLOTS",
        ),
        ("-np 2 --discovery 'echo a:x'", "prints 'a:x', which is not of the form HOST or HOST:SLOTS"),
        ("--discovery 'echo a:2; echo b; echo a:1'", "prints the host a twice"),
    ],
)
def test_bad_options_of_the_elastic_script_get_one_line(arguments, message, environment):
    ended = run("elastic.sh", *shlex.split(arguments), env=environment)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_the_elastic_script_announces_that_horovodrun_waits_for_a_second_host(environment):
    environment |= {"HVD_ADAM_PYTHON": shutil.which("true")}  # instead of horovodrun
    one, two = ["-np", 2, "--discovery", "echo a:2"], ["-np", 2, "--discovery", "echo a:2; echo b:2"]
    assert "waiting for a second host" in run("elastic.sh", *one, env=environment).stderr
    for known in ([*one, "-i", "lo"], two):
        assert run("elastic.sh", *known, env=environment).stderr == ""


def test_the_elastic_script_announces_that_it_waits_for_slots(environment):
    environment |= {"HVD_ADAM_PYTHON": shutil.which("true")}  # instead of horovodrun
    for discovery, slots in (("echo localhost:1", 1), ("echo a; echo b:1", 2), ("true", 0)):
        ended = run("elastic.sh", "-np", 3, "-i", "lo", "--discovery", discovery, env=environment)
        assert ended.stderr == f"elastic.sh: waiting: the hosts have {slots} slot(s), -np needs 3\n"


def test_a_launcher_of_nohup_continues_when_the_terminal_closes():
    proxy = ROOT / "hvd_adam" / "launch" / "signal_proxy.py"
    command = ["nohup", sys.executable, "-I", proxy, "bash", "-c", "echo started; read -r code; exit $code"]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **streams) as running:
        assert running.stdout.readline() == "started\n"
        running.send_signal(signal.SIGHUP)
        running.communicate("7\n")
    assert running.returncode == 7


def test_unreachable_hosts_are_not_discovered(environment, tmp_path):
    with socket.create_server(("127.0.0.2", 0)) as server:
        (tmp_path / "hosts").write_text("# a comment\n127.0.0.2 slots=3\n127.0.0.3 slots=1\n\nlocalhost slots=2\n")
        found = run("discover_hosts.sh", tmp_path / "hosts", server.getsockname()[1], env=environment)
    assert sorted(found.stdout.splitlines()) == ["127.0.0.2:3", "localhost:2"]
    (tmp_path / "hosts").write_text("localhost slots=1\n" * 2)
    assert run("discover_hosts.sh", tmp_path / "hosts", env=environment).stdout == "localhost:2\n"
    (tmp_path / "hosts").write_text("a 2\n")
    assert "not of the form" in run("discover_hosts.sh", tmp_path / "hosts", env=environment).stderr


# --- CDPATH, symbolic links, spaces -------------------------------------------------------------------------

SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in [*LAUNCH.glob("*.sh"), ROOT / "tests" / "gpu" / "run.sh"])


@pytest.fixture(scope="module")
def folder_with_spaces(tmp_path_factory):
    """A copy of the scripts in a folder with spaces and quotes in its name."""
    root = tmp_path_factory.mktemp("copy") / "my project's  clone"
    for name in ("launch", "hvd_adam/build_horovod", "hvd_adam/launch", "tests/gpu"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("call", ["CDPATH", "symbolic link", "spaces"])
def test_script_finds_its_files_with(call, script, environment, folder_with_spaces, tmp_path):
    command, folder = script, ROOT
    if call == "CDPATH":
        environment |= {"CDPATH": f".:{ROOT}:{LAUNCH}"}
    elif call == "symbolic link":
        (tmp_path / "link").symlink_to(ROOT / script)
        command = str(tmp_path / "link")
    else:
        folder = folder_with_spaces
    done = subprocess.run([command, "--help"], cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    usage = {"launch/build_horovod.sh": "python -m hvd_adam.build_horovod"}.get(script, script)
    assert usage in done.stdout


def test_command_line_of_the_launcher_keeps_spaces_and_ignores_cdpath(environment, folder_with_spaces, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    environment |= {"CDPATH": f".:{tmp_path}", "HVD_ADAM_PYTHON": "bin/python"}
    script = folder_with_spaces / "launch" / "mpirun.sh"
    command = [script, "-np", "1", "--dry-run"]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    words = shlex.split(shown.stdout)
    proxy = str(folder_with_spaces / "hvd_adam" / "launch" / "signal_proxy.py")
    assert words[:4] == [str(tmp_path / "bin" / "python"), "-I", proxy, "mpirun"]


DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*"), ROOT / ".ci" / "run"]
DOCUMENTED_SCRIPTS = sorted(
    {
        name
        for document in DOCUMENTS
        if document.is_file()
        for name in re.findall(r"(?<![\w./-])(?:launch|docker|tests)/[\w/]+\.sh\b", document.read_text())
    }
)


def test_documents_call_scripts():
    assert {"launch/quickstart.sh", "launch/elastic.sh", "launch/mpirun.sh"} <= set(DOCUMENTED_SCRIPTS)


@pytest.mark.parametrize("script", DOCUMENTED_SCRIPTS)
def test_documented_script_is_executable(script):
    assert os.access(ROOT / script, os.X_OK)
    assert (ROOT / script).read_text().startswith("#!")
