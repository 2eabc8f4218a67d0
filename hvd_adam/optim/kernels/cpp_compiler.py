"""Compiles C++ with the system's compiler into libraries for CPUs, once for each host."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvd_adam.optim.kernels.kernel_cache import COMPILE_SECONDS, cached

# No option changes results: each operation is rounded by itself, infinities and NaN keep their meaning.
_OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-ffp-contract=off")
_OPTIONS_FOR_SPEED = ("-fno-math-errno", "-fno-trapping-math")  # square roots and selections in vector registers
# On processors with AVX-512, GCC and Clang use vectors of 256 bits unless told otherwise. With 512 an update takes
# 0.77 of the time with float16 parameters, 0.82 with bfloat16, and 0.98 to 1.03 where memory is the limit.
_OPTIONS_FOR_X86 = ("-mprefer-vector-width=512",)


def compile_library(name: str, source: Path | Sequence[Path], definitions: Mapping[str, object]) -> ctypes.CDLL:
    """Compiles a file, or loads the library from this host's cache.

    Args:
        name: of the library, part of a file name.
        source: a C++ file that includes no file of ours, or several, which are joined.
        definitions: macros and their values.

    Raises:
        RuntimeError: there is no compiler, it fails, or it has not ended after `COMPILE_SECONDS`.
        OSError: the result cannot be loaded.
    """
    macros = [f"-D{name}={value}" for name, value in definitions.items()]
    for_processor = _OPTIONS_FOR_X86 if platform.machine() in ("x86_64", "AMD64") else ()
    command = [*_compiler(), *_OPTIONS, *_OPTIONS_FOR_SPEED, *for_processor, *macros]
    code = "\n".join(path.read_text() for path in ([source] if isinstance(source, Path) else source))

    def build(target: Path) -> None:
        whole = [*command, "-x", "c++", "-", "-o", str(target)]
        try:
            done = subprocess.run(whole, input=code, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the C++ compiler has not ended after {COMPILE_SECONDS} s: {command[0]}") from None
        if done.returncode:
            raise RuntimeError(f"the C++ compiler failed: {' '.join(command[:1])}: {done.stderr.strip()[-300:]}")

    return ctypes.CDLL(str(cached(name, f"{command}\n{code}", build)))


def _compiler() -> list[str]:
    """Returns the command of the C++ compiler: $CXX, or the first that is installed."""
    chosen = os.environ.get("CXX")
    candidates = [chosen.split()] if chosen else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if command and shutil.which(command[0]):
            return command
    names = ", ".join(command[0] for command in candidates if command)
    raise RuntimeError(f"no C++ compiler found ({names}): install g++, or set CXX")
