"""`@on_ranks(2)`: the body of a test runs on real ranks, started by the real launcher.

All bodies of a module that ask for the same ranks run one after another in one launch, since starting ranks
takes seconds. A body gets this rank's `Cluster`; what it raises fails the test, with the rank named, and
ends its ranks: the bodies after it get new ones.
"""

import faulthandler
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
LAUNCH_SECONDS = 280

Key = tuple[str, int, str, tuple[tuple[str, str], ...]]
_bodies: dict[Key, list[Callable]] = defaultdict(list)


def on_ranks(ranks: int, controller: str = "gloo", **environ: str) -> Callable[[Callable], Callable]:
    """Makes a test of a body that takes a `Cluster`, run on so many ranks under `horovodrun --controller`.

    The controller "elastic" is Gloo with a launcher that lets ranks start anew, see `context.restart`.

    0 ranks: one process without a launcher. Never the process of the tests itself: once MPI has started there,
    no mpirun starts from it any more. `environ` is added to their environment.
    """

    def decorate(body: Callable) -> Callable:
        key = (body.__module__, ranks, controller, tuple(environ.items()))
        _bodies[key].append(body)

        def test() -> None:
            failures = _outcomes(key)[body.__name__]
            assert not failures, "\n".join(failures)

        # Not functools.wraps: pytest would look through it and take the body's parameter for a fixture.
        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        return test

    return decorate


def launch(arguments: list[str], ranks: int, controller: str, **options: object) -> subprocess.CompletedProcess:
    """Runs `python ARGUMENTS` on so many ranks of this machine, without a launcher for 0; output as text."""
    launcher = []
    if ranks:
        if controller == "elastic":
            horovodrun = [sys.executable, "-m", "hvd_adam.launch.horovodrun"]
            # With an interface: to find one itself it waits for a second host.
            how = ["--min-np", str(ranks), "--network-interfaces", "lo"]
            how += ["--host-discovery-script", f"echo localhost:{ranks}"]
        else:
            horovodrun, how = [str(Path(sys.executable).with_name("horovodrun"))], [f"--{controller}"]
        launcher = [*horovodrun, "-np", str(ranks), *how]
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environ.update(options.pop("env", {}))
    return subprocess.run(
        [*launcher, sys.executable, *arguments],
        env=environ,
        capture_output=True,
        text=True,
        timeout=options.pop("timeout", LAUNCH_SECONDS),
        **options,
    )


@cache
def _outcomes(key: Key) -> dict[str, list[str]]:
    """What went wrong in each body, by its name: nothing, or a line for each rank on which it failed."""
    module, ranks, controller, environ = key
    outcomes: dict[str, list[str]] = {}
    while remaining := [body.__name__ for body in _bodies[key] if body.__name__ not in outcomes]:
        with tempfile.TemporaryDirectory() as folder:
            done = launch([__file__, module, folder, *remaining], ranks, controller, env=dict(environ))
            reports = [_read(Path(folder, f"{rank}.jsonl")) for rank in range(max(1, ranks))]
        for name in remaining:
            failed = {rank: report[name] for rank, report in enumerate(reports) if report.get(name)}
            failures = [f"on rank {rank}:\n{failure}" for rank, failure in failed.items()]
            if not failures and not all(name in report for report in reports):
                failures = [f"the ranks ended before its end:\n{done.stdout}\n{done.stderr}"]
            outcomes[name] = failures
            if failures:
                break  # it took its ranks with it: the others get new ones
    return outcomes


def _read(report: Path) -> dict[str, str]:
    lines = report.read_text().splitlines() if report.exists() else []
    return dict(json.loads(line) for line in lines)


def _work(module: str, folder: str, *names: str) -> None:
    """What every rank does: runs the bodies in order and writes down how each went."""
    sys.path[:0] = [str(TESTS), str(TESTS / "gpu")]
    import on_ranks  # this file, under the name by which test modules import it
    import torch

    from hvd_adam import init

    # Where a body hangs: said, with every thread's stack, before the launch is given up.
    faulthandler.dump_traceback_later(LAUNCH_SECONDS - 30, exit=True)
    cluster = init(os.environ.get("HVD_ADAM_TEST_DEVICE", "auto"))
    importlib.import_module(module)
    bodies = {body.__name__: body for key in on_ranks._bodies for body in on_ranks._bodies[key]}
    with Path(folder, f"{cluster.rank}.jsonl").open("w", buffering=1) as report:
        for name in names:
            torch.manual_seed(0)
            failure = ""
            try:
                bodies[name](cluster)
            except BaseException:
                failure = traceback.format_exc()
            report.write(json.dumps([name, failure]) + "\n")
            if failure:
                os._exit(1)  # the other ranks may wait for this one


if __name__ == "__main__":
    _work(*sys.argv[1:])
