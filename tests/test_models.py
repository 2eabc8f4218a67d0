"""Models by name, and torchvision with a PyTorch that it was not built for.

Hazards: an image size or channel count that only fails in the first training step, an operation that couples the
samples of a batch, a stem for large images on small ones, weights that do not follow the seed, buffers or modes
changed by trying a model out, torchvision left half imported, two definitions of one operator.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hvd_adam.data import load
from hvd_adam.data.loader import DeviceLoader
from hvd_adam.errors import UserError
from hvd_adam.models.torchvision_compat import import_torchvision
from hvd_adam.models.zoo import build

DIGITS = {"sample_shape": (1, 8, 8), "num_classes": 10}
CIFAR = {"sample_shape": (3, 32, 32), "num_classes": 10}


def layers(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


@given(
    channels=st.integers(1, 5),
    classes=st.integers(2, 12),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    name=st.sampled_from(["cnn", "mlp"]),
)
@settings(max_examples=30, deadline=None)
def test_own_models_take_images_of_any_size_and_number_of_channels(channels, classes, height, width, name):
    model = build(name, sample_shape=(channels, height, width), num_classes=classes)
    logits = model(torch.randn(2, channels, height, width))
    assert logits.shape == (2, classes)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("side", [8, 32, 224])
def test_the_cnn_has_five_3x3_convolutions_two_linear_layers_and_no_batch_normalization(side):
    model = build("cnn", sample_shape=(3, side, side), num_classes=10)
    assert [layer.kernel_size for layer in layers(model, nn.Conv2d)] == [(3, 3)] * 5
    assert len(layers(model, nn.Linear)) == 2
    assert not list(model.buffers())
    # However large the image, the first linear layer sees at most 7x7 places.
    assert layers(model, nn.Linear)[0].in_features <= 128 * 49


def test_the_cnns_gradient_of_a_batch_is_the_mean_of_its_halves():
    torch.manual_seed(0)
    model = build("cnn", **DIGITS).double()
    images, labels = torch.randn(16, 1, 8, 8, dtype=torch.float64), torch.arange(16) % 10
    whole = torch.autograd.grad(F.cross_entropy(model(images), labels), model.parameters())
    halves = [
        torch.autograd.grad(F.cross_entropy(model(images[part]), labels[part]), model.parameters())
        for part in (slice(0, 8), slice(8, 16))
    ]
    for one, first, second in zip(whole, *halves, strict=True):
        # Sums of some thousand float64 terms of order 1.
        torch.testing.assert_close((first + second) / 2, one, rtol=1e-10, atol=1e-12)


def test_the_cnn_learns_to_read_digits():
    data = load("digits")
    loader = DeviceLoader(data, torch.device("cpu"))
    torch.manual_seed(0)
    model = build("cnn", **DIGITS)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(2):
        for images, labels in loader.train_batches(0, epoch, global_batch_size=64):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    with torch.no_grad():
        right = sum((model(images).argmax(1) == labels).sum() for images, labels in loader.test_batches(128))
    # Two epochs reach 0.91 to 0.93; guessing would be 0.10.
    assert right / len(data.test_labels) > 0.85


@pytest.mark.parametrize("name", ["cnn", "mlp", "resnet18"])
def test_weights_depend_on_the_seed_and_the_check_of_the_model_changes_nothing(name):
    def weights(seed):
        torch.manual_seed(seed)
        model = build(name, **DIGITS)
        assert all(module.training for module in model.modules())
        return model.state_dict(), torch.rand(1)

    (first, drawn), (again, drawn_again), (other, _) = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[key], again[key]) for key in first) and drawn == drawn_again
    assert any(not torch.equal(first[key], other[key]) for key in first)
    batches_seen = [value for key, value in first.items() if key.endswith("num_batches_tracked")]
    assert all(value == 0 for value in batches_seen)


def test_dropout_is_off_by_default():
    def differs(model):
        images = torch.randn(4, 1, 8, 8)
        return not torch.equal(model(images), model(images))

    assert not differs(build("cnn", **DIGITS))
    assert differs(build("cnn", **DIGITS, dropout=0.5))
    with pytest.raises(UserError, match=r"1\.0 must be .* below 1"):
        build("cnn", **DIGITS, dropout=1.0)
    with pytest.raises(UserError, match="cnn only"):
        build("mlp", **DIGITS, dropout=0.5)


def test_residual_networks_get_the_small_stem_for_small_images_only():
    small, large = build("resnet18", **CIFAR), build("resnet18", **{**CIFAR, "sample_shape": (3, 96, 96)})
    assert (small.conv1.kernel_size, small.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(small.maxpool, nn.Identity)
    assert (large.conv1.kernel_size, large.conv1.stride) == ((7, 7), (2, 2))
    assert isinstance(large.maxpool, nn.MaxPool2d)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "googlenet", "squeezenet1_1", "vit_b_32"])
def test_torchvisions_models_take_other_numbers_of_channels_and_classes(name):
    model = build(name, sample_shape=(4, 64, 64), num_classes=7)
    logits = model(torch.randn(2, 4, 64, 64))
    assert logits.shape == (2, 7)


def test_an_unknown_model_is_refused_with_similar_names():
    with pytest.raises(UserError, match=r"'resnet81' is not known: did you mean .*resnet18"):
        build("resnet81", **CIFAR)
    with pytest.raises(UserError, match=r"use one of cnn, mlp, .*package\.module:function"):
        build("???", **CIFAR)


def test_detectors_are_not_classifiers():
    with pytest.raises(UserError, match="not known"):
        build("fasterrcnn_resnet50_fpn", **CIFAR)


@pytest.mark.parametrize("name", ["alexnet", "vit_b_16"])
def test_images_too_small_for_a_model_are_refused_in_one_line(name):
    with pytest.raises(UserError, match=f"'{name}'.*8x8 pixels.*choose another") as refusal:
        build(name, **DIGITS)
    assert "\n" not in str(refusal.value)


def test_a_user_defined_model_is_called_with_the_keywords_and_checked(tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(
        "from torch import nn\n"
        "def linear(*, in_channels, num_classes, image_size):\n"
        "    features = in_channels * image_size[0] * image_size[1]\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(features, num_classes))\n"
        "def eleven(**_):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 11))\n"
        "def narrow(**_):\n"
        "    return nn.Linear(5, 10)\n"
        "def text(**_):\n"
        "    return 'model'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert build("own_models:linear", **DIGITS)(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    for name, reason in {
        "eleven": r"\(1, 11\) for one image",
        "narrow": "fails",
        "text": "returned a str",
        "missing": "no attribute 'missing'",
    }.items():
        with pytest.raises(UserError, match=reason) as refusal:
            build(f"own_models:{name}", **DIGITS)
        assert "\n" not in str(refusal.value)


def run(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


IMPORT = "from hvd_adam.models.torchvision_compat import import_torchvision as go\n"


def test_torchvision_is_imported_with_its_operators_or_at_least_their_schemas():
    torchvision = import_torchvision()
    assert torchvision is import_torchvision() is sys.modules["torchvision"]
    assert torchvision.models.resnet18 and torchvision.datasets.CIFAR10
    assert hasattr(torch.ops.torchvision, "nms")


@pytest.mark.slow
def test_torchvision_is_imported_even_after_a_plain_import_has_failed():
    program = "try:\n    import torchvision\nexcept Exception:\n    pass\n"
    assert run(program + IMPORT + "print(go().models.resnet18.__name__)") == "resnet18"


@pytest.mark.slow
def test_no_schema_is_defined_if_the_operators_exist():
    # A library that defines the schemas replaces torchvision's, which defines them when it is loaded.
    program = (
        "import torch\n"
        "library = torch.library.Library('torchvision', 'DEF')\n"
        "for name in ('nms', 'qnms'):\n"
        "    library.define(name + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
    )
    if import_torchvision().extension._has_ops():
        pytest.skip("torchvision's own library loads here, and another cannot take its place")
    check = "go()\nfrom hvd_adam.models import torchvision_operators\nprint(torchvision_operators.definitions)"
    assert run(program + IMPORT + check) == "[]"


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        (None, "torchvision is not installed"),
        ("raise RuntimeError('other CUDA\\nmore')", "does not work with torch"),
    ],
)
def test_a_torchvision_that_is_missing_or_fails_is_reported_in_one_line(tmp_path, package, reason):
    if package is None:
        hide = "import sys\nsys.path = [p for p in sys.path if 'site-packages' not in p]\n"
        program = "import torch, numpy\n" + hide
    else:
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(package)
        program = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
    catch = "try:\n    go()\nexcept ValueError as error:\n    print(error)"
    message = run(program + IMPORT + catch)
    assert reason in message and "install" in message and "\n" not in message
