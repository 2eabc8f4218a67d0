"""A few trials of the crash matrix: runs killed at random end where an undisturbed one ends.

Hazards: those of crash_matrix.py, the command for more trials: a checkpoint that is lost, or half written and
loaded; two jobs in one folder, the second started while ranks of the first live on; other weights or metrics.
"""

from crash_matrix import run

SEED = 30  # which draws one way to start a run for both, and three kills


def test_runs_killed_at_random_end_as_undisturbed_ones(tmp_path, capfd):
    assert run(trials=2, seed=SEED, jobs=2, place=tmp_path) == 0, capfd.readouterr().out
