"""Marks tests by what they start, and orders the test files.

The longest files are first, so that all processes of a parallel run end at about the same time. Tests on real
ranks (`@on_ranks`) carry their mark already, as do those in `tests/gpu`.
"""

import ast
import os
import re
from functools import cache
from pathlib import Path

import pytest
from helpers import on_ranks
from hypothesis import settings

# Several tests run at a time. Threads of PyTorch that wait actively for each other would take the cores from the
# threads that they wait for. OpenMP reads this when torch is imported, here and in the processes of the tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

LONGEST = (
    "test_images test_readme test_slurm test_resume test_train test_doctor test_triton_kernel test_own_code "
    "test_failures test_bench test_predict test_elastic test_launch test_idioms test_export test_iterable "
    "test_islands test_coded_allreduce test_hosts test_zero_equivalence test_any_loop_more "
    "test_advise_branches test_noise_scale test_crash_matrix test_examples test_kernels test_zero_state "
    "test_larger_examples test_guard test_collective_timeout test_cluster test_finished_runs test_data_change "
    "test_streams test_image_folder test_slips test_coded_sharded test_updates_behind test_bench_wire "
    "test_distribute_average test_automatic_compression test_any_loop test_torchvision_operators test_fuzz "
    "test_scores test_setup test_any_loop_models test_state_formats_on_ranks test_adam test_docs test_tune "
    "test_forked_python test_slow_ranks test_compare test_local_steps test_on_ranks test_run_folder "
    "test_zero_clipping test_nonfinite test_state_formats test_compression_quality test_distribute_deferred"
).split()

MARK_OF_MODULE = {
    "test_crash_matrix": "multirank",
    "test_disks": "multirank",
    "test_hosts": "cluster",
    "test_images": "image",
    "test_readme": "multirank",
    "test_resume": "multirank",
    "test_run_folder": "multirank",
    "test_slurm": "slurm",
    "test_train": "multirank",
}
MARK_OF_FIXTURE = {"containers": "image", "hosts": "cluster", "image": "image", "odd_hosts": "cluster"}
MARK_OF_SKIP_REASON = {"no hosts": "cluster", "no Slurm": "slurm", "no image": "image"}
# What the body of a test that starts ranks or compilations contains: `train(..., ranks=2)`, `launch(...)`,
# "mpirun", "-np", a benchmark other than that of the optimizer alone, `finish(start(...))` of test_kernels.
STARTS_RANKS = re.compile(
    r"\branks=(?!0\b)|\"ranks\"|\blaunch\(|horovodrun|mpirun|\"-np\"|\"--launcher\"|"
    r"(?<!\.)\bfinish\(|bench_json\(\"(?!adam)"
)
# Modules whose tests name launchers without starting them: command lines that are only printed or parsed.
ONLY_NAMES_LAUNCHERS = {"test_mpijob", "test_setup"}


def pytest_configure(config: pytest.Config) -> None:
    """Draws fewer cases in a run that marks select: the quick tests; all tests together draw all of them."""
    settings.register_profile("all", deadline=None)  # no test depends on the speed of the machine
    settings.register_profile("quick", deadline=None, max_examples=8)
    settings.load_profile("quick" if config.option.markexpr else "all")


@pytest.hookimpl(tryfirst=True)  # before pytest evaluates -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in _marks(item):
            item.add_marker(mark)
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))  # stable: the order within a file is kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lets `launch` refuse to start ranks for a test without the mark."""
    on_ranks.may_start_ranks = any(item.get_closest_marker(mark) for mark in on_ranks.MARKS_OF_LAUNCHES)


def _marks(item: pytest.Item) -> set[str]:
    """Returns the marks that a test's module, fixtures, conditions and body imply."""
    module = item.path.stem
    marks = {MARK_OF_MODULE[module]} if module in MARK_OF_MODULE else set()
    marks |= {MARK_OF_FIXTURE[name] for name in getattr(item, "fixturenames", ()) if name in MARK_OF_FIXTURE}
    for condition in item.iter_markers("skipif"):
        reason = condition.kwargs.get("reason", "")
        marks |= {mark for start, mark in MARK_OF_SKIP_REASON.items() if reason.startswith(start)}
    name = getattr(item, "originalname", "")
    runs_on_ranks = hasattr(getattr(item, "function", None), "body")  # and has its mark
    if module not in ONLY_NAMES_LAUNCHERS and not runs_on_ranks and name in _start_ranks(item.path):
        marks.add("multirank")
    return marks


@cache
def _start_ranks(path: Path) -> set[str]:
    """Returns the functions of a module that start ranks, directly or through its other functions and fixtures."""
    source = path.read_text()
    lines = source.encode().splitlines()  # ast.get_source_segment would split them for every statement
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    uses = {
        name: {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        | {argument.arg for argument in function.args.args}
        for name, function in functions.items()
    }
    found = {
        name
        for name, function in functions.items()
        if any(STARTS_RANKS.search(_segment(lines, part)) for part in function.body)
    }
    while more := {name for name in functions if uses[name] & found} - found:
        found |= more
    return found


def _segment(lines: list[bytes], node: ast.stmt) -> str:
    """Returns the source of a statement."""
    *whole, last = lines[node.lineno - 1 : node.end_lineno]
    return b"\n".join([*whole, last[: node.end_col_offset]]).decode()
