"""Models by name: `cnn`, `mlp`, torchvision's classifiers, and `package.module:function`."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hvd_adam.errors import UserError
from hvd_adam.import_path import call, is_reference, unknown
from hvd_adam.models.torchvision_compat import import_torchvision
from hvd_adam.text import first_line

OWN_MODELS = ("cnn", "mlp")

_SMALL_IMAGE = 64  # pixels: up to this height and width residual networks get a stem for small images


class ConvNet(nn.Module):
    """Five 3×3 convolutions and two linear layers, for images of any size and number of channels.

    Each side is halved after the second and each later convolution as long as at least 4 pixels remain. There is
    no batch normalization, so that N ranks train as one rank with the union of their batches; dropout breaks that,
    because each rank draws its own mask. GELU and average pooling are used because they are smooth: Adam amplifies
    rounding differences at the kinks of ReLU and max pooling. Over 50 steps on digits the losses of 4
    micro-batches of 16 and of one batch of 64 differ by a relative 4e-7 at most; with ReLU and max pooling by 5e-3
    (3 seeds). Every operation has a deterministic backward on GPUs.

    The input has shape `(n, in_channels, height, width)`, the output are logits of shape `(n, num_classes)`.

    Args:
        in_channels: channels of the images.
        num_classes: number of logits.
        image_size: height and width of the images.
        dropout: probability in [0, 1), before the last layer.
    """

    WIDTHS = (32, 32, 64, 64, 128)
    HIDDEN = 128

    def __init__(
        self, in_channels: int, num_classes: int, image_size: tuple[int, int], dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        height, width = image_size
        for index, out_channels in enumerate(self.WIDTHS):
            layers += [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.GELU()]
            pool = (2 if index and height >= 8 else 1, 2 if index and width >= 8 else 1)
            if pool != (1, 1):
                layers.append(nn.AvgPool2d(pool))
            height, width, in_channels = height // pool[0], width // pool[1], out_channels
        # Large images are still large here: average them down to at most 7×7.
        pool = (-(-height // 7), -(-width // 7))
        if pool != (1, 1):
            layers.append(nn.AvgPool2d(pool))
        features = in_channels * (height // pool[0]) * (width // pool[1])
        self.convolutions = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(features, self.HIDDEN),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(self.HIDDEN, num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the logits of `images`."""
        logits: torch.Tensor = self.classifier(self.convolutions(images))
        return logits


def _mlp(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Returns a small perceptron with one hidden layer, for tests and benchmarks."""
    features = math.prod(sample_shape)
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, num_classes))


def build(
    name: str,
    *,
    sample_shape: tuple[int, ...],
    num_classes: int,
    args: Mapping[str, object] | None = None,
    dropout: float = 0.0,
    try_out: bool = True,
) -> nn.Module:
    """Builds a model of samples `(n, *sample_shape)`; unless it is own, a classifier with logits.

    Weights are drawn from torch's global random state. In a torchvision model the first convolution is replaced if
    images have not 3 channels. Residual networks get the stem for small images of He et al. (arXiv 1512.03385,
    section 4.2: a 3×3 convolution of stride 1, no pooling) if both sides are at most 64.

    Args:
        name: "cnn" (`ConvNet`), "mlp", a classifier of torchvision (untrained), or `package.module:function`,
            which is called with those of the keywords `sample_shape`, `num_classes`, and, for images,
            `in_channels` and `image_size` that it has, and with `args`.
        sample_shape: shape of one input; of an image its channels, height and width.
        num_classes: number of classes; 0 if there are none.
        args: keyword arguments of the user's own function.
        dropout: dropout probability, for "cnn" only.
        try_out: check that the model returns `num_classes` logits for an image.

    Raises:
        UserError: the name is unknown, or the model cannot be built for these samples or does not return
            `num_classes` logits for one of them.
    """
    if dropout and name != "cnn":
        raise UserError(f"dropout {dropout} is for the model cnn only: {name} has its own, leave it at 0")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout {dropout} must be at least 0 and below 1")
    offered: dict[str, Any] = {"sample_shape": sample_shape}
    if num_classes:
        offered["num_classes"] = num_classes
    if len(sample_shape) == 3:
        offered |= {"in_channels": sample_shape[0], "image_size": sample_shape[1:]}
    model: nn.Module
    if is_reference(name):
        twice = ["sample_shape"] if "image_size" in offered else []
        model = call(name, "model", offered, args, "--model-args", only_named=twice)
        if not isinstance(model, nn.Module):
            raise UserError(f"model {name!r} returned a {type(model).__name__}: return a torch.nn.Module")
    elif not num_classes:
        raise UserError(f"model {name!r} is a classifier, but the data has no classes: use a model of your own")
    elif name == "mlp":
        model = _mlp(sample_shape, num_classes)
    elif name == "cnn":
        channels, height, width = _image_shape(name, sample_shape)
        model = ConvNet(channels, num_classes, (height, width), dropout)
    else:
        model = _torchvision_model(name, sample_shape, num_classes)
    if try_out and len(sample_shape) == 3:
        _try_out(model, name, sample_shape, num_classes)
    return model


def of_config(
    config: Mapping[str, Any], sample_shape: tuple[int, ...], num_classes: int, *, try_out: bool = False
) -> nn.Module:
    """Builds the model of a training's configuration, on the CPU.

    Args:
        config: of the training, by option; options that an older checkpoint lacks have their defaults.
        sample_shape: as for `build`.
        num_classes: as for `build`.
        try_out: as for `build`.

    Raises:
        UserError: as `build`.
    """
    return build(
        config["model"],
        sample_shape=sample_shape,
        num_classes=num_classes,
        args=config.get("model_args"),
        dropout=config.get("dropout", 0.0),
        try_out=try_out,
    )


def _image_shape(name: str, sample_shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(sample_shape) == 3:
        channels, height, width = sample_shape
        return channels, height, width
    raise UserError(
        f"model {name!r} needs images of shape (channels, height, width), not samples of shape {sample_shape}: "
        "use mlp or a model of your own"
    )


def _try_out(model: nn.Module, name: str, sample_shape: tuple[int, ...], num_classes: int) -> None:
    # In evaluation mode a forward pass draws no random number and changes no buffer.
    parameter = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, *sample_shape, dtype=parameter.dtype, device=parameter.device)
    channels, height, width = sample_shape
    what = f"model {name!r} with images of {channels} channels and {height}x{width} pixels"
    training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(image)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise UserError(f"{what} fails ({first_line(error)}): choose another model or larger images") from error
    finally:
        model.train(training)
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UserError(f"{what} returns {shape} for one image, not logits of shape {(1, num_classes)}")


def _torchvision_model(name: str, sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    models: Any = import_torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        raise unknown("model", name, [*OWN_MODELS, *known])
    in_channels, *image_size = _image_shape(name, sample_shape)
    options: dict[str, object] = {}
    if name in ("googlenet", "inception_v3"):
        # The loss uses the logits only. The other initialization takes long, and torchvision will remove it.
        options = {"aux_logits": False, "init_weights": False}
    if name.startswith("vit_") and image_size[0] == image_size[1]:
        options = {"image_size": image_size[0]}
    try:
        model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"model {name!r} cannot be built for images of {image_size[0]}x{image_size[1]} pixels "
            f"({first_line(error)}): choose another model or size"
        ) from error
    if isinstance(model, models.ResNet) and max(image_size) <= _SMALL_IMAGE:
        model.conv1 = nn.Conv2d(in_channels, model.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    elif in_channels != 3:
        _replace_first_convolution(model, in_channels)
    return model


def _replace_first_convolution(model: nn.Module, in_channels: int) -> None:
    path, old = next((p, m) for p, m in model.named_modules() if isinstance(m, nn.Conv2d))
    geometry: dict[str, Any] = {
        "kernel_size": old.kernel_size,
        "stride": old.stride,
        "padding": old.padding,
        "dilation": old.dilation,
    }
    new = nn.Conv2d(in_channels, old.out_channels, **geometry, bias=old.bias is not None)
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)
