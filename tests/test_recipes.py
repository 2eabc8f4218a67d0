"""Recipes: configurations by name.

Hazards: a recipe that an option's change has made invalid; one that is not in the wheel; a misspelled name.
"""

from configparser import ConfigParser

import pytest
from helpers.photos import write_photos
from helpers.training_runs import ROOT, events, succeeded, train

from hvd_adam import recipes
from hvd_adam.arguments import parse
from hvd_adam.config import TrainConfig
from hvd_adam.errors import UserError


def configuration(*argv):
    return parse(TrainConfig, "hvd_adam.train", argv)


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_valid_and_options_override_it(name):
    config = configuration("--config", f"recipe:{name}")
    assert config != TrainConfig() or name == "digits"
    assert configuration(f"--config=recipe:{name}", "--epochs", "3").epochs == 3


def test_the_schedule_of_the_paper():
    config = configuration("--config", "recipe:imagenet-resnet50")
    assert (config.epochs, config.batch_size, config.warmup_epochs) == (90, 32, 5)
    assert (config.lr_scaling, config.milestones(), config.lr_decay_factor) == ("linear", (30, 60, 80), 0.1)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("imagnet-resnet50", "did you mean imagenet-resnet50?"), ("x", "use one of airplane, cifar10")],
)
def test_an_unknown_recipe_is_answered_with_similar_names_or_all(name, hint):
    with pytest.raises(UserError, match=f"recipe:{name}: there is no such recipe: ") as caught:
        configuration("--config", f"recipe:{name}")
    assert hint in str(caught.value)


def test_recipes_are_in_the_wheel_and_in_the_help():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.package_data"]["hvd_adam.recipes"] == "*.yaml"
    assert TrainConfig.EXAMPLES.endswith(", ".join(recipes.names()))


@pytest.mark.slow
def test_digits_and_a_packed_folder_of_images_are_trained(tmp_path):
    short = ["--max-steps", 3]
    succeeded(train("--config", "recipe:digits", *short, folder=tmp_path / "digits"))
    photos = write_photos(tmp_path / "photos", train=8)
    options = [
        "--image-size",
        32,
        "--batch-size",
        8,
        "--model",
        "cnn",
        "--workers",
        0,
        "--data-dir",
        photos,
        "--cache",
        tmp_path / "cache",
    ]
    done = succeeded(train("--config", "recipe:imagefolder", *options, *short, folder=tmp_path / "run"))
    assert "cnn on imagefolder (3×32×32, 4 classes, 32 training and 8 test images)" in done.stdout
    assert events(tmp_path / "run", "eval")[-1]["images"] == 8
