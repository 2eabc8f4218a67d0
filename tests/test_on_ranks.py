"""`@on_ranks` itself: parameters reach the ranks, and each outcome is reported separately.

Hazards: a failure that hides the tests after it, or fails them; a skip that counts as a pass; a parameter that
reaches another test; ranks that are launched for each parameter; a test that the selection excludes but that runs.
"""

import re

import pytest
from helpers.on_ranks import TESTS, on_ranks

pytest_plugins = "pytester"

EXAMPLE = """
import os
from pathlib import Path

import pytest
from helpers.on_ranks import on_ranks

Path(os.environ["PLACE"], f"launch-{os.environ.get('HOROVOD_RANK')}-{os.getpid()}").touch()


@on_ranks(2)
@pytest.mark.parametrize("value", [1, 2, pytest.param(3, id="three"), {"any": object}])
def test_value(cluster, value):
    assert value != 2 or cluster.rank == 0


@pytest.mark.parametrize(("a", "b"), [("x", 1), ("y", 2)])
@pytest.mark.parametrize("c", [True, False])
@on_ranks(2)
def test_stacked(cluster, a, b, c):
    assert (a, b) in (("x", 1), ("y", 2)) and c in (True, False)


@on_ranks(1, 2)
def test_sizes(cluster):
    if cluster.size == 1:
        pytest.skip("needs two")


@on_ranks(2)
@pytest.mark.skipif(True, reason="here")
def test_skipped_by_its_mark(cluster):
    raise AssertionError


@on_ranks(2)
def test_last(cluster):
    assert cluster.size == 2
"""


@pytest.mark.multirank
def test_every_parameter_is_reported_separately_and_only_a_failure_needs_a_new_launch(pytester, monkeypatch):
    place = pytester.mkdir("launches")
    monkeypatch.setenv("PLACE", str(place))
    pytester.makepyfile(test_example=EXAMPLE)
    monkeypatch.setenv("PYTHONPATH", f"{pytester.path}:{TESTS}:{TESTS.parent}")
    pytester.makeini("[pytest]\nmarkers =\n    multirank: starts ranks")
    done = pytester.runpytest_subprocess("-v", "-p", "no:cacheprovider")
    done.assert_outcomes(passed=3 + 4 + 1 + 1, failed=1, skipped=2)
    outcomes = dict(re.findall(r"::(\S.*?) (PASSED|FAILED|SKIPPED)", done.stdout.str()))
    assert outcomes["test_value[2]"] == "FAILED"
    assert outcomes["test_value[three]"] == outcomes["test_stacked[False-y-2]"] == "PASSED"
    assert outcomes["test_sizes[1 rank]"] == "SKIPPED"
    assert outcomes["test_sizes[2 ranks]"] == outcomes["test_last"] == "PASSED"
    done.stdout.fnmatch_lines(["*on rank 1:*", "*assert value != 2*"])
    # pytest itself; two ranks, and two more after the failure; one rank.
    assert len(list(place.iterdir())) == 1 + 2 + 2 + 1


@on_ranks(0)
@pytest.mark.parametrize("exact", [1.5, float("inf")])
def test_one_process_needs_no_launcher(cluster, exact):
    assert cluster.size == 1
    assert exact in (1.5, float("inf"))
