"""`python -m hvd_adam.report`: one HTML page about runs, and the input that it refuses.

Hazards: a page that needs a network, or whose charts are empty in some mode; a run whose curve is missing; text
from a run's files that becomes markup or a script; a comparison of runs of different tasks; a spike or a gap
that disappears from a long curve; pictures that the page's own policy forbids; a page of many megabytes; bad
input that ends in a traceback or a half-written page.
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from helpers import browser as browsers
from helpers.training_runs import ROOT, one_line

from hvd_adam.arguments import parse
from hvd_adam.config import ReportConfig
from hvd_adam.errors import UserError
from hvd_adam.log import logger
from hvd_adam.report.command import write_report
from hvd_adam.report.curves import chart_data, thin
from hvd_adam.report.page import render
from hvd_adam.report.runs import MOST_PICTURES, Run, load_runs
from hvd_adam.report.summary import options, scores
from hvd_adam.training.scores import mistakes_file
from hvd_adam.training.scores.mistakes import Mistake

HOSTILE = "</script><script>window.injected = 1</script><img src=x onerror='window.injected = 1'>"
COLORS = {"light": ("rgb(0, 114, 178)", "rgb(213, 94, 0)"), "dark": ("rgb(78, 168, 222)", "rgb(255, 133, 52)")}


def events_of_a_run(steps=200, classes=("cat", "dog"), slope=1.0):
    """Returns a run of 2 epochs that has skipped an update and was resumed in the middle."""
    facts = {"world_size": 2, "launcher": "horovodrun", "global_batch_size": 64, "total_steps": steps}
    facts["versions"] = {"hvd_adam": "0.1.0", "torch": "2.13.0"}
    facts["data"] = {"classes": list(classes), "test_images": 6, "fingerprint": "f"}
    rows = [{"event": "start", "step": 0, "epoch": 0, "time": 1000.0, **facts}]
    for step in range(10, steps + 1, 10):
        values = {"loss": 2.0 / (1 + slope * step), "lr": 1e-3 * slope, "grad_norm": 5.0 / step}
        rows.append({"event": "step", "step": step, "time": 1000.0 + step, **values, "images_per_second": 900.0})
        if step == 30:
            rows.append({"event": "skip", "step": 31, "time": 1031.0, "reason": "norm is inf", "skipped": 1})
        if step in (steps // 2, steps):
            confusion = [[int(i == j) + 1 for j in range(len(classes))] for i in range(len(classes))]
            test = {"test_loss": 0.5 * slope, "test_accuracy": step / steps * 0.9, "test_balanced_accuracy": 0.4}
            test |= {"test_ece": 0.0625, "confusion": confusion, "recall": [n / 60 for n in range(len(classes))]}
            test["calibration"] = [[0, None, None]] * 13 + [[2, 0.9, 0.5], [4, 0.975, 1.0]]
            rows.append({"event": "eval", "step": step, "time": 1001.0 + step, **test})
            rows.append({"event": "checkpoint", "step": step, "time": 1001.0 + step, "path": "checkpoints/step-1"})
        if step == steps // 2:
            rows.append({"event": "resume", "step": step, "time": 5000.0, "path": "checkpoints/step-1", **facts})
    rows.append({"event": "end", "step": steps, "time": 1002.0 + steps, "images_per_second": 850.0})
    return rows


def write_run(folder, rows=None, head="# Command line: python -m hvd_adam.train\n", **options):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or events_of_a_run()))
    config = {"dataset": "digits", "lr": 1e-3, "betas": [0.9, 0.999], "output_dir": str(folder), **options}
    (folder / "config.yaml").write_text(head + yaml.safe_dump(config))
    return folder


def write_mistakes(folder, count=3, side=8, classes=("cat", "dog")):
    noise = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    mistakes_file.write(
        folder, 200, [Mistake(n, 0, 1, 0.875, picture) for n, picture in enumerate(noise)], classes
    )
    return folder


def report(*argv):
    write_report(parse(ReportConfig, "hvd_adam.report", list(map(str, argv)), needs_extra=True))


def refused(*argv):
    with pytest.raises(UserError) as error:
        report(*argv)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of two runs."""
    folder = tmp_path_factory.mktemp("report")
    runs = [write_run(folder / "first"), write_run(folder / "second", events_of_a_run(slope=3.0), lr=3e-3)]
    for run, count in zip(runs, (3, 24), strict=True):
        write_mistakes(run, count)
    report(*runs, "--output", folder / "two runs.html")
    return folder / "two runs.html"


# In a browser.


@pytest.fixture(scope="module")
def browser():
    if missing := browsers.missing():
        pytest.skip(f"no browser: {missing} missing; bash launch/setup.sh --dev installs it on Debian")
    with browsers.Browser() as browser:
        yield browser


def drawn_colors(browser, panel):
    """Returns the colors in the chart of a panel."""
    code = """(() => {
        const canvas = document.querySelectorAll("figure canvas")[arguments[0]];
        const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
        copy.drawImage(canvas, 0, 0);
        const {data} = copy.getImageData(0, 0, canvas.width, canvas.height);
        const colors = new Set();
        for (let at = 0; at < data.length; at += 4)
            if (data[at + 3] === 255) colors.add(`rgb(${data[at]}, ${data[at + 1]}, ${data[at + 2]})`);
        return [...colors];
    })()"""
    return set(browser.run(code, panel))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_every_chart_shows_both_runs_without_errors_requests_or_a_page_that_is_too_wide(
    browser, page, scheme, width
):
    browser.open(page, scheme, width)
    assert browser.texts("figcaption .quiet") == [
        "cross-entropy (nats)",
        "correct (%)",
        "",
        "images/s",
        "2-norm, before clipping",
    ]
    for panel in range(5):
        assert drawn_colors(browser, panel) >= set(COLORS[scheme][1:])  # the second run, drawn over the first
    assert drawn_colors(browser, 0) >= set(COLORS[scheme])
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    widths = browser.run("[...document.images].map((image) => image.naturalWidth)")
    assert widths == [8] * 27  # decoded: the policy allows them
    bars = browser.run("[...document.querySelectorAll('.diagram rect')].map((bar) => getComputedStyle(bar).fill)")
    assert bars == [color for color in COLORS[scheme] for _ in range(2)]
    assert browser.run("performance.getEntriesByType('resource').length") == 0
    assert browser.console() == []


def test_buttons_keys_and_dragging_zoom_all_charts(browser, page):
    from selenium.webdriver import ActionChains, Keys

    browser.open(page)
    shown = browser.find("#shown")
    assert shown.text == "updates 10 to 200"
    whole = [browser.run("document.querySelectorAll('canvas')[arguments[0]].toDataURL()", n) for n in range(5)]
    browser.find("[data-zoom=in]").click()
    assert shown.text == "updates 58 to 152"
    zoomed = [browser.run("document.querySelectorAll('canvas')[arguments[0]].toDataURL()", n) for n in range(5)]
    assert all(one != other for one, other in zip(whole, zoomed, strict=True))
    browser.find("[data-zoom=left]").send_keys(Keys.ENTER)
    assert shown.text == "updates 34 to 128"
    chart = browser.find(".chart")
    chart.send_keys("0")
    assert shown.text == "updates 10 to 200"
    chart.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)  # the cursor, and with it the values below the chart
    assert browser.texts(".u-legend .u-series")[:3] == ["update20", "first, training0.095238", "first, test–"]
    area = browser.find(".u-over")
    ActionChains(browser.driver).drag_and_drop_by_offset(area, 100, 0).perform()
    first, last = (int(word) for word in shown.text.split() if word.isdigit())
    assert 10 < first < last < 200
    ActionChains(browser.driver).double_click(area).perform()
    assert shown.text == "updates 10 to 200"
    assert browser.console() == []


def test_runs_can_be_hidden_and_a_logarithmic_axis_switched_off(browser, page):
    browser.open(page)
    first, second = COLORS["light"]
    browser.find("[data-run='1']").click()
    assert first in drawn_colors(browser, 2) and second not in drawn_colors(browser, 2)
    log, before = browser.find(".log"), browser.run("document.querySelector('canvas').toDataURL()")
    assert log.get_attribute("aria-pressed") == "true"  # the losses differ by more than a factor of 3
    log.click()
    assert log.get_attribute("aria-pressed") == "false"
    assert browser.run("document.querySelector('canvas').toDataURL()") != before
    assert browser.console() == []


def test_a_page_in_dark_colors_is_printed_in_light_ones(browser, page):
    browser.open(page, "dark")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert drawn_colors(browser, 0) >= set(COLORS["light"])
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert drawn_colors(browser, 0) >= set(COLORS["dark"])


def test_text_of_a_run_stays_text(browser, tmp_path):
    name = HOSTILE.replace("/", "∕")  # a folder's name has no slash
    rows = events_of_a_run(classes=(HOSTILE, "dog"))
    rows[1]["loss"] = HOSTILE
    rows[2] = {**rows[2], "event": "skip", "reason": HOSTILE}
    runs = [
        write_run(tmp_path / name, rows, head=f"# Command line: {HOSTILE}\n", model=HOSTILE, **{HOSTILE: 1}),
        write_run(tmp_path / "other", events_of_a_run(classes=(HOSTILE, "dog"))),
    ]
    write_mistakes(runs[0], 1, classes=(HOSTILE, HOSTILE))
    report(*runs, "--output", tmp_path / "report.html")
    browser.open(tmp_path / "report.html")
    assert browser.run("window.injected") is None
    assert browser.console() == []
    assert len(browser.texts("script")) == 3 and len(browser.texts("img")) == 1
    assert browser.texts("#mistakes strong") == [HOSTILE, HOSTILE]
    assert browser.texts("#recall tbody th") == [HOSTILE, "dog"]
    assert browser.texts(".confusion tbody th")[0] == browser.texts("#differences tbody td")[1].replace(
        "–", HOSTILE
    )
    assert browser.texts("#differences thead th")[1] == name


# What the page says.


def test_the_differences_between_the_configurations_are_listed_and_nothing_else(page):
    text = page.read_text()
    section = text[text.index('<section id="differences">') :].partition("</section>")[0]
    names = [part.partition("<")[0] for part in section.split('<th scope="row"><code>')[1:]]
    assert names == ["lr"]
    assert "<code>0.001</code>" in section and "<code>0.003</code>" in section


def test_times_that_no_clock_has_give_no_duration(tmp_path):
    rows = [{**row, "time": -1.7e308 if row["event"] == "start" else 1.7e308} for row in events_of_a_run()]
    (run,) = load_runs([str(write_run(tmp_path / "run", rows))])
    assert scores(run)["training time"] == "–"


def test_options_that_differ_in_a_late_digit_differ(tmp_path):
    runs = [str(write_run(tmp_path / name, lr=lr)) for name, lr in (("a", 0.00123456711), ("b", 0.00123456712))]
    rows = {row["name"]: row for row in options(load_runs(runs))}
    assert rows["lr"]["different"] and rows["lr"]["values"] == ["0.00123456711", "0.00123456712"]
    assert not rows["betas"]["different"] and rows["betas"]["values"][0] == "0.9, 0.999"


def test_scores_events_and_confusion_of_each_run_are_shown(page):
    text = page.read_text()
    for part in (
        "90.00 %",
        "200 of 200",
        "850",
        "finished",
        "after update 31: norm is inf",
        "resumed after update 100",
    ):
        assert text.count(part) >= 2, part  # once for each run
    assert "python -m hvd_adam.train" in text and "hvd_adam 0.1.0, torch 2.13.0" in text
    assert 'title="cat as dog: 1"' in text
    assert "0.0625" in text and "probability 0.93 to 1.00: 4 samples, mean probability 0.975" in text
    assert "3 min" in text  # training time: the hour in which the run was stopped does not count


def test_a_run_in_progress_is_shown_and_its_incomplete_last_line_is_not_damage(tmp_path):
    run = write_run(tmp_path / "run", events_of_a_run()[:4])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    (run / "config.yaml").unlink()
    (loaded,) = load_runs([str(run)])
    assert (len(loaded.events), loaded.damaged_lines) == (4, 0)
    text = render([loaded])
    assert "not finished" in text and "30 of 200" in text and "has no config.yaml" in text


def test_damaged_lines_are_counted_and_values_of_the_wrong_kind_are_gaps(tmp_path):
    run = write_run(tmp_path / "run")
    rows = (run / "metrics.jsonl").read_text().splitlines()
    rows[1] = json.dumps({"event": "step", "step": 10, "loss": "high", "lr": [1], "images_per_second": True})
    rows[2:2] = ["\0\0\0", "7", '{"event": "step"}', '{"event": "step", "step": 15, "loss": NaN}']
    (run / "metrics.jsonl").write_bytes("\n".join([*rows, ""]).encode() + b"\xff\xfe\n")
    (loaded,) = load_runs([str(run)])
    assert loaded.damaged_lines == 4
    assert "4 damaged line(s)" in render([loaded])
    (loss,) = [curve for curve in chart_data([loaded])["panels"][0]["series"] if curve["label"] == "training"]
    assert (loss["x"][:3], loss["y"][:2]) == ([10, 15, 20], [None, None])


def test_a_long_curve_keeps_its_spikes_and_gaps():
    points = [(step, 1.0) for step in range(100_000)]
    points[31_234], points[77_777] = (31_234, 50.0), (77_777, None)
    steps, values = thin(points, 400)
    assert len(steps) <= 400 and steps == sorted(set(steps)) and steps[0] == 0
    assert (31_234, 50.0) in zip(steps, values, strict=True) and (77_777, None) in zip(steps, values, strict=True)


def test_the_page_of_many_long_runs_is_below_5_megabytes(tmp_path):
    rows = events_of_a_run(steps=60_000, classes=[f"class {n}" for n in range(50)])
    found = mistakes_file.read(
        write_mistakes(tmp_path, 24, side=64), MOST_PICTURES // 20
    )  # noise, the largest files
    runs = [Run(f"run {n}", tmp_path, rows, 0, {"seed": n}, {}, found) for n in range(20)]
    text = render(runs)
    assert len(text) < 5e6 and text.count("<img ") == MOST_PICTURES // 20 * 20


def test_the_recall_of_many_classes_is_that_of_the_worst_ones(tmp_path):
    rows = events_of_a_run(classes=[f"class {n}" for n in range(50)])
    rows[-3 if rows[-3]["event"] == "eval" else -4]["recall"] = [None, *(1 - n / 60 for n in range(1, 50))]
    text = render([Run("run", tmp_path, rows, 0, {}, {})])
    section = text[text.index('<section id="recall">') :].partition("</section>")[0]
    assert re.findall(r'<th scope="row">class (\d+)</th>', section) == [str(n) for n in range(49, 29, -1)]
    assert "30 of 50 classes are left out" in section


def test_runs_without_recall_calibration_and_mistakes_and_damaged_ones_have_no_such_sections(
    tmp_path, monkeypatch
):
    warnings = []
    monkeypatch.setattr(logger, "warning", warnings.append)
    rows = events_of_a_run()
    for row in rows:
        row |= {"recall": [0.5], "calibration": [[1, 2, "<b>"]]} if row["event"] == "eval" else {}
    run = write_mistakes(write_run(tmp_path / "run", rows))
    (run / "mistakes-00000200.png").write_bytes(b"\x89PNG")
    old = [{key: row[key] for key in row if key not in ("recall", "calibration", "test_ece")} for row in rows]
    for folder in (run, write_run(tmp_path / "old", old)):
        text = render(load_runs([str(folder)]))
        assert not [part for part in ("recall", "reliability", "mistakes") if f'<section id="{part}">' in text]
        assert "confusion matrix of" in text.lower()
    assert len(warnings) == 1 and "mistakes.json or its picture is damaged" in warnings[0]


def test_the_page_is_written_without_torch_and_options_may_stand_anywhere(tmp_path):
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "other" / "first")
    code = """
import runpy, sys
try:
    runpy.run_module("hvd_adam", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
assert not {"torch", "horovod", "tensorboard"} & sys.modules.keys()
"""
    argv = ["report", first, "--output", tmp_path / "page.html", "--no-force", second]
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'page.html'}: 2 runs, ")
    text = (tmp_path / "page.html").read_text()
    assert str(first) in text and str(second) in text  # runs of the same name are shown by their paths
    code = code.replace("assert not end.code, end.code", "raise")
    again = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True)
    assert "page.html exists" in one_line(again) and "--force" in one_line(again)


# Bad input.


def test_folders_that_are_no_runs_are_refused(tmp_path):
    write_run(tmp_path / "runs" / "one")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"event": "st')
    output = ("--output", tmp_path / "report.html")
    assert "no run folder given" in refused(*output)
    assert f"there is no folder {tmp_path / 'no'}" in refused(tmp_path / "no", *output)
    assert f"it contains runs, such as {tmp_path / 'runs/one'}" in refused(tmp_path / "runs", *output)
    assert "is a file: give its run folder" in refused(tmp_path / "runs/one/metrics.jsonl", *output)
    assert "has no events" in refused(tmp_path / "empty", *output)
    assert "is given twice" in refused(tmp_path / "runs/one", tmp_path / "runs/../runs/one", *output)
    assert "21 run folders given" in refused(*["run"] * 21, *output)
    assert "NOWHERE is not set" in refused("$NOWHERE/run", *output)
    (tmp_path / "runs/one/config.yaml").write_text("a: [1\n")
    assert "config.yaml, line 2: this is not valid YAML" in refused(tmp_path / "runs/one", *output)
    assert not (tmp_path / "report.html").exists()


def test_names_and_numbers_of_any_kind_are_shown(tmp_path):
    folder = write_run(tmp_path / os.fsdecode(b"byte\xff"))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "checkpoint_failed", "step": 1, "reason": "\\ud800"}\n')
        file.write('{"event": "step", "step": 2, "loss": 1%s}\n' % ("0" * 400))
    report(folder, "--output", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "byte\\udcff" in text and "\\ud800" in text
    (folder / "config.yaml").write_text("a: &a [*a]\n")
    assert "this is not valid YAML" in refused(folder, "--output", tmp_path / "other.html")


@pytest.mark.parametrize(
    "value",
    ['!!int ""', '!!float ""', '!!bool "x"', '!!timestamp "x"', "0x" + "f" * 20_000, "9" * 5000],
    ids=lambda value: value[:14],
)
def test_an_option_that_cannot_be_read_or_shown_is_refused_by_its_line(tmp_path, value):
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text(f"lr: 0.1\na: {value}\n")
    message = refused(folder, "--output", tmp_path / "report.html")
    assert "config.yaml, line 2: this is not valid YAML (this value is not of its kind" in message
    assert "repair or remove the file" in message and len(message) < 400


def test_a_loop_of_symbolic_links_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    message = refused(tmp_path / "loop", "--output", tmp_path / "report.html")
    assert f"{tmp_path / 'loop'}" in message and "give a run folder of hvd_adam.train" in message


def test_a_picture_that_is_a_named_pipe_is_left_out_without_waiting_for_it(tmp_path):
    folder = write_mistakes(write_run(tmp_path / "run"))
    (picture,) = folder.glob("mistakes-*.png")
    picture.unlink()
    os.mkfifo(picture)
    argv = ["-m", "hvd_adam.report", folder, "--output", tmp_path / "report.html"]
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "is not a file" in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["test_images", "fingerprint"])
def test_facts_of_the_data_of_another_kind_are_compared(tmp_path, name):
    rows = events_of_a_run()
    for row in rows:
        row |= {"data": {**row["data"], name: [1]}} if "data" in row else {}
    others = [write_run(tmp_path / "first"), write_run(tmp_path / "second", rows)]
    assert "may not be comparable" in render(load_runs(list(map(str, others))))


def test_a_page_that_exists_or_cannot_be_written_is_refused_before_runs_are_read(tmp_path):
    (tmp_path / "report.html").write_text("kept")
    assert "exists" in refused("no-run", "--output", tmp_path / "report.html")
    assert "is a folder" in refused("no-run", "--output", tmp_path)
    assert f"there is no folder {tmp_path / 'no'}" in refused("no-run", "--output", tmp_path / "no/report.html")
    assert (tmp_path / "report.html").read_text() == "kept"
    report(write_run(tmp_path / "run"), "--output", tmp_path / "report.html", "--force")
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "checkpoints/step-00000001/state.pt"])
def test_a_file_of_a_run_is_not_replaced(tmp_path, name):
    run = write_run(tmp_path / "run")
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    for file in ("state.pt", "manifest.json"):
        (run / "checkpoints" / "step-00000001" / file).write_text("kept")
    before = (run / name).read_text()
    assert f"--output {run / name} is a file of the " in refused(run, "--output", run / name, "--force")
    assert (run / name).read_text() == before
    report(run, "--output", run / "report.html")  # as other files in its folder


def test_runs_with_other_classes_are_refused_and_those_with_other_images_get_a_warning(tmp_path):
    pets = write_run(tmp_path / "pets")
    digits = write_run(tmp_path / "digits", events_of_a_run(classes="012"))
    message = refused(pets, digits, "--output", tmp_path / "report.html")
    assert "2 classes (cat, dog)" in message and "3 classes (0, 1, 2)" in message
    rows = events_of_a_run()
    for row in rows:
        if "data" in row:
            row["data"]["fingerprint"] = "another"
    others = write_run(tmp_path / "others", rows)
    assert "the training images differ" in render(load_runs([str(pets), str(others)]))
    old = [{key: value for key, value in row.items() if key != "data"} for row in events_of_a_run()]
    for row in (rows := events_of_a_run()):
        row |= {"start": {"loss_function": "mine:loss"}, "eval": {"test_top5": 0.987654}}.get(row["event"], {})
    own = load_runs(
        [str(pets), str(write_run(tmp_path / "own", [row for row in rows if row["event"] != "resume"]))]
    )
    assert "the loss functions differ" in render(own) and "<td>0.98765</td>" in render(own)
    panels = [(panel["title"], panel["unit"]) for panel in chart_data(own)["panels"]]
    assert panels[:3:2] == [("loss", "cross-entropy, mine:loss"), ("test top5", "")]
    before = write_run(tmp_path / "before", old, dataset="cifar10")  # of a release that recorded no classes
    assert "the options of the data set differ" in render(load_runs([str(pets), str(before)]))
    assert "may not be comparable" not in render(load_runs([str(pets)]))
