"""Imports without garbage collection.

Hazards: a collector that stays off, after an error too, or is turned on where the user had turned it off.
"""

import gc

import pytest

from hvd_adam.loading import loading_modules


@pytest.fixture(autouse=True)
def collector():
    yield
    gc.unfreeze()
    gc.enable()


def test_the_collector_rests_in_the_block_and_ignores_what_was_imported_afterwards():
    frozen = gc.get_freeze_count()
    with loading_modules():
        assert not gc.isenabled()
        imported = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(imported)


def test_the_collector_is_on_again_after_an_error():
    with pytest.raises(ImportError), loading_modules():
        raise ImportError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    with loading_modules():
        pass
    assert not gc.isenabled()
