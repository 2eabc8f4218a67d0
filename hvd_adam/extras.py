"""The third-party packages of this project, and how to install one that is missing. Imports none of them."""

from importlib.util import find_spec

# The extra of setup.cfg that brings each optional package, by the name that is imported.
EXTRAS = {
    "PIL": "train",
    "jinja2": "train",
    "jsonargparse": "train",
    "matplotlib": "train",
    "mpi4py": "horovod",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "psutil": "horovod",
    "safetensors": "export",
    "scipy": "train",
    "sklearn": "train",
    "tensorboard": "train",
    "torchvision": "train",
    "tqdm": "train",
    "yaml": "train",
}

# What Adam itself needs; `pip install .` in the clone brings it.
BASE = ("torch", "numpy", "filelock")


def extra_command(extra: str) -> str:
    """Returns how to install an extra: from the clone, since package indices have no project of this name."""
    return f"pip install '.[{extra}]' in the clone of hvd_adam"


def install_command(module: str) -> str | None:
    """Returns how to install a missing package; None for one that this project does not use.

    Args:
        module: as it is imported, with or without submodules. Horovod has a build of its own, `BUILD_COMMAND`.
    """
    package = module.partition(".")[0]
    if package in EXTRAS:
        return extra_command(EXTRAS[package])
    return f"pip install {package}" if package in BASE else None


def require(*modules: str) -> None:
    """Raises ModuleNotFoundError for the first module that is not installed, without importing any.

    A command calls it for what it needs only at its end, so that it fails at its start.
    """
    for module in modules:
        if find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
