"""The "hvd_adam" logger: which ranks print, to which stream, and in how many writes.

Hazards: a line that every rank prints; a warning in the output that other programs read; a line that a launcher
splits because it is written in parts; a progress bar that remains in the middle of a line;
a command that ends because nobody reads its output any more.
"""

import logging
import os
import subprocess
import sys

import pytest

from hvd_adam import log


@pytest.fixture
def logger(monkeypatch):
    """The logger as commands set it up; restored at the end of the test."""
    monkeypatch.setattr(log.logger, "handlers", [])
    monkeypatch.setattr(log.logger, "propagate", True)
    level = log.logger.level
    log.setup()
    yield log.logger
    log.setup()
    log.set_progress_bar(None)
    log.logger.setLevel(level)


def test_messages_go_to_stdout_and_warnings_to_stderr_with_their_level(logger, capsys):
    logger.info("epoch 1")
    logger.warning("disk full")
    assert capsys.readouterr() == ("epoch 1\n", "hvd_adam: warning: disk full\n")
    log.setup(info_on_stderr=True)
    logger.info("epoch 2")
    assert capsys.readouterr() == ("", "epoch 2\n")


def test_other_ranks_print_only_records_for_all_ranks(logger, capsys, monkeypatch):
    monkeypatch.setattr(log, "current_rank", lambda: 1)
    logger.info("epoch 1")
    logger.warning("of every rank")
    logger.warning("of rank 1", extra=log.ALL_RANKS)
    assert capsys.readouterr() == ("", "hvd_adam: warning: of rank 1\n")


def test_a_line_is_one_write_between_clear_and_refresh_of_the_progress_bar(logger, monkeypatch):
    calls = []

    class Recorder:
        def clear(self):
            calls.append("clear")

        def refresh(self):
            calls.append("refresh")

        def write(self, text):
            calls.append(text)

        def flush(self):
            calls.append("flush")

    log.set_progress_bar(Recorder())
    monkeypatch.setattr("sys.stdout", Recorder())
    logger.info("epoch 1")
    assert calls == ["clear", "epoch 1\n", "flush", "refresh"]


def test_without_setup_records_follow_the_applications_configuration(caplog):
    with caplog.at_level(logging.INFO, logger="hvd_adam"):
        log.logger.info("epoch 1")
    assert caplog.messages == ["epoch 1"]


COMMAND = """if True:
    from dataclasses import dataclass
    from hvd_adam.cli import run
    from hvd_adam.log import logger

    @dataclass
    class Config:
        pass

    def main(_):
        for update in range(3):
            logger.info(f"update {update} \\u2265 0")
        open("done", "w").close()

    run(main, Config, "command", [])
"""


WARNING = "hvd_adam: warning: cannot write to stdout (%s); the command continues\n"


@pytest.mark.parametrize(
    ("redirection", "environ", "errors"),
    [
        (">&-", {}, ""),
        (">&- 2>&- <&-", {}, ""),
        ("> /dev/full", {}, WARNING % "No space left on device"),
        ("> /dev/full 2> /dev/full", {}, ""),
        ("> >(exit)", {}, WARNING % "Broken pipe"),
        ("", {"PYTHONIOENCODING": "latin-1"}, ""),
        ("", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, ""),
    ],
)
def test_a_command_completes_wherever_its_output_goes(redirection, environ, errors, tmp_path):
    script = f'exec {redirection}; sleep 0.1; exec "$@"'  # until the reader of the pipe has ended
    done = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, "-c", COMMAND],
        env={**os.environ, **environ},
        cwd=tmp_path,
        capture_output=True,
        encoding="latin-1",
    )
    assert (done.returncode, done.stderr) == (0, errors)
    assert (tmp_path / "done").exists()
    assert done.stdout == ("" if redirection else "".join(f"update {i} \\u2265 0\n" for i in range(3)))


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_result_that_cannot_be_written_is_an_error(buffered, tmp_path):
    code = COMMAND.replace("logger.info(", "write_result(").replace("import logger", "import write_result")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": buffered},
            text=True,
            cwd=tmp_path,
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "command: error: cannot write to stdout (No space left on device)" in done.stderr


def test_help_that_nobody_reads_ends_without_a_traceback(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hvd_adam.train", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": ""},
            text=True,
        )
    assert (done.returncode, done.stderr) == (
        2,
        "hvd_adam.train: error: cannot write to stdout (No space left on device)\n",
    )
