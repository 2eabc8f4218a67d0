"""The "hvd_adam" logger: which ranks print, to which stream, and in how many writes.

Hazards: a line that every rank prints; a warning in the output that other programs read; a line that a launcher
splits because it is written in parts; a progress bar that remains in the middle of a line.
"""

import logging

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
