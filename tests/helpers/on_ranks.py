"""`@on_ranks(2)`: a test that runs on real ranks, started by the real launcher.

    @on_ranks(2)
    @pytest.mark.parametrize("strategy", ["allreduce", "sharded"])
    def test_something(cluster, strategy): ...

Starting ranks takes seconds. All selected tests of a module that need the same number of ranks, controller and
environment therefore run one after another in one launch, every parameter included; pytest reports each of them
separately. A test receives the `Cluster` of its rank and its parameters, but no fixtures. It may call
`pytest.skip`, on all ranks. An exception on any rank fails the test and stops its ranks; the tests after it run
on new ranks.
"""

import faulthandler
import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from hvd_adam.loading import loading_modules

TESTS = Path(__file__).parents[1]
LAUNCH_SECONDS = int(os.environ.get("HVD_ADAM_LAUNCH_SECONDS", "280"))
MARKS_OF_LAUNCHES = ("multirank", "cluster", "slurm", "image", "gpu")

# Whether the running test has one of these marks; conftest.py sets it. Always true outside pytest.
may_start_ranks = True


class Launch(NamedTuple):
    """What tests must share to run in one launch."""

    module: str
    ranks: int
    controller: str
    environ: tuple[tuple[str, str], ...]


class Case(NamedTuple):
    """One test with one set of parameters.

    Attributes:
        name: as pytest reports it.
        function: the name of the test function in its module.
        indices: for each parameter its index in the values of `pytest.mark.parametrize`. The ranks look the
            values up in the module, so that values need not be pickled.
    """

    name: str
    function: str
    indices: dict[str, int]


class Outcome(NamedTuple):
    """How a test ended: `status` is "passed", "skipped" or "failed"."""

    status: str
    text: str = ""


_outcomes: dict[Launch, dict[str, Outcome]] = {}


def on_ranks(*ranks: int | str, controller: str = "gloo", **environ: str) -> Callable[[Callable], Callable]:
    """Runs a test that takes a `Cluster` on this many ranks, under `horovodrun --CONTROLLER`.

    Args:
        ranks: number of ranks; with several numbers the test is parametrized by them. 0 is one process without a
            launcher, which is never the process of pytest: after MPI has been initialized there, no mpirun starts
            from it. The controller may follow as the last positional argument.
        controller: "gloo", "mpi", or "elastic": Gloo with an elastic launcher, which lets ranks restart
            (`context.restart`).
        environ: added to the environment of the ranks.
    """
    if isinstance(ranks[-1], str):
        *ranks, controller = ranks

    def decorate(body: Callable) -> Callable:
        parameters = list(inspect.signature(body, follow_wrapped=False).parameters.values())[1:]
        names = [parameter.name for parameter in parameters]

        def test(request: pytest.FixtureRequest, **_: object) -> None:
            launch_of_test, case = _locate(request.node)
            outcome = _outcomes.get(launch_of_test, {}).get(case.name)
            if outcome is None:
                cases = _selected(request.session, launch_of_test)
                _outcomes.setdefault(launch_of_test, {}).update(_run(launch_of_test, cases))
                outcome = _outcomes[launch_of_test][case.name]
            if outcome.status == "skipped":
                pytest.skip(outcome.text)
            if outcome.status == "failed":
                pytest.fail(outcome.text, pytrace=False)

        # Not functools.wraps: pytest would follow __wrapped__ and take `cluster` for a fixture.
        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        wanted = [inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD), *parameters]
        if len(ranks) > 1 and "ranks" not in names:
            wanted.append(inspect.Parameter("ranks", inspect.Parameter.POSITIONAL_OR_KEYWORD))
        test.__signature__ = inspect.Signature(wanted)
        test.body, test.parameters = body, names
        test.launch_options = (ranks[0], controller, tuple(environ.items()))
        test.pytestmark = list(getattr(body, "pytestmark", []))
        if len(ranks) > 1:
            ids = [f"{number} rank{'s' * (number != 1)}" for number in ranks]
            test = pytest.mark.parametrize("ranks", ranks, ids=ids)(test)
        return pytest.mark.multirank(test) if max(ranks) else test

    return decorate


def launch(
    arguments: list[str], ranks: int, controller: str, *, hosts: str = "", forked: bool = True, **options: object
) -> subprocess.CompletedProcess:
    """Runs `python ARGUMENTS` on this many local ranks, for 0 without a launcher; captures the output as text.

    Args:
        arguments: what Python runs, and its arguments.
        ranks: number of ranks, or 0.
        controller: as for `on_ranks`; not "elastic" with `hosts`.
        hosts: of the ranks, as for `horovodrun -H`; Horovod takes names of this machine for different hosts.
        forked: the ranks are forks of a process that has imported PyTorch (`helpers.forked_python`).
        options: of `subprocess.run`; `env` is added to the environment.
    """
    from helpers.forked_python import forked_python  # here: the ranks import this file without the package

    launcher = []
    if ranks:
        assert may_start_ranks, f"a test that starts ranks needs one of the marks {MARKS_OF_LAUNCHES}"
        if controller == "elastic":
            horovodrun = [sys.executable, "-m", "hvd_adam.launch.horovodrun"]
            # The interface is named because Horovod waits for a second host to find one.
            how = ["--min-np", str(ranks), "--network-interfaces", "lo"]
            how += ["--host-discovery-script", f"echo localhost:{ranks}"]
        else:
            horovodrun, how = [sys.executable, str(Path(__file__).with_name("horovodrun.py"))], [f"--{controller}"]
        launcher = [*horovodrun, "-np", str(ranks), *how, *(["-H", hosts] if hosts else [])]
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environ.update(options.pop("env", {}))
    return subprocess.run(
        [*launcher, forked_python() if forked else sys.executable, *arguments],
        env=environ,
        capture_output=True,
        text=True,
        timeout=options.pop("timeout", LAUNCH_SECONDS),
        **options,
    )


def _locate(item: pytest.Function) -> tuple[Launch, Case]:
    """Returns the launch that a collected test belongs to, and its case."""
    ranks, controller, environ = item.function.launch_options
    callspec = getattr(item, "callspec", None)
    params = callspec.params if callspec else {}
    if missing := set(item.function.parameters) - params.keys():
        pytest.fail(f"{item.name}: tests on ranks have parameters, not fixtures: {sorted(missing)}", pytrace=False)
    indices = {}
    for names, sets in _parametrizations(item.function):
        for index, values in enumerate(sets):
            if all(value is params[name] for name, value in zip(names, values, strict=True)):
                indices |= dict.fromkeys(names, index)
                break
    indices = {name: indices[name] for name in item.function.parameters}
    return Launch(item.module.__name__, params.get("ranks", ranks), controller, environ), Case(
        item.name, item.function.__name__, indices
    )


def _selected(session: pytest.Session, wanted: Launch) -> list[Case]:
    """Returns the cases of a launch that this pytest session has selected and does not skip."""
    cases = []
    for item in session.items:
        if not hasattr(getattr(item, "function", None), "launch_options") or _skipped_by_mark(item):
            continue
        found, case = _locate(item)
        if found == wanted:
            cases.append(case)
    return cases


def _skipped_by_mark(item: pytest.Item) -> bool:
    return any(mark.name == "skip" or any(mark.args) for mark in item.iter_markers() if "skip" in mark.name)


def _run(wanted: Launch, cases: list[Case]) -> dict[str, Outcome]:
    """Runs the cases, with a new launch after each failure, and returns the outcome of each by its name."""
    outcomes: dict[str, Outcome] = {}
    while remaining := [case for case in cases if case.name not in outcomes]:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "cases.json").write_text(json.dumps(remaining))
            arguments = [__file__, wanted.module, folder]
            done = launch(arguments, wanted.ranks, wanted.controller, env=dict(wanted.environ))
            reports = [_read(Path(folder, f"{rank}.jsonl")) for rank in range(max(1, wanted.ranks))]
        for case in remaining:
            outcomes[case.name] = _combine([report.get(case.name) for report in reports], done)
            if outcomes[case.name].status == "failed":
                break  # its ranks have stopped: the next cases need new ones
    return outcomes


def _combine(of_ranks: list[Outcome | None], done: subprocess.CompletedProcess) -> Outcome:
    """Returns the outcome of a case from those on its ranks, None where a rank ended before it finished."""
    failures = [f"on rank {rank}:\n{o.text}" for rank, o in enumerate(of_ranks) if o and o.status == "failed"]
    if not failures and None in of_ranks:
        failures = [f"the ranks ended before the test did:\n{done.stdout}\n{done.stderr}"]
    statuses = {outcome.status for outcome in of_ranks if outcome}
    if not failures and len(statuses) > 1:
        failures = [f"skipped on some ranks only: {[outcome.status for outcome in of_ranks if outcome]}"]
    return Outcome("failed", "\n".join(failures)) if failures else of_ranks[0]


def _read(report: Path) -> dict[str, Outcome]:
    """Returns the outcomes that a rank has written, by the case's name."""
    lines = report.read_text().splitlines() if report.exists() else []
    return {name: Outcome(status, text) for name, status, text in map(json.loads, lines)}


def _parametrizations(test: Callable) -> Iterator[tuple[list[str], list[Sequence]]]:
    """Yields the names and the sets of values of each `pytest.mark.parametrize` of a test."""
    for mark in test.pytestmark:
        if mark.name == "parametrize":
            names, sets = mark.args[:2]
            names = names.replace(",", " ").split() if isinstance(names, str) else list(names)
            marked = type(pytest.param())
            sets = [v.values if isinstance(v, marked) else v if len(names) > 1 else [v] for v in sets]
            yield names, sets


def _arguments(test: Callable, indices: dict[str, int]) -> dict[str, object]:
    """Returns the parameters of a case, looked up in the marks of its test."""
    return {
        name: sets[indices[name]][place]
        for names, sets in _parametrizations(test)
        for place, name in enumerate(names)
        if name in indices
    }


def _run_on_this_rank(module: str, folder: str) -> None:
    """Runs the cases in order on this rank and writes the outcome of each to `folder/RANK.jsonl`."""
    sys.path[:1] = [str(TESTS), str(TESTS / "gpu")]  # in place of this file's folder
    # A test that hangs ends with the stacks of all threads before pytest gives the launch up.
    faulthandler.dump_traceback_later(LAUNCH_SECONDS - 30, exit=True)
    with loading_modules():
        import torch

        from hvd_adam import init

        cluster = init(os.environ.get("HVD_ADAM_TEST_DEVICE", "auto"))
        tests = vars(importlib.import_module(module))
    with Path(folder, f"{cluster.rank}.jsonl").open("w", buffering=1) as report:
        for name, function, indices in json.loads(Path(folder, "cases.json").read_text()):
            torch.manual_seed(0)
            outcome = Outcome("passed")
            try:
                tests[function].body(cluster, **_arguments(tests[function], indices))
            except pytest.skip.Exception as skip:
                outcome = Outcome("skipped", str(skip))
            except BaseException:
                outcome = Outcome("failed", traceback.format_exc())
            report.write(json.dumps([name, *outcome]) + "\n")
            if outcome.status == "failed":
                os._exit(1)  # the other ranks may wait for this one


if __name__ == "__main__":
    _run_on_this_rank(*sys.argv[1:])
