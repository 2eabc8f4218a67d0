"""Configurations of the commands, as typed dataclasses that check their ranges. Imports no torch."""

from hvd_adam.config.advise import AdviseConfig
from hvd_adam.config.checkpoint import CheckpointConfig
from hvd_adam.config.data import DataConfig
from hvd_adam.config.evaluate import EvaluateConfig
from hvd_adam.config.export import ExportConfig
from hvd_adam.config.functions import metric_names
from hvd_adam.config.options import option, positive_integer, require
from hvd_adam.config.predict import PredictConfig
from hvd_adam.config.report import ReportConfig
from hvd_adam.config.train import PRECISIONS, TrainConfig

__all__ = [
    "PRECISIONS",
    "AdviseConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvaluateConfig",
    "ExportConfig",
    "PredictConfig",
    "ReportConfig",
    "TrainConfig",
    "metric_names",
    "option",
    "positive_integer",
    "require",
]
