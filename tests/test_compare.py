"""`python -m hvd_adam.compare`: the choice of learning rates, the statistics, sharing over ranks, resume, studies.

Hazards: the test images take part in the choice of a learning rate; a table that depends on the number of ranks; a
finished run that is made again, or one of other settings that is used; a run that diverges and ends the
comparison; a test of significance that is not the one that the table names.
"""

import errno
import itertools
import json
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.on_ranks import on_ranks
from helpers.photos import write_photos
from helpers.training_runs import one_line, succeeded, train
from scipy import stats

from hvd_adam.arguments import parse
from hvd_adam.compare.cells import RESULT_KEYS, Cell, CellStore
from hvd_adam.compare.config import BETAS, EPS, OPTIMIZERS, SCALING_RULES, CompareConfig
from hvd_adam.compare.networks import DEEP, INITIALIZATIONS, build, weights
from hvd_adam.compare.runner import Loaders, evaluate, hold_out, make_optimizer
from hvd_adam.compare.runner import train as train_cell
from hvd_adam.compare.statistics import estimate, holm, paired_p_value
from hvd_adam.compare.studies import arms
from hvd_adam.compare.summary import choose_lr, summarize
from hvd_adam.compare.table import notes, table
from hvd_adam.data import load
from hvd_adam.distributed.context import horovod
from hvd_adam.errors import UserError

SMALL = CompareConfig(
    model="mlp",
    seeds=2,
    max_steps=6,
    eval_every=3,
    batch_size=32,
    optimizers="adam,sgd",
    lrs="0.003,0.03",
    target=0.3,
)
CELL = Cell("", "default", "adam", 0.003, BETAS, EPS, 32, 0)


# The statistics, and the rows.


def test_the_statistics_agree_with_scipy_and_numpy():
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 7))
    assert paired_p_value(first, second) == pytest.approx(stats.ttest_1samp(first - second, 0).pvalue, rel=1e-12)
    mean, error = estimate(list(first))
    assert (mean, error) == pytest.approx((first.mean(), stats.sem(first)), rel=1e-12)
    assert paired_p_value([0.5, 0.6], [0.5, 0.6]) == 1.0
    assert paired_p_value([0.5, 0.75], [0.25, 0.5]) == 0.0
    # One image of 355 each, equal but for rounding: SciPy warns of such differences, which is an error here.
    assert paired_p_value([36 / 355, 37 / 355], [35 / 355, 36 / 355]) == 0.0
    assert estimate([0.5, None]) == (None, None) and estimate([]) == (None, None)


def test_holm_rejects_what_its_step_down_procedure_rejects():
    p_values = [0.04, 0.001, 0.03, 0.6, 0.012]
    for alpha in (0.005, 0.05, 0.06, 0.2):
        rejected, order = set(), np.argsort(p_values)
        for place, index in enumerate(order):  # Holm 1979: the first that is not rejected ends it
            if p_values[index] > alpha / (len(p_values) - place):
                break
            rejected.add(index)
        assert {index for index, value in enumerate(holm(p_values)) if value <= alpha} == rejected
    assert holm([]) == []


def result(validation, test=0.5, diverged=None, loss=1.0, curve=None):
    return {
        "validation_accuracy": validation,
        "validation_loss": loss,
        "test_accuracy": test,
        "test_loss": loss,
        "diverged": diverged,
        "curve": curve or [[10, 1.0, validation, loss]],
        "gradient_norms": [[1.0, None], [1.0, 2.0]],
    }


def results_of(arm, by_lr):
    return {cell: value for lr, cells in arm.cells.items() for cell, value in zip(cells, by_lr[lr], strict=True)}


def test_the_learning_rate_is_chosen_by_validation_and_not_by_divergence_or_test():
    arm = arms(replace(SMALL, optimizers="adam", lrs="0.1,0.2,0.3"))[0]
    by_lr = {
        0.1: [result(0.7, test=0.99), result(0.7, test=0.99)],
        0.2: [result(0.8, test=0.1), result(0.7, test=0.1)],
        0.3: [result(0.9), result(0.9, diverged=4, loss=None)],
    }
    assert choose_lr(arm, results_of(arm, by_lr)) == 0.2
    by_lr[0.1] = [result(0.75, loss=0.5)] * 2  # as accurate, with a lower loss
    assert choose_lr(arm, results_of(arm, by_lr)) == 0.1


def test_a_row_counts_what_reached_the_target_and_what_diverged():
    adam, sgd = arms(replace(SMALL, lrs="0.1"))
    curve = [[3, 0.5, 0.2, 1.0], [6, 1.0, 0.3, 1.0], [9, 1.5, 0.4, 1.0]]
    results = results_of(adam, {0.1: [result(0.4, 0.6, curve=curve), result(0.2, 0.4, curve=curve[:1])]})
    results |= results_of(sgd, {0.1: [result(0.1, 0.1, diverged=3, loss=None), result(0.1, 0.2)]})
    first, second = rows = summarize([adam, sgd], results, 0.3)
    assert (first["reached_target"], first["updates_to_target"], first["seconds_to_target"]) == (1, 6, 1.0)
    assert first["gradient_norms"] == [[1.0, None], [1.0, 2.0]]
    assert (second["diverged"], second["test_loss"], second["updates_to_target"]) == (1, None, None)
    assert first["p_value"] is None
    assert second["p_value"] == pytest.approx(stats.ttest_rel([0.1, 0.2], [0.6, 0.4]).pvalue)
    text = table(rows, 0.3, norms=True)
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1 and all(line.count("|") == 10 for line in lines)
    assert "6 (1 of 2)" in lines[2] and "1.0e+00 / not finite" in lines[2]
    assert "not finite" in lines[3] and "never" in lines[3] and "1 of 2" in lines[3]
    assert "below 0.05: none" in notes(rows)[1] and "'adam'" in notes(rows)[1]


def test_a_p_value_without_variation_is_mentioned():
    adam, sgd = arms(replace(SMALL, lrs="0.1"))
    results = results_of(adam, {0.1: [result(0.4, 36 / 355), result(0.2, 37 / 355)]})
    of_sgd = [result(0.1, 35 / 355), result(0.1, 36 / 355)]
    mentioned = notes(summarize([adam, sgd], results | results_of(sgd, {0.1: of_sgd}), 0.3))
    assert any("All seeds of 'sgd' differ by the same" in line for line in mentioned)
    of_sgd[0] = result(0.1, 20 / 355)
    mentioned = notes(summarize([adam, sgd], results | results_of(sgd, {0.1: of_sgd}), 0.3))
    assert not any("differ by the same" in line for line in mentioned)


# The data, the models and single runs.


def test_validation_images_are_training_images_that_no_run_trains_on():
    data = load("digits")
    held = hold_out(data)
    images = [{image.tobytes() for image in part} for part in (held.train_images, held.test_images)]
    assert not images[0] & images[1]
    assert images[0] | images[1] == {image.tobytes() for image in data.train_images}
    counts = np.bincount(held.test_labels)
    assert np.array_equal(counts, np.bincount(data.train_labels) // 5)
    loaders = Loaders.of(data, torch.device("cpu"))
    assert len(loaders.test.data.test_labels) == len(data.test_labels)
    assert loaders.test.mean == loaders.train.mean
    with pytest.raises(UserError, match="at least 5"):
        hold_out(replace(data, train_images=data.train_images[:9], train_labels=np.arange(9)))


def test_a_run_repeats_its_bits_and_learns():
    loaders = Loaders.of(load("digits"), torch.device("cpu"))
    first, second = (train_cell(CELL, replace(SMALL, max_steps=60), loaders) for _ in range(2))
    for run in (first, second):
        assert run["seconds"] == pytest.approx(run["curve"][-1][1], abs=1e-5) and run["seconds"] > 0
    assert without_seconds(first) == without_seconds(second)
    assert first["test_accuracy"] > 0.8 and first["updates"] == 60 and len(first["curve"]) == 20
    assert first.keys() == RESULT_KEYS
    assert len(first["gradient_norms"][0]) == 2 and json.loads(json.dumps(first, allow_nan=False)) == first


def test_a_run_that_diverges_is_a_result():
    loaders = Loaders.of(load("digits"), torch.device("cpu"))
    found = train_cell(replace(CELL, optimizer="sgd", lr=1e30), SMALL, loaders)
    assert found["diverged"] == 3 and found["updates"] == 3
    assert found["test_loss"] is None and found["test_accuracy"] == 0.0
    json.dumps(found, allow_nan=False)


def test_the_accuracy_is_that_of_all_images_whatever_the_batches(monkeypatch):
    loaders = Loaders.of(load("digits"), torch.device("cpu"))
    model = build(CELL, "mlp", 16, loaders.train.data)
    whole = evaluate(model, loaders.test)
    monkeypatch.setattr("hvd_adam.compare.runner._EVALUATION_BATCH", 50)
    assert evaluate(model, loaders.test) == pytest.approx(whole, rel=1e-5)
    images, labels = next(loaders.test.test_batches(10_000))
    with torch.no_grad():
        assert whole[1] == pytest.approx((model(images).argmax(1) == labels).double().mean().item())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_the_one_of_its_name(name):
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    peers = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "amsgrad": lambda params, **options: torch.optim.Adam(params, amsgrad=True, **options),
        "sgd": lambda params, **options: torch.optim.SGD(params, lr=options["lr"], momentum=0.9),
        "nadam": torch.optim.NAdam,
        "radam": torch.optim.RAdam,
    }
    optimizers = [
        make_optimizer(replace(CELL, optimizer=name, lr=0.1, betas=(0.8, 0.9), eps=1e-3), [ours]),
        peers[name]([theirs], **({"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3})),
    ]
    for step, parameter_and_optimizer in itertools.product(range(8), zip((ours, theirs), optimizers, strict=True)):
        parameter, optimizer = parameter_and_optimizer
        parameter.grad = torch.cos(torch.arange(5.0) + step)
        optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_initializations_differ_as_their_names_say():
    data = load("digits")
    models = {name: build(replace(CELL, initialization=name), "cnn", 16, data) for name in INITIALIZATIONS}
    scales = {name: weights(model)[0].std().item() for name, model in models.items()}
    assert all(not parameter.any() for parameter in models["zeros"].parameters())
    assert scales["too small"] == pytest.approx(scales["default"] / 100)
    assert scales["too large"] == pytest.approx(scales["default"] * 10)
    fan_in = weights(models["he"])[1][0].numel()
    assert weights(models["he"])[1].std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)


def test_gradients_vanish_in_a_deep_sigmoid_network_and_not_with_residuals():
    loaders = Loaders.of(load("digits"), torch.device("cpu"))
    config = CompareConfig(study="vanishing", depth=8, max_steps=1, seeds=2)
    shrinking = {}
    for name in DEEP:
        found = train_cell(replace(CELL, network=name), config, loaders)["gradient_norms"][0]
        assert len(found) == 9
        shrinking[name] = found[0] / found[-1]
    assert shrinking["sigmoid"] < 1e-5 and shrinking["gelu, norm, residual"] > 0.05


# The rows of the studies, and the options.


def test_batch_sizes_scale_the_hyper_parameters_by_each_rule_and_share_the_base():
    config = CompareConfig(study="batch-size", batch_size=32, batch_sizes="128", lrs="0.001", seeds=2)
    rows = {arm.name: next(iter(arm.cells.values()))[0] for arm in arms(config)}
    assert list(rows) == ["adam: batch 32", *(f"adam: batch 128, {rule}" for rule in SCALING_RULES)]
    assert [cell.lr for cell in rows.values()] == [0.001, 0.001, 0.004, 0.002, 0.001]
    assert rows["adam: batch 128, halflife"].betas == (0.9, 0.999**4)
    assert rows["adam: batch 128, sqrt"].betas == pytest.approx((0.6, 0.996))
    assert {arm.baseline for arm in arms(config)} == {None, "adam: batch 32"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--optimizers adam,sdg", "--optimizers: optimizer 'sdg' is not known: did you mean sgd"),
        ("--optimizers ,", "--optimizers is ',': it must be some of adam, adamw"),
        ("--lrs ,", "--lrs is ',': it has no rate for adam, adamw"),
        ("--lrs adam=,sgd=0.1 --optimizers adam,sgd", "it has no rate for adam$"),
        ("--lrs adm=0.1", "--lrs: optimizer 'adm' is not known: did you mean adam"),
        (
            "--lrs sgd=0.1,0.2,0.001 --optimizers adam",
            "--lrs has rates for sgd, which is not among --optimizers adam",
        ),
        ("--lrs 0.1,x", "--lrs is 0.1,x: it must be numbers above 0"),
        ("--lrs 0", "--lrs is 0: it must be numbers above 0"),
        ("--seeds 1", "--seeds is 1: it must be at least 2"),
        ("--target 95", "--target is 95.0: it must be above 0 and at most 1"),
        ("--resume", "--resume needs --output-dir"),
        ("--data-dir x", "--data-dir x has no effect"),
        ("--depth 4", "--depth has no effect without --study vanishing"),
        ("--batch-sizes 4", "--batch-sizes has no effect without --study batch-size"),
        ("--study initialization --initialization he", "--initialization he has no effect with --study init"),
        ("--study vanishing --model mlp", "--model mlp has no effect with --study vanishing"),
        ("--study batch-size --lrs 0.1,0.2", "--lrs is 0.1,0.2: it must be one rate for adam"),
        ("--study batch-size --batch-size 1 --batch-sizes 64", "sqrt scaling by a factor of 64 turns beta1"),
        ("--study batch-size --batch-sizes 4,x", "--batch-sizes is '4,x': it must be whole numbers"),
        pytest.param(f"--study batch-size --batch-sizes {'1' * 5000}", "--batch-sizes is '111", id="5000 digits"),
        ("--study optimizer", "--study is optimizer: it must be one of optimizers, initialization"),
    ],
)
def test_bad_arguments_are_one_line(argv, message):
    with pytest.raises(UserError, match=message) as refusal:
        parse(CompareConfig, "hvd_adam.compare", argv.split())
    assert "\n" not in str(refusal.value)


def test_learning_rates_are_for_all_optimizers_or_for_each():
    assert SMALL.grids() == {"adam": (0.003, 0.03), "sgd": (0.003, 0.03)}
    assert replace(SMALL, lrs="0.2,0.1,sgd=0.3,0.4").grids() == {"adam": (0.1, 0.2), "sgd": (0.3, 0.4)}
    assert set(CompareConfig().grids()) == set(OPTIMIZERS)


def test_a_result_is_read_for_the_same_run_and_settings_only(tmp_path):
    store, whole = CellStore(tmp_path, {"epochs": 1}), dict.fromkeys(RESULT_KEYS, 1.5)
    store.write(CELL, whole)
    assert store.read(CELL) == whole
    assert store.read(replace(CELL, seed=1)) is None
    assert CellStore(tmp_path, {"epochs": 2}).read(CELL) is None
    store.path(CELL).write_text(store.path(CELL).read_text()[:-9])
    assert store.read(CELL) is None


@pytest.mark.parametrize("damaged", [{}, {"updates": 6}, [], None, "result"], ids=repr)
def test_a_result_that_lacks_values_counts_as_none(tmp_path, damaged):
    store = CellStore(tmp_path, {})
    store.write(CELL, damaged)
    assert store.read(CELL) is None


# Whole comparisons.


def without_seconds(value):
    """Returns JSON values without times, which differ from run to run."""
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if not key.startswith("seconds")} | (
            {"curve": [[point[0], *point[2:]] for point in value["curve"]]} if "updates" in value else {}
        )
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def compared(cluster, folder, **options):
    """Compares on the ranks of `cluster`, and returns the rows without times."""
    from hvd_adam.compare.command import compare_on

    config = replace(SMALL, output_dir=str(folder), **options)
    compare_on(cluster, config)
    if cluster.rank:
        return None
    assert (Path(folder) / "compare.png").stat().st_size > 10_000
    return without_seconds(json.loads((Path(folder) / "compare.json").read_text())["rows"])


@contextmanager
def shared_folder(cluster):
    """Creates a folder that all ranks use, and removes it when all have left."""
    with tempfile.TemporaryDirectory(prefix="compare-") as own:
        yield Path(horovod().broadcast_object(own, 0))
        cluster.barrier()


@on_ranks(2)
def test_one_rank_and_two_make_equal_tables(cluster):
    with shared_folder(cluster) as folder:
        rows = compared(cluster, folder / "two")
        if cluster.rank == 0:
            assert compared(replace(cluster, size=1), folder / "one") == rows
            assert {row["name"] for row in rows} == {"adam", "sgd"}
            assert len(list((folder / "two/cells").glob("*.json"))) == 8


@on_ranks(2)
def test_resume_makes_only_the_runs_that_are_missing(cluster):
    with shared_folder(cluster) as folder:
        compared(cluster, folder)
        marked, missing, damaged, *_ = sorted((folder / "cells").glob("*.json"))
        cluster.barrier()
        if cluster.rank == 0:
            changed = json.loads(marked.read_text())
            changed["result"]["test_accuracy"] = 0.0625  # shows that it is used, and not made again
            marked.write_text(json.dumps(changed))
            before = without_seconds(json.loads(missing.read_text()))
            missing.unlink()
            damaged.write_text("{")
        with pytest.raises(UserError, match="holds a comparison already"):
            compared(cluster, folder)
        compared(cluster, folder, resume=True)
        if cluster.rank == 0:
            assert json.loads(marked.read_text())["result"]["test_accuracy"] == 0.0625
            assert without_seconds(json.loads(missing.read_text())) == before
            assert len(json.loads(damaged.read_text())["result"]["curve"]) == 2


@on_ranks(2)
@pytest.mark.parametrize("study", ["initialization", "vanishing", "batch-size"])
def test_a_study_has_a_row_for_each_variant(cluster, study):
    options = {"optimizers": "adam", "lrs": "0.003", "study": study}
    model = {"model": "cnn", "depth": 3} if study == "vanishing" else {}
    sizes = {"batch_sizes": "64"} if study == "batch-size" else {}
    with shared_folder(cluster) as folder:
        rows = compared(cluster, folder / study, **options, **model, **sizes)
    if cluster.rank == 0:
        names = {
            "initialization": [f"adam: {name}" for name in INITIALIZATIONS],
            "vanishing": [f"adam: {name}" for name in DEEP],
            "batch-size": ["adam: batch 32", *(f"adam: batch 64, {rule}" for rule in SCALING_RULES)],
        }
        assert [row["name"] for row in rows] == names[study]
        assert sum(row["p_value_holm"] is None for row in rows) == 1
        assert all(len(row["gradient_norms"][0]) == (4 if study == "vanishing" else 2) for row in rows)


def test_the_command_prints_the_table_and_refuses_bad_input_in_one_line(tmp_path):
    argv = "--model mlp --seeds 2 --max-steps 4 --optimizers adam,sgd --lrs adam=0.003,sgd=1e30".split()
    done = succeeded(train(*argv, folder=tmp_path / "out", module="hvd_adam.compare"))
    assert "2 of 2" in done.stdout and "| sgd " in done.stdout
    assert f"results {tmp_path / 'out' / 'compare.json'}" in done.stdout
    (tmp_path / "file").write_text("")
    line = one_line(train(*argv, folder=tmp_path / "file", module="hvd_adam.compare"))
    assert f"cannot write to {tmp_path / 'file'}" in line


def test_images_that_are_not_in_memory_are_refused_with_the_remedy(tmp_path):
    write_photos(tmp_path / "photos")
    argv = ["--dataset", "imagefolder", "--data-dir", str(tmp_path / "photos"), "--workers", "0"]
    assert "--cache FOLDER" in one_line(train(*argv, folder=tmp_path / "out", module="hvd_adam.compare"))
    assert not (tmp_path / "out").exists()


def test_the_table_is_printed_and_an_old_plot_is_kept_if_the_plot_cannot_be_written(tmp_path, capsys, monkeypatch):
    from hvd_adam.compare import command

    def full(path, content):
        if path.suffix == ".png":
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_text(content)

    adam, sgd = arms(replace(SMALL, lrs="0.1"))
    results = results_of(adam, {0.1: [result(0.4), result(0.2)]}) | results_of(sgd, {0.1: [result(0.1)] * 2})
    (tmp_path / "compare.png").write_text("old")
    monkeypatch.setattr(command, "write_atomically", full)
    with pytest.raises(UserError, match="No space left on device"):
        command._report(SMALL, tmp_path, summarize([adam, sgd], results, 0.3))
    shown = capsys.readouterr().out
    assert "| sgd " in shown and "plot" not in shown
    assert (tmp_path / "compare.png").read_text() == "old" and (tmp_path / "compare.json").exists()
