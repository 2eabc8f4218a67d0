"""Configurations of the commands, as typed dataclasses that check their ranges. Imports no torch."""

from hvd_adam.config.data import DataConfig
from hvd_adam.config.evaluate import EvaluateConfig
from hvd_adam.config.functions import metric_names
from hvd_adam.config.options import option, require
from hvd_adam.config.report import ReportConfig
from hvd_adam.config.train import PRECISIONS, TrainConfig

__all__ = [
    "PRECISIONS",
    "DataConfig",
    "EvaluateConfig",
    "ReportConfig",
    "TrainConfig",
    "metric_names",
    "option",
    "require",
]
