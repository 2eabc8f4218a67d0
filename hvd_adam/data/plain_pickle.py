"""Reads pickles of plain containers, strings, numbers and numpy arrays without running code of theirs.

A pickle is a program: it may call anything that it can name. Here it can name six things, each of which is a
stand-in of ours that stores what it is given, so that not even numpy's own reconstruction code is reached.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

_NUMBERS = {"u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"}


class PlainPickleError(ValueError):
    """The file is not what it should be. The message reads on from the file's name."""


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
    """Takes the place of both ``_reconstruct`` (its state comes later) and ``_frombuffer`` (all at once)."""

    def __init__(self, buffer: object, dtype: object, shape: object, order: object = "C") -> None:
        self.parts = (buffer, dtype, shape, order)

    @classmethod
    def reconstruct(cls, *_empty: object) -> "_Array":
        return cls(b"", None, (), "C")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, is_fortran, buffer = state
        self.parts = (buffer, dtype, shape, "F" if is_fortran else "C")

    def to_numpy(self) -> np.ndarray:
        buffer, dtype, shape, order = self.parts
        if not isinstance(buffer, (bytes, bytearray)) or not isinstance(dtype, _Dtype):
            raise PlainPickleError("holds an array whose content is not of integers")
        return np.frombuffer(buffer, dtype.to_numpy()).reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: _Dtype, data: bytes) -> int:
    return int(np.frombuffer(data, dtype.to_numpy())[0])


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise PlainPickleError(f"asks for the encoding {encoding!r}")
    return text.encode("latin1")


class _NdarrayName:
    """What a pickle passes to ``_reconstruct`` to say which class it means."""


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
    """Return the dictionary that the pickle file ``path`` holds, with text keys and numpy arrays as values.

    Reads every protocol, those of Python 2 included (their strings come as bytes). Raises
    PlainPickleError for everything that is not a whole pickle of a dictionary of plain values, and OSError
    where the file cannot be read.
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


def _text(value: object) -> object:
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _plain(value: object) -> object:
    return value.to_numpy() if isinstance(value, _Array) else value
