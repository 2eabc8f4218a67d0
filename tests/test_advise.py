"""`hvd_adam.advise`: the choice of a batch and of a number of ranks, from a run folder and a cost model.

Hazards: a formula with the own batch in place of the other one; advice for a setting that divides by no number of
ranks; a cost model whose own prediction for the run is not what the run took; a noise scale of the run's first
part; hyper-parameters that are scaled twice; bad input that ends in a traceback.
"""

import json
import math
from dataclasses import replace

import pytest
import yaml
from test_simulate import PLAIN, TWO

from hvd_adam.advise import record as records
from hvd_adam.advise.advice import options_for
from hvd_adam.advise.choice import (
    Row,
    Setting,
    by_factors_of_2,
    cheapest,
    relative_updates,
    rows_of,
    saturation,
    settings,
    soonest,
)
from hvd_adam.advise.command import advise
from hvd_adam.advise.record import NoiseScale, Record
from hvd_adam.advise.step_time import Line, Measured, Model, fitted
from hvd_adam.arguments import parse
from hvd_adam.config import AdviseConfig
from hvd_adam.errors import UserError
from hvd_adam.schedule import SCALING_RULES, scale
from hvd_adam.simulate.calibration import Calibration

OWN = Setting(2, 16, 1, 32)


# The choice.


def test_updates_are_those_of_mccandlish_relative_to_the_run():
    assert relative_updates(32, 32, 100.0) == 1
    assert relative_updates(100, 25, 100.0) == pytest.approx(2 / 5)
    assert relative_updates(64, 32, 0.0) == 1  # no noise: a larger batch saves nothing
    assert relative_updates(64, 32, math.inf) == 0.5


@pytest.mark.parametrize("noise_scale", [10.0, 300.0, 5000.0])
def test_the_soonest_batch_is_the_root_of_noise_scale_times_fixed_over_each(noise_scale):
    # (fixed + each·B/N)(1 + noise/B) has its minimum at B² = noise·N·fixed/each.
    fixed, each = 3e-3, 2e-5
    times = Measured(2, 16, 1, 1.0, Line(fixed, each))
    found = settings(range(2, 4000, 2), [2], OWN, None, keep_micro_batch=False)
    best = soonest(rows_of(found, OWN, noise_scale, times))
    assert abs(best.global_batch - math.sqrt(noise_scale * 2 * fixed / each)) <= 2
    assert best.relative_time == pytest.approx(best.relative_updates * best.seconds / (fixed + 16 * each))
    assert best.relative_cost == best.relative_time


def test_settings_divide_by_ranks_and_micro_batches():
    found = settings([8, 12, 64], [2, 3, 16], OWN, 10, keep_micro_batch=False)
    assert OWN in found
    assert {(s.ranks, s.micro_batch, s.accumulate) for s in found if s.global_batch == 64} == {
        (2, 8, 4),
        (16, 4, 1),
    }
    assert {(s.ranks, s.global_batch) for s in found} >= {(3, 12), (2, 8), (2, 12)}
    assert all(s.ranks * s.micro_batch * s.accumulate == s.global_batch for s in found)
    kept = settings([16, 64], [2], OWN, None, keep_micro_batch=True)
    assert Setting(2, 16, 2, 64) in kept
    assert by_factors_of_2(12) == (3, 6, 12, 24, 48, 96, 192, 384, 768)


def test_a_run_alone_tells_only_of_its_own_micro_batch_and_ranks():
    times = Measured(2, 16, 1, 0.01)
    found = settings([16, 32, 64], [2, 4], OWN, None, keep_micro_batch=True)
    rows = rows_of(found, OWN, 100.0, times)
    assert [(row.ranks, row.global_batch, row.seconds) for row in rows] == [(2, 32, 0.01), (2, 64, 0.02)]
    with_line = replace(times, accumulate=2, seconds=0.015, line=Line(4e-3, 5e-4))
    assert with_line.update(2, 16, 1).seconds == pytest.approx(0.012)
    assert with_line.update(2, 16, 2).seconds == 0.015  # measured
    assert with_line.update(2, 16, 4).seconds == pytest.approx(0.048)


def test_a_line_is_fitted_and_has_no_negative_part():
    line = fitted([(b, 2e-3 + 3e-5 * b) for b in (2, 16, 128)])
    assert line == pytest.approx((2e-3, 3e-5), rel=1e-9)
    assert fitted([(1, 1.0), (10, 20.0)]).fixed == 0
    falling = fitted([(1, 2.0), (10, 1.0)])
    assert falling.each == 0 and 1 < falling.fixed < 2
    assert fitted([(4, 2.0)]) == (0, 0.5)


def row(ranks, time, alone=1.0):
    return Row(ranks, 1, 1, ranks, 1.0, alone, 1.0, time, time * ranks)


def test_more_ranks_stop_to_help_because_of_the_network_or_of_the_batch():
    rows = [row(1, 1.0), row(2, 0.6), row(4, 0.58, alone=0.9), row(8, 0.59, alone=0.5)]
    found = saturation(rows)
    assert (found.ranks, found.more, found.reason) == (2, 4, "network")
    rows[2] = row(4, 0.58, alone=0.99)
    assert saturation(rows).reason == "batch"
    assert saturation([row(1, 1.0), row(2, 0.6)]) is None
    assert saturation([row(1, 1.0), row(2, 0.98), row(4, 0.5)]) is None
    assert soonest(rows).ranks == 4 and cheapest(rows).ranks == 1


# The cost model.


def model(**changes):
    measured = Measured(2, 16, 1, 0.9, changes.pop("line", None))
    return replace(Model(TWO, PLAIN, 1, "allreduce", "none", measured), **changes)


def test_the_model_predicts_for_the_run_what_the_run_took():
    assert model().update(2, 16, 1).seconds == pytest.approx(0.9, rel=1e-9)
    line = Line(0.5, 0.02)
    for batch in (4, 16, 64):
        assert model(line=line).update(2, batch, 1).seconds == pytest.approx(0.5 + 0.02 * batch, rel=1e-9)
    assert model().update(2, 64, 1).alone == pytest.approx(4 * model().update(2, 16, 1).alone)
    assert model().update(2, 8, 1) is None  # fixed costs are not known


def test_more_ranks_take_longer_over_a_slow_network_and_the_computing_stays():
    slow = model(machine=replace(PLAIN, jitter=0.05))
    one, two, many = (slow.update(n, 16, 1) for n in (1, 2, 64))
    assert one.seconds < two.seconds < many.seconds
    assert one.alone == pytest.approx(many.alone, rel=0.1)


def test_a_calibration_whose_network_alone_takes_longer_is_refused():
    with pytest.raises(UserError, match=r"without computing, an update on 2 rank\(s\) would take 60 ms, but 1 ms"):
        model(measured=Measured(2, 16, 1, 1e-3)).update(2, 16, 1)  # 6 MB of gradients over 100 MB/s


# The learning rate.


def record(**options):
    config = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "lr_scaling": "linear", **options}
    return Record(None, config, 2, 32, 1, 1442, None, 100, 0.01, "none", NoiseScale(100.0, 50.0, math.inf, 90))


@pytest.mark.parametrize("rule", SCALING_RULES)
def test_the_options_and_the_rule_of_the_run_scale_by_the_global_batch(rule):
    options = options_for(record(lr_scaling=rule), Row(4, 32, 1, 128, 1.0, 1.0, 1.0, 1.0, 1.0))
    given = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    run = scale(2, rule, **given)  # two ranks
    advised = scale(4, rule, **{**given, **options})
    wanted = scale(128 / 32, rule, **run._asdict())
    assert advised.lr == pytest.approx(wanted.lr) and advised.eps == pytest.approx(wanted.eps)
    assert advised.betas == pytest.approx(wanted.betas)


def test_a_batch_that_the_rule_cannot_scale_to_is_refused():
    with pytest.raises(UserError, match="below 0"):
        options_for(record(lr_scaling="sqrt"), Row(2, 512, 1, 1024, 1.0, 1.0, 1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        *(("lr", value, r"a number in \[0, inf\)") for value in ("abc", None, -1, math.nan, [1, 2], 10**400)),
        *(("betas", value, r"two numbers in \[0, 1\)") for value in (3, "x", [0.9], [0.9, None], [0.9, 1])),
        ("eps", {}, r"a number in \[0, inf\)"),
    ],
)
def test_an_option_of_the_run_that_is_no_number_is_named_with_its_file(tmp_path, name, value, wanted):
    run = write_run(tmp_path / "run", **{name: value})
    with pytest.raises(UserError, match=rf"run/config\.yaml: {name} is .*: it must be {wanted}") as refusal:
        ask(run)
    assert "\n" not in str(refusal.value)


# The run folder and the command.


def write_run(folder, events=None, **options):
    folder.mkdir()
    start = {"world_size": 2, "global_batch_size": 32, "data": {"train_images": 1442, "classes": ["a", "b"]}}
    rows = [{"event": "start", "step": 0, **start}]
    rows += [step(n, 800.0, 50.0, 40.0, 60.0) for n in (10, 20)]
    rows += [{"event": "resume", "step": 20, **start}]
    rows += [step(30, 100.0, 120.0, 90.0, 160.0), *(step(n, 1600.0, 190.0, 90.0, None) for n in (40, 50, 60))]
    rows += [step(70, 1600.0, None, 90.0, None)]
    text = "".join(json.dumps({"epoch": 1, "time": 0.0, **row}) + "\n" for row in events or rows)
    (folder / "metrics.jsonl").write_text(text)
    config = {"model": "cnn", "lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "lr_scaling": "linear", **options}
    (folder / "config.yaml").write_text(yaml.safe_dump({"accumulate": 1, "batch_size": 16, **config}))
    return folder


def step(number, rate, value, low, high):
    noise = {"noise_scale": value, "noise_scale_low": low, "noise_scale_high": high}
    return {
        "event": "step",
        "step": number,
        "loss": 1.0,
        "images_per_second": rate,
        "compression": "none",
        **noise,
    }


def test_the_last_finite_noise_scale_and_the_speed_of_the_last_job_count(tmp_path):
    read = records.read(str(write_run(tmp_path / "run")))
    assert read.noise == NoiseScale(190.0, 90.0, math.inf, 60)
    assert (read.ranks, read.global_batch, read.micro_batch, read.updates) == (2, 32, 16, 70)
    assert read.seconds == 32 / 1600


def test_a_noise_scale_of_another_form_does_not_count(tmp_path):
    facts = {"world_size": 2, "global_batch_size": 32}
    rows = [
        {"event": "start", "step": 0, **facts, "noise_scale_form": "gradient"},
        step(9, 9.0, 190.0, 90.0, None),
    ]
    resumed = {"event": "resume", "step": 9, **facts, "noise_scale_form": "adam"}
    with pytest.raises(UserError, match="has no finite noise scale"):
        records.read(str(write_run(tmp_path / "early", [*rows, resumed, step(10, 9.0, None, None, None)])))
    rows += [resumed, step(10, 9.0, 40.0, 30.0, 50.0), {**resumed, "step": 10}, step(11, 9.0, None, None, None)]
    assert records.read(str(write_run(tmp_path / "run", rows))).noise == NoiseScale(40.0, 30.0, 50.0, 10)


def test_numbers_that_no_run_can_have_do_not_count(tmp_path):
    facts = {"event": "start", "step": 0, "world_size": 2, "global_batch_size": 32}
    rows = [facts, step(1, -5.0, 7.0, 6.0, 8.0), step(2, 8.0, -5.0, None, 1.0), step(3, 1.7e308, 9.0, 6.0, 9.0)]
    found = records.read(str(write_run(tmp_path / "run", rows)))
    assert (found.seconds, found.noise.value) == (4.0, 9.0)
    rows = [facts, step(1, 5e-324, 7.0, 6.0, 8.0), step(2, 8.0, 9.0, 6.0, 9.0)]
    found = records.read(str(write_run(tmp_path / "slow", rows, accumulate=10**400)))
    assert (found.seconds, found.accumulate) == (4.0, 1)
    with pytest.raises(UserError, match="no start event with global_batch_size"):
        records.read(str(write_run(tmp_path / "huge", [{**facts, "global_batch_size": 10**400}, *rows[1:]])))


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([{"event": "start", "step": 0}], "no start event with world_size"),
        ([{"event": "start", "step": 0, "world_size": 2, "global_batch_size": 32}], "has logged no updates"),
        (
            [
                {"event": "start", "step": 0, "world_size": 2, "global_batch_size": 32},
                {"event": "step", "step": 1, "images_per_second": 9.0},
            ],
            "has no measurements of the noise scale: resume the run for some hundred updates with --noise-scale 2",
        ),
        (
            [
                {"event": "start", "step": 0, "world_size": 2, "global_batch_size": 32},
                step(9, 9.0, None, None, None),
            ],
            "has no finite noise scale: resume the run for some hundred updates more",
        ),
    ],
)
def test_a_run_without_what_is_needed_is_refused_with_a_remedy(tmp_path, events, message):
    with pytest.raises(UserError, match=message) as refusal:
        records.read(str(write_run(tmp_path / "run", events)))
    assert "\n" not in str(refusal.value)


def ask(*argv):
    advise(parse(AdviseConfig, "hvd_adam.advise", list(map(str, argv)), needs_extra=True))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "0 run folders given: give one"),
        (["a", "b"], "2 run folders given"),
        (["nowhere"], "there is no folder nowhere"),
        (["a", "--ranks", "2"], "--ranks has no effect without --calibration"),
        (["a", "--bandwidth", "1Gbit"], "--bandwidth has no effect without --calibration"),
        (["a", "--np", "2"], "--np has no effect without --measure or --confirm"),
        (["a", "--samples", "2"], "--samples has no effect without --confirm"),
        (["a", "--batches", "8,x"], "--batches is '8,x': it must be 1 to 64 numbers"),
        (["a", "--batches", ","], "--batches is ','"),
        (["a", "--calibration", "c", "--ranks", "0"], "--ranks is '0'"),
        (["a", "--batches", "1" * 5000], "--batches is '111"),
        (["a", "--calibration", "c", "--ranks", "1" * 5000], "--ranks is '111"),
        (["a", "--price", "-1"], "--price is -1"),
        (["a", "--price", "1e308"], r"--price is 1e\+308: it must be from 0 to 1e\+09"),
        (["a", "--confirm", "--candidates", "1"], "--candidates is 1: it must be at least 2"),
    ],
)
def test_bad_options_are_refused_in_one_line(argv, message):
    with pytest.raises(UserError, match=message) as refusal:
        ask(*argv)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500


def test_batches_beyond_an_epoch_and_ranks_that_do_not_divide_the_batch_are_refused(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"--batches 2000: an epoch of .* has only 1442 samples"):
        ask(run, "--batches", 2000)
    with pytest.raises(UserError, match="--np 3: the 32 samples of an update do not divide by 3 ranks"):
        ask(run, "--measure", "--np", 3)
    with pytest.raises(UserError, match="no checkpoint in"):  # after which --np is no obstacle
        ask(run, "--measure", "--np", 4, "--batches", 8)
    with pytest.raises(UserError, match="no checkpoint in"):
        ask(run, "--measure")


def test_a_noise_scale_that_is_only_known_to_be_large_counts_as_infinite(tmp_path, capsys):
    start = {"event": "start", "step": 0, "world_size": 2, "global_batch_size": 32}
    run = write_run(tmp_path / "run", [start, step(9, 1600.0, None, 70.0, None)])
    assert records.read(str(run)).noise == NoiseScale(math.inf, 70.0, math.inf, 9)
    ask(run)
    text = capsys.readouterr().out
    assert "noise scale infinity samples (95 % interval 70 to infinity)" in text
    assert "so it is taken to be infinite" in text and "4 ranks 0.50 and 1.00" in text
    ask(run, "--json")
    assert json.loads(capsys.readouterr().out)["noise_scale"]["value"] is None


def test_numbers_that_cannot_be_used_are_named_and_refused_if_none_is_left(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="--batches 33: more than an epoch, or no whole number of equal micro-"):
        ask(run, "--batches", 33)
    with pytest.raises(UserError, match="--most-samples 8: the run itself has 16"):
        ask(run, "--most-samples", 8)
    ask(run, "--batches", "16,33,64,2000")
    logged = capsys.readouterr().err
    assert "left out: --batches 33,2000: more than an epoch" in logged
    assert "not in the table: --batches 16,33,2000, of which no time is known" in logged
    file = tmp_path / "calibration.json"
    file.write_text(Calibration(replace(PLAIN, jitter=0.01), {"cnn": TWO}, 1, {"device": "none"}).to_json())
    with pytest.raises(UserError, match="--ranks 3,1000: no batch divides by them"):
        ask(run, "--calibration", file, "--ranks", "3,1000", "--batches", "32,64")
    rows = [
        {"event": "start", "step": 0, "world_size": 2, "global_batch_size": 32},
        step(60, 40.0, 190.0, 90.0, 400.0),
    ]
    slow = write_run(tmp_path / "slow", rows)
    ask(slow, "--calibration", file, "--ranks", "4,1000", "--batches", "64,128")
    output = capsys.readouterr()
    assert "left out: --ranks 1000: no batch divides by them" in output.err
    assert "of each number of ranks the soonest batch is shown: --json has all" in output.out


def test_a_calibration_of_another_model_of_the_same_name_is_refused(tmp_path, capsys):
    file = tmp_path / "calibration.json"
    file.write_text(Calibration(replace(PLAIN, jitter=0.01), {"cnn": TWO}, 1, {"device": "none"}).to_json())
    start = {"event": "start", "step": 0, "world_size": 2, "global_batch_size": 32}
    rows = [start, step(60, 40.0, 190.0, 90.0, 400.0)]
    ask(write_run(tmp_path / "earlier", rows), "--calibration", file)
    known = f"its cnn has {TWO.elements:,} parameters; {tmp_path / 'earlier'} does not record"
    assert known in capsys.readouterr().err
    rows[0] = {**start, "parameters": TWO.elements}
    ask(write_run(tmp_path / "same", rows), "--calibration", file)
    assert capsys.readouterr().err == ""
    rows[0] = {**start, "parameters": 4810}
    with pytest.raises(UserError, match="calibrate with the --image-size, --channels and --classes of the run"):
        ask(write_run(tmp_path / "other", rows), "--calibration", file)


def test_without_a_cost_model_only_upper_bounds_are_shown(tmp_path, capsys):
    ask(write_run(tmp_path / "run"))
    text = capsys.readouterr().out
    assert "noise scale 190 samples (95 % interval 90 to infinity)" in text and "20 ms per update" in text
    assert "this run" in text and "soonest" not in text.split("\n\n")[1]
    assert "no batch is known to be sooner" in text and "use --measure, or --calibration" in text
    assert "4 ranks 0.57 and 1.14" in text  # (1 + 190/64) / (1 + 190/32)
    ask(write_run(tmp_path / "adam", noise_scale_form="adam"))
    assert "noise scale of Adam's update 190 samples" in capsys.readouterr().out


def test_with_a_calibration_ranks_are_compared_and_priced(tmp_path, capsys):
    file = tmp_path / "calibration.json"
    file.write_text(Calibration(replace(PLAIN, jitter=0.01), {"cnn": TWO}, 1, {"device": "none"}).to_json())
    rows = [
        {"event": "start", "step": 0, "world_size": 2, "global_batch_size": 32},
        step(60, 40.0, 190.0, 90.0, 400.0),
    ]
    run = write_run(tmp_path / "run", rows)
    options = (run, "--calibration", file, "--ranks", "1,2,8,64", "--price", "3")
    ask(*options)
    text = capsys.readouterr().out
    assert "this run" in text and "soonest" in text and "cheapest" in text and "price so far" in text
    ask(*options, "--json")
    fast = json.loads(capsys.readouterr().out)
    own = next(row for row in fast["rows"] if (row["ranks"], row["global_batch"]) == (2, 32))
    assert own["relative_time"] == 1 and own["seconds"] == pytest.approx(0.8)
    assert own["price"] == pytest.approx(3 * 2 * 0.8 * 60 / 3600)
    assert fast["cheapest"]["relative_cost"] <= fast["soonest"]["relative_cost"]
    ask(*options, "--bandwidth", "300Mbit", "--json")
    slow = json.loads(capsys.readouterr().out)
    times = [
        {(row["ranks"], row["global_batch"]): row["seconds"] for row in each["rows"]} for each in (fast, slow)
    ]
    assert times[1][64, 1024] > times[0][64, 1024]
    assert slow["saturation"] is None or slow["saturation"]["reason"] in ("network", "batch")
    with pytest.raises(UserError, match="--model mlp is not in"):
        ask(write_run(tmp_path / "other", rows, model="mlp"), "--calibration", file)
