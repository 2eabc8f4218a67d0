"""Defines torchvision's operators where its compiled library does not load.

torchvision for CUDA cannot load its C++ library with a CPU build of PyTorch, and its import then fails with
`operator torchvision::nms does not exist`. Data sets, classifiers and transforms need none of these operators, so
it is enough to define their schemas before the import.

`launch/setup.sh` copies this file to site-packages as `hvd_adam_torchvision.py`, with a `.pth` file that calls
`install` when Python starts. So it imports nothing of this package, and torch only when torchvision is imported.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
definitions: list[Any] = []  # a schema lives only as long as the Library that defined it


def define_missing(folder: str) -> None:
    """Loads torchvision's operators, and defines the schemas of those that its library does not have.

    Args:
        folder: the folder of the package torchvision.
    """
    import torch  # here: see above

    if not _operators_exist(folder):
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # PyTorch's
        for name, schema in _SCHEMAS.items():
            if not hasattr(torch.ops.torchvision, name):
                library.define(schema)  # type: ignore[no-untyped-call]  # PyTorch's
        definitions.append(library)


def _operators_exist(folder: str) -> bool:
    # Checked before the import, because a failed import would leave half of torchvision's modules behind.
    from pathlib import Path

    import torch

    for library in [*Path(folder).glob("_C*.so"), *Path(folder).glob("_C*.pyd")]:
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]  # PyTorch's
        except OSError:
            continue
    return all(hasattr(torch.ops.torchvision, name) for name in _SCHEMAS)


class _Finder:
    """Finds torchvision as the other finders of `sys.meta_path` do, and defines its operators before it runs."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.submodule_search_locations and spec.loader is not None:
            loader = spec.loader
            folder, execute = next(iter(spec.submodule_search_locations)), loader.exec_module

            def define_and_execute(module: ModuleType) -> None:
                with suppress(Exception):  # torchvision's own import then reports what is wrong
                    define_missing(folder)
                execute(module)

            with suppress(AttributeError):  # a loader without attributes of its own
                loader.exec_module = define_and_execute  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Makes every `import torchvision` of this process define missing operators. Imports neither of the two."""
    if not any(type(finder).__name__ == _Finder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
