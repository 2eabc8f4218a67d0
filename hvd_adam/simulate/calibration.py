"""The file that `calibrate` writes and `predict` reads: costs of a machine and workloads. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from hvd_adam.errors import UserError
from hvd_adam.simulate.machine import Codec, Link, Machine
from hvd_adam.simulate.workload import Bucket, Workload
from hvd_adam.text import shown

FORMAT = 1
COLLECTIVES = ("openmpi", "ring")
KINDS = ("allreduce", "alltoall", "allgather")

_SECONDS, _RATE, _COUNT = (0.0, 1e6), (1.0, 1e30), (1, 10**12)
# The least and the largest value of each number. Whole numbers are where the least one is an int.
_RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("latency", "cycle", "negotiation", "slice", "forward", "backward", "ready"), _SECONDS),
    **dict.fromkeys(("cpu", "encode", "add", "decode", "copies"), (0.0, 1.0)),  # seconds for a byte or an element
    **dict.fromkeys(("bandwidth", "update_bandwidth", "copy_bandwidth"), _RATE),
    **dict.fromkeys(("samples", "elements", "threads", "ranks_per_host"), _COUNT),
    **dict.fromkeys(("jitter", "uncertainty"), (0.0, 100.0)),  # relative
    "exact": (0, 10**12),
    "cores": (0.01, 1e6),
    "message_bytes": (1024.0, 1e18),
    "unexplained": (-1e6, 1e6),
    "sharing": (1.0, 100.0),
}

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Calibration:
    """What has been measured.

    Attributes:
        machine: its costs.
        workloads: by name of the model.
        ranks_per_host: with which it was measured.
        description: of hardware and software.
    """

    machine: Machine
    workloads: Mapping[str, Workload]
    ranks_per_host: int
    description: Mapping[str, Any]

    def to_json(self) -> str:
        """Returns the text of the file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False) + "\n"


def read(path: str) -> Calibration:
    """Reads a file.

    Raises:
        UserError: there is no such file, or it is not one of `calibrate`: a value is missing, or not possible.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--calibration {path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"--calibration {path} is not JSON: write it with hvd_adam.simulate calibrate") from None
    try:
        return _calibration(values)
    except ValueError as error:
        raise UserError(
            f"--calibration {path} is not a file of hvd_adam.simulate calibrate ({error}): calibrate again"
        ) from None


def _calibration(values: Any) -> Calibration:
    """Makes a calibration of what a file contains; ValueError names what is wrong."""
    if not isinstance(values, dict) or "format" not in values:
        raise ValueError("it has no format")
    if type(values["format"]) is not int or values["format"] != FORMAT:
        raise ValueError(f"format is {shown(str(values['format']))}, not {FORMAT}")
    _require_names(values, ["format", *(field.name for field in fields(Calibration))], "the file")
    for name in ("workloads", "description"):
        if not isinstance(values[name], dict) or not values[name]:
            raise ValueError(f"{name} is empty")
    workloads = {name: _workload(each, f"workloads.{shown(name)}") for name, each in values["workloads"].items()}
    local = _number(values["ranks_per_host"], "ranks_per_host", "ranks_per_host")
    return Calibration(_machine(values["machine"]), workloads, int(local), values["description"])


def _machine(values: Any) -> Machine:
    place = "machine"
    _require_names(values, [field.name for field in fields(Machine)], place)
    if (name := values["collectives"]) not in COLLECTIVES:
        raise ValueError(f"{place}.collectives is {shown(str(name))}: not one of {', '.join(COLLECTIVES)}")
    if not isinstance(values["trees"], bool):
        raise ValueError(f"{place}.trees is {shown(str(values['trees']))}: not true or false")
    made = {
        "inside": _made(Link, values["inside"], f"{place}.inside"),
        "between": _made(Link, values["between"], f"{place}.between"),
        "codecs": _each(values, "codecs", place, lambda each, where: _made(Codec, each, where)),
        "uncertainty": _numbers(values, "uncertainty", place),
        "copies": None if values["copies"] is None else _copies(values, place),
        "collectives": values["collectives"],
        "trees": values["trees"],
    }
    if values["cores"] is None:
        made["cores"] = None
    return _made(Machine, values, place, **made)


def _copies(values: Any, place: str) -> dict[str, float]:
    made = _numbers(values, "copies", place)
    _require_names(made, KINDS, f"{place}.copies")
    return made


def _workload(values: Any, place: str) -> Workload:
    _require_names(values, [field.name for field in fields(Workload)], place)
    if not isinstance(values["buckets"], list) or not values["buckets"]:
        raise ValueError(f"{place}.buckets is empty")
    buckets = tuple(_made(Bucket, each, f"{place}.buckets[{i}]") for i, each in enumerate(values["buckets"]))
    for i, bucket in enumerate(buckets):
        if bucket.exact > bucket.elements:
            raise ValueError(f"{place}.buckets[{i}].exact is {bucket.exact}: more than its elements")
    return _made(Workload, values, place, buckets=buckets, unexplained=_numbers(values, "unexplained", place))


def _made(kind: type[Kind], values: Any, place: str, **made: Any) -> Kind:
    """Makes a dataclass of numbers, and of fields that have been made."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # all are dataclasses
    _require_names(values, names, place)
    numbers = {name: _number(values[name], name, f"{place}.{name}") for name in names if name not in made}
    return kind(**numbers, **made)


def _numbers(values: Any, name: str, place: str) -> dict[str, float]:
    return _each(values, name, place, lambda each, where: _number(each, name, where))


def _each(values: Any, name: str, place: str, make: Any) -> dict[str, Any]:
    if not isinstance(values[name], dict):
        raise ValueError(f"{place}.{name} is {shown(str(values[name]))}: not an object")
    return {key: make(each, f"{place}.{name}.{shown(key)}") for key, each in values[name].items()}


def _require_names(values: Any, names: Any, place: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{place} is not an object")
    if missing := [name for name in names if name not in values]:
        raise ValueError(f"{place} has no {missing[0]}")
    if unknown := [name for name in values if name not in names]:
        raise ValueError(f"{place} has an unknown {shown(unknown[0])}")


def _number(value: Any, name: str, place: str) -> float:
    least, most = _RANGES[name]
    whole = isinstance(least, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ValueError(f"{place} is {shown(str(value))}: not a {'whole ' * whole}number")
    if not least <= value <= most:
        raise ValueError(f"{place} is {shown(str(value))}: not from {least} to {most}")
    return value if whole else float(value)
