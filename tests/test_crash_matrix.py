"""Two trials of the crash matrix: runs that are killed at random end with the uninterrupted run's result.

crash_matrix.py is the command for more trials. Hazards: a checkpoint that is lost, or partly written and loaded;
two jobs in one folder, the second started while ranks of the first still run; other weights or metrics.
"""

from crash_matrix import run
from helpers.forked_python import forked_python

SEED = 1823  # draws the same launch options for both trials, with sharded 8-bit state and int4, and three kills


def test_runs_killed_at_random_end_as_uninterrupted_ones(tmp_path, capfd):
    assert run(trials=2, seed=SEED, jobs=2, place=tmp_path, python=forked_python()) == 0, capfd.readouterr().out
