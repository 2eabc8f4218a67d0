"""Reads pickles of plain containers, strings, numbers and numpy arrays without running code from them.

A pickle is a program that may call anything it can name. Here it can name six things. Each is replaced by a class
that only stores its arguments, so that not even numpy's own reconstruction code runs.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

_NUMBERS = {"u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"}


class PlainPickleError(ValueError):
    """The file is not a valid pickle of plain values. The message continues after the file's name."""


class _Dtype:
    def __init__(self, name: str | bytes, *_flags: object) -> None:
        self.name = name.decode("ascii") if isinstance(name, bytes) else name
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        self.order = ">" if order == ">" else "<"

    def to_numpy(self) -> np.dtype:
        if self.name not in _NUMBERS:
            raise PlainPickleError(f"holds an array of type {self.name!r}, not of integers")
        return np.dtype(self.order + self.name)


class _Array:
    """Replaces both `_reconstruct`, which gets its state later, and `_frombuffer`, which gets it at once."""

    def __init__(self, buffer: object, dtype: object, shape: Any, order: object = "C") -> None:
        self.parts = (buffer, dtype, shape, order)

    @classmethod
    def reconstruct(cls, *_empty: object) -> "_Array":
        return cls(b"", None, (), "C")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, is_fortran, buffer = state
        self.parts = (buffer, dtype, shape, "F" if is_fortran else "C")

    def to_numpy(self) -> "np.ndarray[Any, np.dtype[Any]]":
        buffer, dtype, shape, order = self.parts
        if not isinstance(buffer, (bytes, bytearray)) or not isinstance(dtype, _Dtype):
            raise PlainPickleError("holds an array whose content is not of integers")
        flat = np.frombuffer(buffer, dtype.to_numpy())
        array: np.ndarray[Any, np.dtype[Any]] = flat.reshape(shape, order="F" if order == "F" else "C")
        return array


def _scalar(dtype: _Dtype, data: bytes) -> int:
    return int(np.frombuffer(data, dtype.to_numpy())[0])


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise PlainPickleError(f"asks for the encoding {encoding!r}")
    return text.encode("latin1")


class _NdarrayName:
    """Replaces the class that a pickle passes to `_reconstruct`."""


_ALLOWED = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _NdarrayName,
    ("_codecs", "encode"): _encode,  # how protocol 2 writes bytes
}
for _core in ("numpy.core", "numpy._core"):  # before and after numpy 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _Array.reconstruct
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _Array


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise PlainPickleError(f"asks for {module}.{name}, which is refused") from None


def load_dictionary(path: Path) -> dict[str, Any]:
    """Returns the dictionary in a pickle file, with keys of type str and numpy arrays as values.

    Args:
        path: a pickle of any protocol, including those of Python 2 (their strings are returned as bytes).

    Raises:
        PlainPickleError: the file is no complete pickle of a dictionary of plain values.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        try:
            content = _PlainUnpickler(file, encoding="bytes").load()
            if not isinstance(content, dict):
                raise PlainPickleError(f"holds a {type(content).__name__}, not a dictionary")
            return {_text(key): _plain(value) for key, value in content.items()}
        except (PlainPickleError, OSError):
            raise
        except (
            Exception
        ) as error:  # a damaged pickle can fail in any way: pickle.Unpickler promises no set of errors
            reason = str(error) or "no reason given"
            raise PlainPickleError(f"is cut short or damaged ({type(error).__name__}: {reason})") from error


def _text(value: Any) -> Any:
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _plain(value: object) -> object:
    return value.to_numpy() if isinstance(value, _Array) else value
