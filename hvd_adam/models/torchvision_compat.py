"""Imports torchvision, even if its compiled operators were built for another PyTorch.

An ordinary torchvision cannot load its C++ library with a CPU build of PyTorch, and its import then fails with
`operator torchvision::nms does not exist`. Data sets, classifiers and transforms need none of these operators, so
it is enough to define their schemas.
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
        if not _operators_exist(Path(spec.origin).parent):
            _define_schemas()
        # Not every torchvision imports its submodules by itself.
        import_module("torchvision.models")
        return import_module("torchvision")
    except Exception as error:
        raise UserError(
            f"torchvision {_version()} does not work with torch {torch.__version__} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}): "
            "install the release of torchvision that goes with this torch"
        ) from error


def _operators_exist(folder: Path) -> bool:
    # Checked before the import, because a failed import would leave half of torchvision's modules behind.
    for library in [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]:
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]  # PyTorch's
        except OSError:
            continue
    return all(hasattr(torch.ops.torchvision, name) for name in _SCHEMAS)


def _define_schemas() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # PyTorch's
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)  # type: ignore[no-untyped-call]  # PyTorch's
    _definitions.append(library)


def _version() -> str:
    try:
        return version("torchvision")
    except PackageNotFoundError:
        return "(of unknown version)"
