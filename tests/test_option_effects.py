"""Options without an effect are refused by name.

Hazards: a folder of photos that is ignored while digits are trained; an option refused in a file that a run
or `--print-config` has written; an option that another number of ranks needs.
"""

from dataclasses import fields

import pytest

from hvd_adam.arguments import parse
from hvd_adam.config import EvaluateConfig, TrainConfig
from hvd_adam.config.effects import RULES
from hvd_adam.data import load
from hvd_adam.data.loader import DeviceLoader
from hvd_adam.errors import UserError
from hvd_adam.training.builders import build_model
from hvd_adam.training.evaluation import _data_config

IDLE = [
    ("--data-dir photos", "--data-dir photos has no effect without --dataset cifar10, imagefolder or"),
    ("--dataset synthetic --data-dir photos", "--data-dir photos"),
    ("--image-size 32", "--image-size 32 has no effect without --dataset imagefolder"),
    ("--dataset cifar10 --cache here", "--cache here has no effect without --dataset imagefolder"),
    ("--dataset cifar10 --max-corrupt 3", "--max-corrupt 3 has no effect without --dataset imagefolder or"),
    ("--workers 2", "--workers 2 has no effect without --dataset imagefolder or"),
    ("--no-download", "--no-download has no effect without --dataset cifar10"),
    ("--dataset mine:load --no-download", "--no-download has no effect"),
    ("--synthetic-shape 1x8x8", "--synthetic-shape 1x8x8 has no effect without --dataset synthetic"),
    ("--synthetic-classes 3", "--synthetic-classes 3"),
    ("--dataset cifar10 --synthetic-samples 9", "--synthetic-samples 9"),
    ("--model mlp --dropout 0.5", "--dropout 0.5 has no effect without --model cnn"),
    ("--model resnet18 --dropout 0.5", "--dropout 0.5"),
    ("--sync-batchnorm", "--sync-batchnorm has no effect without a model with batch normalization"),
    ("--model mlp --channels-last", "--channels-last has no effect"),
    ("--decoupled-weight-decay", "--decoupled-weight-decay has no effect without --weight-decay above 0"),
    ("--lr-scaling none --lr-decay constant --warmup-epochs 2", "--warmup-epochs 2.0 has no effect"),
    ("--lr-decay-factor 0.5", "--lr-decay-factor 0.5 has no effect without --lr-decay step"),
    ("--local-steps 7", "--local-steps 7 has no effect without --strategy local"),
    ("--strategy sharded --outer-lr 0.7", "--outer-lr 0.7 has no effect without --strategy local"),
    ("--outer-momentum 0.9", "--outer-momentum 0.9 has no effect without --strategy local"),
    ("--strategy local --bucket-mib 4", "--bucket-mib 4.0 has no effect without --strategy allreduce or sharded"),
    ("--release-gradients --max-skipped 5", "--max-skipped 5 has no effect without updates that can be skipped"),
    ("--islands 2", "--islands 2 has no effect without --strategy local"),
    ("--commit-every 5", "--commit-every 5 has no effect without --elastic"),
    ("--elastic --strategy local --commit-every 5", "--commit-every 5 has no effect without --elastic and"),
    ('--model-args {"a":1}', "--model-args {'a': 1} has no effect without --model package.module:function"),
    ('--data-args {"a":1}', "--data-args {'a': 1} has no effect without --dataset package.module:function"),
    ("--loss m:f --label-smoothing 0.1", "--label-smoothing 0.1 has no effect without the default loss"),
    ("--weight-decay-on matrices", "--weight-decay-on matrices has no effect without --weight-decay above 0"),
    ("--resume run --init-from other", "--init-from other has no effect without a new run"),
    ("--noise-scale-form adam", "--noise-scale-form adam has no effect without --noise-scale"),
    ("--resume never --allow-data-change", "--allow-data-change has no effect"),
]


@pytest.mark.parametrize(("argv", "message"), IDLE)
def test_an_option_without_effect_is_refused_with_what_it_needs(argv, message):
    with pytest.raises(UserError) as refusal:
        parse(TrainConfig, "hvd_adam.train", argv.split())
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_all_of_them_are_named():
    with pytest.raises(UserError) as refusal:
        parse(TrainConfig, "hvd_adam.train", ["--data-dir", "photos", "--commit-every", "5"])
    assert "--data-dir photos" in str(refusal.value) and "--commit-every 5" in str(refusal.value)


def test_every_rule_is_of_an_option_and_tested():
    assert set(RULES) <= {item.name for item in fields(TrainConfig)}
    tested = " ".join(message for _, message in IDLE)
    assert all(name.replace("_", "-") in tested for name in RULES)


@pytest.mark.parametrize(
    "argv",
    [
        "--dataset cifar10 --data-dir photos --no-download",
        "--dataset photos:load --data-dir photos",
        "--dataset synthetic --synthetic-shape 1x8x8 --synthetic-classes 3 --synthetic-samples 9",
        "--dropout 0.5 --channels-last --weight-decay 0.1 --decoupled-weight-decay",
        "--model resnet18 --sync-batchnorm",
        "--lr-scaling none --warmup-epochs 2",
        "--elastic --commit-every 5 --allow-data-change",
        "--data-dir data --commit-every 10",  # their defaults, as --print-config writes them
    ],
)
def test_options_with_an_effect_are_accepted(argv):
    parse(TrainConfig, "hvd_adam.train", argv.split())


def test_sync_batchnorm_of_a_model_without_batch_normalization_is_refused():
    loader = DeviceLoader(load("synthetic", synthetic_samples=4), "cpu")
    config = TrainConfig(dataset="synthetic", model="squeezenet1_1", sync_batchnorm=True)
    with pytest.raises(UserError, match="--sync-batchnorm has no effect: squeezenet1_1 has no batch norm"):
        build_model(config, loader)


def test_evaluate_refuses_a_data_folder_of_a_data_set_without_files():
    trained = {item.name: item.default for item in fields(TrainConfig)}
    config = EvaluateConfig(checkpoint="run", data_dir="photos")
    with pytest.raises(UserError, match="--data-dir photos has no effect: digits is not read from files"):
        _data_config(config, trained)
    photos = EvaluateConfig(checkpoint="run", data_dir="photos", dataset="photos:load")
    assert _data_config(photos, trained).data_dir == "photos"
