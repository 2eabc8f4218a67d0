"""Parametrization of tests by the strategy of `distribute`."""

import pytest

from hvd_adam.distributed.api import STRATEGIES

each_strategy = pytest.mark.parametrize("strategy", list(STRATEGIES))
