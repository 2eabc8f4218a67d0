"""``import torchvision``, also beside a PyTorch that its compiled operators were not built for.

An ordinary torchvision beside a CPU build of PyTorch cannot load its C++ library, and its import then fails
with ``operator torchvision::nms does not exist``. Data sets, models for classification and transforms need
none of these operators, so it is enough that their schemas exist.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

from hvd_adam.errors import UserError

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_definitions: list[torch.library.Library] = []  # a schema lives only as long as the Library that defined it


def import_torchvision() -> ModuleType:
    """Import torchvision and return it; does nothing else where its operators match this PyTorch.

    Raises UserError where torchvision is not installed, or does not work with this PyTorch.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise UserError(
            f"torchvision is not installed: install the release that goes with torch {torch.__version__}"
        )
    try:
        if not _operators_exist(Path(spec.origin).parent):
            _define_schemas()
        # By its parts, so that they are there whichever of them this torchvision imports by itself.
        import_module("torchvision.models")
        return import_module("torchvision")
    except Exception as error:
        raise UserError(
            f"torchvision {_version()} does not work with torch {torch.__version__} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}): "
            "install the release of torchvision that goes with this torch"
        ) from error


def _operators_exist(folder: Path) -> bool:
    # Asked before the import: a failed import would leave half of torchvision's modules behind.
    for library in [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]:
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
    return all(hasattr(torch.ops.torchvision, name) for name in _SCHEMAS)


def _define_schemas() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _definitions.append(library)


def _version() -> str:
    try:
        return version("torchvision")
    except PackageNotFoundError:
        return "(of unknown version)"
