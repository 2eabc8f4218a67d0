"""Imports torchvision, even if its compiled operators were built for another PyTorch."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

from hvd_adam.errors import UserError
from hvd_adam.models.torchvision_operators import define_missing
from hvd_adam.versions import installed_version


def import_torchvision() -> ModuleType:
    """Imports torchvision and returns it; defines schemas only if its operators do not load.

    Raises:
        UserError: torchvision is not installed, or does not work with this PyTorch.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise UserError(
            f"torchvision is not installed: install the release that goes with torch {torch.__version__}"
        )
    try:
        define_missing(str(Path(spec.origin).parent))
        # Not every torchvision imports its submodules by itself.
        import_module("torchvision.models")
        return import_module("torchvision")
    except Exception as error:
        raise UserError(
            f"torchvision {installed_version('torchvision')} does not work with torch {torch.__version__} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}): "
            "install the release of torchvision that goes with this torch"
        ) from error
