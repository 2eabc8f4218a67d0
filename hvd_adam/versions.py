"""The versions of installed packages and a hash of this package's code, without importing any of them."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).parent


def code_hash(folder: Path = PACKAGE) -> str:
    """Returns a hash over the source files of the package; equal hashes mean identical code."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".rules")):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def installed_version(package: str, missing: str = "not installed") -> str:
    """Returns the version of an installed package, or `missing`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return missing
