"""The examples run on one and two ranks, with the results that their pages promise.

Hazards: a script that the documents call a change of five lines, but is not; one that ends elsewhere after it was
stopped; workers of a DataLoader that a launcher's rank cannot start.
"""

import difflib
import re
import shutil

import pytest
import torch
from helpers.on_ranks import launch
from helpers.training_runs import ROOT

from hvd_adam.checkpoint import storage

EXAMPLES = ROOT / "examples"
LONGEST = 80  # lines


def run(name, folder, *, ranks, controller="gloo", arguments=()):
    """Runs an example in a folder and returns what it prints."""
    folder.mkdir(exist_ok=True)
    done = launch([str(EXAMPLES / name), *arguments], ranks, controller, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_examples_are_short():
    assert not [path.name for path in EXAMPLES.glob("*.py") if len(path.read_text().splitlines()) >= LONGEST]


def test_a_plain_script_needs_five_changed_lines_which_the_page_shows():
    plain, changed = (EXAMPLES.joinpath(name).read_text().splitlines() for name in ("plain.py", "from_plain.py"))
    difference = [line[0] + line[2:] for line in difflib.ndiff(plain, changed) if line[0] in "+-" and line[2:]]
    assert sum(line.startswith("+") for line in difference) == 5
    shown = re.search(r"```text\n(-.*?)```", ROOT.joinpath("docs/data.md").read_text(), re.DOTALL)[1]
    assert sorted(shown.splitlines()) == sorted(difference)


@pytest.mark.multirank
def test_a_loop_resumes_in_the_middle_of_an_epoch_bit_for_bit(tmp_path):
    stopped, never, alone = tmp_path / "stopped", tmp_path / "never", tmp_path / "alone"
    printed = run("resume_mid_epoch.py", stopped, ranks=2)
    assert "rank 1 saved after update 70" in printed
    shutil.copytree(stopped, alone)
    printed = run("resume_mid_epoch.py", stopped, ranks=2, controller="mpi")
    assert "rank 1 starts after update 70, in epoch 2" in printed
    printed += run("resume_mid_epoch.py", never, ranks=2, arguments=["never"])
    weights = re.findall(r"saved after update 120: weights (\w{8})", printed)
    assert len(weights) == 4 and len({*weights}) == 1

    run("resume_mid_epoch.py", alone, ranks=0)  # continues a run of two ranks
    on_one, on_two = (storage.load(folder / "runs/resume_mid_epoch") for folder in (alone, never))
    assert on_one["sampler"] == on_two["sampler"]
    assert storage.resolve(alone / "runs/resume_mid_epoch").name == "step-00000120"
    torch.testing.assert_close(on_one["model"], on_two["model"], rtol=1e-3, atol=1e-4)


@pytest.mark.multirank
def test_ranks_with_files_of_different_lengths_make_equally_many_updates(tmp_path):
    for controller, samples in (("", [1440]), ("mpi", [1300, 140])):  # in the ranks' files
        printed = run("iterable.py", tmp_path, ranks=len(controller and samples), controller=controller)
        lines = re.findall(r"epoch \d, rank \d: \d+ samples in \d+ updates", printed)
        updates = -(-max(samples) // 16)
        assert sorted(lines) == [
            f"epoch {epoch}, rank {rank}: {number} samples in {updates} updates"
            for epoch in range(4)
            for rank, number in enumerate(samples)
        ]
