"""Short trainings whose models tests use: on digits, on photos, and with models of a user's own."""

import json

from PIL import Image

from helpers import own_code
from helpers.photos import write_photos
from helpers.training_runs import succeeded
from hvd_adam.data import load

NETS = '''
import torch
from torch import nn


def normed(in_channels, num_classes):
    """A model with batch normalization and a layer whose size depends on the images."""
    first = [nn.Conv2d(in_channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*first, nn.LazyLinear(num_classes))


class Noisy(nn.Sequential):
    def forward(self, images):
        logits = super().forward(images)
        return logits + torch.rand_like(logits)


def noisy(sample_shape, num_classes):
    return Noisy(nn.Flatten(), nn.Linear(sample_shape.numel(), num_classes))


class Branching(Noisy):
    def forward(self, images):
        logits = nn.Sequential.forward(self, images)
        return logits if logits.sum() > 0 else -logits


class Paired(Noisy):
    def forward(self, images):
        if len(images) == 1:
            raise ValueError("one image")
        return nn.Sequential.forward(self, images)


def paired(sample_shape, num_classes):
    return Paired(*noisy(sample_shape, num_classes))


loss = nn.functional.cross_entropy


def branching(sample_shape, num_classes):
    return Branching(*noisy(sample_shape, num_classes))
'''.replace("sample_shape.numel()", "torch.Size(sample_shape).numel()")

# A regression on rows of numbers.
SUMS = ("--dataset", "mine:data", "--model", "mine:build", "--model-args", '{"width": 4}', "--loss", "mine:loss")
SUMS += ("--batch-size", 20)


def train(commands, name, *argv):
    """Trains into the folder `name` and returns its path."""
    own_code.write(commands.folder)
    (commands.folder / "nets.py").write_text(NETS)
    succeeded(commands.run("hvd_adam.train", "--output-dir", name, "--max-steps", 3, *argv))
    return commands.folder / name


def train_on_digits(commands, name="digits", *argv):
    return train(commands, name, "--ema", "0.5", *argv)


def train_on_photos(commands, name="photos", *argv):
    """Trains on photos of several sizes and modes, of which one test image is damaged."""
    folder = commands.folder / "images"
    if not folder.exists():
        write_photos(folder, train=5, test=5, damaged=["val/dog/001.jpg"])
        for number, size in enumerate([(50, 91), (36, 36), (30, 20)]):
            path = folder / "val" / "eel" / f"00{number}.jpg"
            with Image.open(path) as image:
                image.resize(size).convert("L").save(path)
    data = ("--dataset", "imagefolder", "--data-dir", "images", "--image-size", 32, "--workers", 0)
    return train(commands, name, "--batch-size", 10, *data, *argv)


def write_digits(folder):
    """Writes the test images of digits as PNG files, in their order, and returns their paths."""
    folder.mkdir()
    paths = [folder / f"{number:03d}.png" for number in range(len(load("digits").test_images))]
    for path, image in zip(paths, load("digits").test_images, strict=True):
        Image.fromarray(image[0]).save(path)
    return paths


def lines(text):
    """Returns the objects of JSON lines."""
    return [json.loads(line) for line in text.splitlines()]
