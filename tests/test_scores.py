"""What an evaluation finds: counts by class, calibration, the most confident mistakes, and their text and JSON.

Hazards: a table that depends on the number of ranks or on the batches; a bin that takes a probability of its
neighbour; probabilities that are computed in bfloat16; outputs that are NaN and count as correct; a table of 1,000
classes that nobody can read, or that hides the worst class; a picture of another image than the one that was
classified; a picture and a description of different evaluations.
"""

import json
import warnings
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.forked_commands import ForkedCommands
from helpers.on_ranks import on_ranks
from helpers.own_code import write as write_own_code
from helpers.training_runs import events, one_line, succeeded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from hvd_adam.data import load
from hvd_adam.data.images import ImageData
from hvd_adam.data.loader import DeviceLoader
from hvd_adam.data.sampling import evaluation_share
from hvd_adam.distributed.context import Cluster
from hvd_adam.errors import UserError
from hvd_adam.training.objective import Objective
from hvd_adam.training.scores import mistakes_file, plots, scoring, tables
from hvd_adam.training.scores.calibration import BINS
from hvd_adam.training.scores.mistakes import LARGEST_SIDE, MOST_MISTAKES, Mistake
from hvd_adam.training.scores.scoring import score

CPU = torch.device("cpu")
ALONE = Cluster(0, 1, 0, 1, 0, 1, CPU, "none")
CROSS_ENTROPY = Objective(torch.float32, None, None, 0.0, {})


@dataclass
class Table:
    """A loader whose "images" hold the place of their outputs in a table, and a model that looks them up."""

    outputs: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    sample_shape: tuple[int, ...] = (1, 4, 4)
    name: str = "table"
    statistics = None
    device, dtype = CPU, torch.float32

    @property
    def data(self):
        return self

    def test_batches(self, batch_size, *, rank=0, size=1):
        mine = evaluation_share(len(self.labels), rank, size)
        for start in range(mine.start, mine.stop, batch_size):
            places = torch.arange(start, min(start + batch_size, mine.stop))
            images = places.float().view(-1, 1, 1, 1).expand(-1, *self.sample_shape)
            yield images, self.labels[places]

    def forward(self, images):
        return self.outputs[images[:, 0, 0, 0].long()]

    def score(self, cluster=ALONE, objective=CROSS_ENTROPY, **options):
        return score(self.forward, self, cluster, objective, **options)


def random_table(samples=300, classes=5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    outputs = torch.randn(samples, classes, generator=generator) * 2
    outputs[torch.arange(samples), labels] += 2.0
    outputs[1::7] = outputs[0]  # equal probabilities
    return Table(outputs.to(dtype), labels, tuple(f"class {n}" for n in range(classes)))


def expected_calibration(outputs, labels):
    """Returns the expected and maximum error, and the samples of each bin, in float64 as the paper has them."""
    logits = outputs.double().numpy()
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    confidence = (exponentials / exponentials.sum(axis=1, keepdims=True)).max(axis=1)
    correct = logits.argmax(axis=1) == labels.numpy()
    expected, maximum, sizes = 0.0, 0.0, []
    for m in range(1, BINS + 1):
        inside = (confidence > (m - 1) / BINS) & (confidence <= m / BINS)
        sizes.append(int(inside.sum()))
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            expected, maximum = expected + inside.mean() * gap, max(maximum, gap)
    return expected, maximum, confidence.mean(), sizes


# Counts and calibration.


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(1, 80), st.integers(0, 2**16), st.sampled_from([1, 7, 256]), st.booleans())
def test_counts_and_calibration_are_those_of_scikit_learn_and_numpy(classes, samples, seed, batch_size, is_half):
    table = random_table(samples, classes, seed, torch.bfloat16 if is_half else torch.float32)
    scores = table.score(batch_size=batch_size)
    predicted = table.outputs.argmax(dim=1)
    counts, numbers = scores.counts, range(classes)
    assert np.array_equal(counts.matrix(), confusion_matrix(table.labels, predicted, labels=numbers))
    oracle = precision_recall_fscore_support(table.labels, predicted, labels=numbers, zero_division=np.nan)
    for values, expected in zip((counts.precision, counts.recall, counts.f1, counts.support), oracle, strict=True):
        np.testing.assert_allclose(values, expected, rtol=1e-12)
    wrong = counts.matrix() * (1 - np.eye(classes, dtype=int))
    for n in numbers:
        expected = (int(wrong[n].argmax()), int(wrong[n].max())) if wrong[n].any() else None
        assert counts.most_confused.get(n) == expected
    expected, maximum, mean, sizes = expected_calibration(table.outputs, table.labels)
    calibration = scores.calibration
    assert [each.samples for each in calibration.bins] == sizes
    assert calibration.expected_error == pytest.approx(expected, abs=1e-12)
    assert calibration.maximum_error == pytest.approx(maximum, abs=1e-12)
    assert calibration.mean_confidence == pytest.approx(mean, abs=1e-12)
    assert scores.test_accuracy == pytest.approx((predicted == table.labels).double().mean().item())


def test_a_probability_at_the_edge_of_two_bins_is_in_the_lower_one():
    table = Table(torch.zeros(3, 3), torch.tensor([0, 1, 2]), ("a", "b", "c"))  # 1/3 = 5/15
    assert [each.samples for each in table.score().calibration.bins].index(3) == 4
    certain = Table(torch.tensor([[1000.0, 0.0]]), torch.tensor([0]), ("a", "b"))
    assert [each.samples for each in certain.score().calibration.bins].index(1) == BINS - 1


def test_outputs_that_are_nan_are_wrong_and_have_no_place_in_confusion_and_calibration():
    outputs = torch.tensor([[torch.nan, torch.nan], [3.0, 0.0], [torch.inf, 0.0], [-torch.inf, 0.0]])
    scores = Table(outputs, torch.tensor([0, 0, 0, 1]), ("a", "b")).score(mistakes=9)
    assert scores.test_accuracy == 0.5 and scores.counts.unpredicted == 2
    assert scores.confusion == [[1, 0], [0, 1]] and scores.as_dict()["recall"] == [0.3333, 1.0]
    assert scores.calibration.samples == 2 and scores.mistakes == []
    text = tables.as_text(scores, SimpleNamespace(name="x", classes=("a", "b")), "c", 20)
    assert "2 samples have outputs that are not finite" in text
    nothing = Table(outputs[:1], torch.tensor([0]), ("a", "b")).score()
    assert nothing.test_accuracy == 0.0 and nothing.as_dict()["test_ece"] is None
    json.dumps({**nothing.as_dict(), "test_loss": 0.0}, allow_nan=False)


def test_pairs_that_are_added_up_on_the_way_are_counted_once(monkeypatch):
    table = random_table()
    whole = table.score(batch_size=16).counts.matrix()
    monkeypatch.setattr(scoring, "_COMPACT_AFTER", 20)
    assert np.array_equal(table.score(batch_size=16).counts.matrix(), whole) and whole.sum() == 300


@on_ranks(3)
def test_all_scores_are_those_of_one_rank(cluster):
    for table in (random_table(), random_table(samples=2, seed=3), random_table(400, 60, dtype=torch.bfloat16)):
        shared = table.score(cluster, batch_size=32, mistakes=MOST_MISTAKES)
        alone = table.score(replace(cluster, rank=0, size=1), batch_size=32, mistakes=MOST_MISTAKES)
        texts = [tables.as_text(each, table, "c", 20) for each in (shared, alone)]
        assert texts[0] == texts[1]
        described = [
            [(m.index, m.label, m.predicted, m.probability, m.picture.tobytes()) for m in each.mistakes]
            for each in (shared, alone)
        ]
        assert described[0] == described[1]
        assert np.array_equal(shared.counts.matrix(), alone.counts.matrix())
        bins = [[(each.samples, each.correct) for each in scores.calibration.bins] for scores in (shared, alone)]
        assert bins[0] == bins[1]


# Text and JSON.


def lines_of(table, per_class=20):
    return tables.as_text(table.score(), table, "runs/x", per_class).splitlines()


def test_the_text_lists_every_class_of_a_few_and_the_worst_of_many():
    few = random_table(classes=5)
    lines = lines_of(few)
    rows = [line for line in lines if line.startswith("class ") and "." in line]
    assert [row.split()[1] for row in rows] == list("01234")
    assert any(line.startswith("samples by true class") for line in lines)
    many = random_table(4000, 1000)
    lines = lines_of(many)
    counts = many.score().counts
    head = next(n for n, line in enumerate(lines) if line.startswith("class  "))
    worst = np.argsort(np.where(np.isnan(counts.recall), 2, counts.recall), kind="stable")[:20]
    assert [int(line.split()[1]) for line in lines[head + 1 : head + 21]] == worst.tolist()
    assert lines[head + 21].startswith("980 of 1,000 classes") and "--per-class 1000" in lines[head + 21]
    assert len(lines) < 60 and max(map(len, lines)) < 120
    assert len(lines_of(many, per_class=1000)) > 1000
    assert not [line for line in lines_of(many, per_class=0) if line.startswith("class ")]


def test_names_of_classes_stay_on_their_line():
    names = ("a\nb\x1b[1m", "x" * 90, "e" * 3)
    lines = lines_of(replace(random_table(classes=3), classes=names))
    assert not [line for line in lines if not line.isprintable()]
    assert max(map(len, lines)) < 120 and any("x" * 20 + "…" in line or "…" in line for line in lines)


def test_long_names_of_classes_leave_room_for_the_matrix(tmp_path):
    scores = random_table(classes=3).score()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, of axes without a size
        names = ("a\nb", "x" * 100_000, "$e")
        plots.plot(tmp_path / "scores.png", scores.counts, scores.calibration, names, "t" * 1000)
    with Image.open(tmp_path / "scores.png") as picture:
        assert np.asarray(picture.convert("RGB")).std(axis=(0, 1)).min() > 10


def test_json_has_everything_and_the_likelihood_of_another_loss():
    table = random_table(600, 60)
    own = Objective(torch.float32, "mine:loss", lambda outputs, targets: outputs.mean(), 0.0, {})
    scores = table.score(objective=own)
    values = json.loads(tables.as_json(scores, table, "runs/x"))
    expected = torch.nn.functional.cross_entropy(table.outputs.double(), table.labels)
    assert values["nll"] == pytest.approx(expected.item())
    assert f"negative log-likelihood {expected:.4f}" in tables.as_text(scores, table, "x", 1)
    assert json.loads(tables.as_json(table.score(), table, "x"))["nll"] is None
    matrix = np.zeros((60, 60), dtype=int)
    for true, predicted, samples in values["confusions"]:
        matrix[true, predicted] += samples
    for n, row in enumerate(values["classes"]):
        matrix[n, n] += row["correct"]
        assert row["name"] == f"class {n}"
    assert np.array_equal(matrix, scores.counts.matrix()) and values["confusion"] is None


def test_outputs_that_are_no_logits_have_no_tables():
    table = replace(random_table(), outputs=torch.zeros(300, 1, 5))
    mean = Objective(torch.float32, "mine:loss", lambda outputs, targets: outputs.mean(), 0.0, {})
    scores = table.score(objective=mean)
    assert scores.counts is None and scores.as_dict()["calibration"] is None
    text = tables.as_text(scores, table, "x", 20)
    assert len(text.splitlines()) == 4 and "outputs are not logits" in text


# Mistakes.


def image_data(shape, count=40, seed=0, **options):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
    labels = np.zeros(count, dtype=np.int64)
    return ImageData("made", ("a", "b"), images, labels, images, labels, **options)


def test_the_pictures_are_the_images_and_the_most_confident_come_first():
    data = image_data((3, 8, 8))
    loader = DeviceLoader(data, CPU, dtype=torch.float32)
    margins = torch.linspace(-3, 3, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    outputs = torch.stack([torch.zeros(40), margins], dim=1)
    place = {image.tobytes(): n for n, image in enumerate(data.test_images)}

    def forward(images):
        mean, std = (torch.tensor(part).view(-1, 1, 1) for part in loader.statistics)
        pixels = ((images * std + mean) * 255).round().to(torch.uint8).numpy()
        return outputs[[place[image.tobytes()] for image in pixels]]

    found = score(forward, loader, ALONE, CROSS_ENTROPY, 7, mistakes=12).mistakes
    order = np.argsort(-margins.numpy())[:12]
    assert [mistake.index for mistake in found] == order.tolist()
    for mistake in found:
        assert np.array_equal(mistake.picture, data.test_images[mistake.index])
        assert (mistake.label, mistake.predicted) == (0, 1)
        assert mistake.probability == pytest.approx(outputs[mistake.index].softmax(0)[1].item(), abs=1e-6)


def wrong(images):
    return torch.tensor([[0.0, 1.0]]).expand(len(images), 2)


def test_large_images_are_scaled_down_and_samples_that_are_no_images_are_not_kept():
    data = image_data((1, 200, 100), count=3)
    found = score(wrong, DeviceLoader(data, CPU), ALONE, CROSS_ENTROPY, mistakes=2).mistakes
    assert [mistake.picture.shape for mistake in found] == [(1, LARGEST_SIDE, LARGEST_SIDE // 2)] * 2
    halves = data.test_images[:, :, :100].mean(), data.test_images[:, :, 100:].mean()
    assert found[0].picture.mean() == pytest.approx(np.mean(halves), abs=3)
    for shape in ((2, 8, 8), (1, 1, 50)):
        loader = DeviceLoader(image_data(shape), CPU)
        assert score(wrong, loader, ALONE, CROSS_ENTROPY, mistakes=2).mistakes is None


def made_mistakes(count, shape=(3, 5, 6), seed=0):
    generator = np.random.default_rng(seed)
    pictures = generator.integers(0, 256, (count, *shape), dtype=np.uint8)
    return [Mistake(n, 0, 1, 0.5 + n / 1000, picture) for n, picture in enumerate(pictures)]


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (8, 3), (19, 3)])
def test_what_was_written_is_read(tmp_path, count, channels):
    made = made_mistakes(count, (channels, 5, 6))
    mistakes_file.write(tmp_path, 7, made, ("cat", "dog"))
    found = mistakes_file.read(tmp_path, 24)
    assert (found.step, len(found.mistakes)) == (7, count)
    for shown, mistake in zip(found.mistakes, made, strict=True):
        (tmp_path / "one.png").write_bytes(shown.png)
        pixels = np.asarray(Image.open(tmp_path / "one.png")).reshape(5, 6, channels)
        assert np.array_equal(pixels.transpose(2, 0, 1), mistake.picture)
        assert (shown.index, shown.label, shown.predicted) == (mistake.index, "cat", "dog")
    assert len(mistakes_file.read(tmp_path, 1).mistakes) == 1


def test_a_write_that_fails_leaves_the_old_mistakes_and_the_next_removes_what_is_left(tmp_path, monkeypatch):
    mistakes_file.write(tmp_path, 1, made_mistakes(3), ("cat", "dog"))
    original = mistakes_file.write_atomically

    def full(path, content):
        if path.suffix == ".json":
            raise OSError(28, "No space left on device")
        original(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(mistakes_file, "write_atomically", full)
        problem = mistakes_file.try_write(tmp_path, 2, made_mistakes(5), ("cat", "dog"))
    assert "No space left on device" in problem and "training continues" in problem
    old = mistakes_file.read(tmp_path, 24)
    assert (old.step, len(old.mistakes)) == (1, 3)
    mistakes_file.write(tmp_path, 3, [], ("cat", "dog"))
    assert mistakes_file.read(tmp_path, 24).mistakes == []
    assert [path.name for path in tmp_path.iterdir()] == ["mistakes.json"]
    assert mistakes_file.read(tmp_path / "no", 24) is None


@pytest.mark.parametrize(
    "damage",
    [
        {"picture": "gone.png"},
        {"picture": "../mistakes-00000001.png"},
        {"width": 600},
        {"columns": 0},
        {"mistakes": [{"index": 1}]},
        {"step": None},
    ],
)
def test_damaged_files_are_one_error(tmp_path, damage):
    mistakes_file.write(tmp_path, 1, made_mistakes(3), ("cat", "dog"))
    path = tmp_path / "mistakes.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(UserError, match=r"mistakes\.json or its picture is damaged"):
        mistakes_file.read(tmp_path, 24)


# The commands.


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    write_own_code(folder)
    with ForkedCommands(folder) as running:
        succeeded(running.run("hvd_adam.train", "--model", "mlp", "--max-steps", "20", "--output-dir", "best run"))
        yield running


@pytest.mark.slow
def test_a_run_has_the_mistakes_and_the_calibration_that_evaluate_finds(commands):
    run = commands.folder / "best run"
    argv = ("hvd_adam.evaluate", "--checkpoint", run)
    found = json.loads(succeeded(commands.run(*argv, "--json")).stdout)
    (event,) = events(run, "eval")
    for key in ("test_ece", "test_accuracy"):
        assert event[key] == pytest.approx(found[key], rel=1e-9)
    assert event["confusion"] == found["confusion"] and len(event["recall"]) == 10
    shown, data = mistakes_file.read(run, MOST_MISTAKES), load("digits")
    assert shown.step == 20 and len(shown.mistakes) == MOST_MISTAKES
    values = [mistake.probability for mistake in shown.mistakes]
    assert values == sorted(values, reverse=True)
    for mistake in shown.mistakes:
        assert mistake.label == str(data.test_labels[mistake.index]) != mistake.predicted
        (run / "one.png").write_bytes(mistake.png)
        assert np.array_equal(np.asarray(Image.open(run / "one.png")), data.test_images[mistake.index, 0])
    done = succeeded(commands.run(*argv, "--per-class", "3", "--plot", "scores.png"))
    assert "7 of 10 classes" in done.stdout and f"expected error {found['test_ece']:.4f}" in done.stdout
    assert done.stdout.endswith("\nplot scores.png\n")
    with Image.open(commands.folder / "scores.png") as picture:
        assert picture.width > 1000
    (commands.folder / "scores.png").write_text("precious")
    assert "--plot scores.png exists" in one_line(commands.run(*argv, "--plot", "scores.png"))
    assert (commands.folder / "scores.png").read_text() == "precious"
    succeeded(commands.run(*argv, "--plot", "scores.png", "--force"))
    assert (commands.folder / "scores.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_options_without_effect_and_pictures_that_cannot_be_drawn_are_one_line(commands):
    argv = ("hvd_adam.evaluate", "--checkpoint", "best run")
    for wrong_argv, message in (
        (("--plot", "scores.jpg"), "--plot is scores.jpg: it must be a file name that ends in .png"),
        (("--plot", "no/scores.png"), "--plot no/scores.png: there is no folder no"),
        (("--per-class", "-1"), "--per-class is -1: it must be 0 or above"),
        (("--per-class", "3", "--json"), "--per-class has no effect with --json"),
    ):
        assert message in one_line(commands.run(*argv, *wrong_argv))
    own = [
        "--model",
        "mine:build",
        "--model-args",
        '{"width": 4}',
        "--dataset",
        "mine:data",
        "--loss",
        "mine:loss",
    ]
    succeeded(commands.run("hvd_adam.train", *own, "--workers", "0", "--max-steps", "1", "--output-dir", "own"))
    assert not list((commands.folder / "own").glob("mistakes*"))
    done = commands.run("hvd_adam.evaluate", "--checkpoint", "own", "--plot", "own.png")
    assert "--plot own.png: there is nothing to draw" in one_line(done) and "test loss" in done.stdout
    assert "plot own.png" not in done.stdout and not (commands.folder / "own.png").exists()


def test_which_is_named_for_one_checkpoint_only(commands):
    (commands.folder / "best run/checkpoints/best").unlink()
    argv = ("hvd_adam.evaluate", "--which", "best", "--checkpoint")
    (one,) = (commands.folder / "best run/checkpoints").glob("step-*")
    assert ": --which best has no effect on " in one_line(commands.run(*argv, one)).replace("error: ", ": ")
    line = one_line(commands.run(*argv, "best run"))
    assert "best run has no best checkpoint" in line and "--which" not in line
