"""The larger scripts of examples/, and from_plain.py, on one rank and on two.

Hazards: a rank that trains on the samples, the noise or the initial weights of another rank; ranks that end with
different weights; two ranks with the same dropout; a batch that counts twice; a frozen body that changes, or a
thawed one that does not; a launcher under which a script does not run; every rank printing the same line.
"""

import json
import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers.on_ranks import LAUNCH_SECONDS, launch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
RUNNER = ROOT / "tests" / "helpers" / "run_examples.py"

# Adam's update lr·m/(√v + ε) changes by at most lr·δ/ε where the gradient changes by δ. The gradients are means of
# some thousand terms below 1. In float64 another order of the sums changes them by less than 100 units in the last
# place, δ = 1e-14. With ε = 1e-8, lr ≤ 3e-3 and at most 14 updates, weights change by 14·3e-3·1e-14/1e-8 = 4e-8. A
# sample that is missing or counted twice changes some weights by about lr.
TOLERANCE = 1e-7

ONE_RANK = "transformer gan gan_together finetune huggingface from_plain".split()
GLOO = "transformer compiled gan frozen huggingface from_plain".split()
MPI = "transformer gan_together finetune huggingface".split()
ON_TWO_RANKS = [
    pytest.param(
        controller,
        name,
        marks=pytest.mark.skipif(
            name == "huggingface" and find_spec("transformers") is None, reason="transformers is not installed"
        ),
    )
    for controller, names in (("gloo", GLOO), ("mpi", MPI))
    for name in names
]


def run_of(name: str, ranks: int, start: str) -> tuple[str, list[str], str]:
    """Returns script, options and default dtype of a run; `start` is the run folder for `finetune.py`."""
    images, sequences = f"--batch-size {240 // ranks}", f"--batch-size {8 // ranks}"
    script, options, dtype = {
        "transformer": ("transformer.py", f"--steps 3 {sequences} --dropout 0", "float64"),
        # In bfloat16: autocast leaves float64 unchanged.
        "compiled": ("transformer.py", f"--steps 3 {sequences} --compile eager", "float32"),
        "gan": ("gan.py", f"--epochs 2 {images}", "float64"),
        "gan_together": ("gan.py", f"--epochs 2 {images} --together", "float64"),
        "frozen": ("finetune.py", f"{start} --epochs 1 {images}", "float64"),
        "finetune": ("finetune.py", f"{start} --epochs 2 {images}", "float64"),
        "huggingface": ("huggingface.py", f"--epochs 1 {images} --dropout 0", "float64"),
        "from_plain": ("from_plain.py", "", "float32"),
    }[name]
    return script, options.split(), dtype


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A function that returns what each rank of a job has left, by the name of the run."""
    folder = tmp_path_factory.mktemp("one")

    @cache
    def results(controller: str) -> dict[str, list[dict]]:
        own, ranks = (folder, 1) if controller == "none" else (tmp_path_factory.mktemp(controller), 2)
        names = {"none": ONE_RANK, "gloo": GLOO, "mpi": MPI}[controller]
        names = [name for name in names if name != "huggingface" or find_spec("transformers")]
        runs = {name: run_of(name, ranks, str(folder / "start")) for name in names}
        (own / "runs.json").write_text(json.dumps(runs))
        if controller == "mpi":  # with a script of launch/
            command = [ROOT / "launch/horovodrun.sh", "-np", "2", "--mpi", "--module", RUNNER.stem, "--", own]
            environ = {**os.environ, "HVD_ADAM_VENV": str(Path(sys.executable).parents[1])}
            environ["PYTHONPATH"] = os.pathsep.join([str(RUNNER.parent), os.environ.get("PYTHONPATH", "")])
            options = {"capture_output": True, "text": True, "timeout": LAUNCH_SECONDS}
            done = subprocess.run(command, cwd=own, env=environ, **options)
        else:
            arguments = [str(RUNNER), str(own)] + ([str(own / "start")] if ranks == 1 else [])
            done = launch(arguments, ranks=0 if ranks == 1 else 2, controller=controller, cwd=own)
        assert done.returncode == 0, done.stdout + done.stderr
        return {name: [torch.load(own / f"{name}-{rank}.pt") for rank in range(ranks)] for name in names}

    results("none")  # first: the others start from what it has trained
    return results


@pytest.fixture(scope="module")
def start(results, tmp_path_factory):
    """The weights that `finetune.py` starts from."""
    [path] = tmp_path_factory.getbasetemp().glob("one?/start/checkpoints/step-*/state.pt")
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize(
    ("controller", "name"), [case for case in ON_TWO_RANKS if case.values[1] in {*ONE_RANK} - {"from_plain"}]
)
def test_two_ranks_train_as_one_with_twice_the_batch(results, controller, name):
    [expected] = results("none")[name]
    found = results(controller)[name][0]
    for module, tensors in expected["modules"].items():
        torch.testing.assert_close(found["modules"][module], tensors, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("controller", "name"), ON_TWO_RANKS)
def test_ranks_end_with_identical_weights_and_only_rank_0_prints(results, controller, name):
    first, second = results(controller)[name]
    for module, tensors in first["modules"].items():
        torch.testing.assert_close(second["modules"][module], tensors, rtol=0, atol=0)
    assert first["output"]
    assert not second["output"]


@pytest.mark.parametrize(
    ("controller", "name"), [case for case in ON_TWO_RANKS if case.values[1] in ("compiled", "huggingface")]
)
def test_dropout_differs_between_ranks(results, controller, name):
    first, second = results(controller)[name]
    assert not torch.equal(first["random"], second["random"])


@pytest.mark.parametrize("name", ["transformer", "compiled"])
def test_the_language_model_learns_and_samples_a_line(results, name):
    first, last, sample = results("gloo")[name][0]["output"].splitlines()
    losses = [float(re.search(r"loss ([\d.]+)", line)[1]) for line in (first, last)]
    assert losses[1] < losses[0]
    assert len(sample.removeprefix("sample: ")) == 80


def test_fine_tuning_trains_the_body_after_the_first_epoch_and_no_statistics(results, start):
    frozen = results("gloo")["frozen"][0]["modules"]["model"]
    tuned = results("mpi")["finetune"][0]["modules"]["model"]
    body = [name for name in start if not name.startswith("fc.")]
    for name in body:
        assert torch.equal(frozen[name].to(start[name].dtype), start[name]), name
    changed = {name for name in body if not torch.equal(tuned[name].to(start[name].dtype), start[name])}
    assert changed == {name for name in body if "running" not in name and "num_batches" not in name}


def test_the_script_for_one_process_ends_on_two_ranks_where_it_does_on_one(results):
    outputs = [results(controller)["from_plain"][0]["output"] for controller in ("none", "gloo")]
    printed = [re.fullmatch(r"test accuracy (\S+), loss (\d\.\d+)\n", output).groups() for output in outputs]
    (accuracy, loss), (other_accuracy, other_loss) = [map(float, numbers) for numbers in printed]
    assert accuracy > 0.85
    # 300 updates differ by rounding: at most one of 357 images is on the other side.
    assert other_accuracy == pytest.approx(accuracy, abs=0.0035)
    assert other_loss == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("name", "transformer huggingface finetune gan".split())
def test_each_example_is_short_and_begins_with_its_launch_line(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) < 80
    assert re.match(rf'""".*: horovodrun -np 2 python {name}\.py\b', text)


def test_the_page_of_the_examples_lists_each_script():
    page = (ROOT / "docs" / "examples.md").read_text()
    assert {path.name for path in EXAMPLES.glob("*.py")} <= set(re.findall(r"`(\w+\.py)`", page))
