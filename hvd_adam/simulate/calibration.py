"""The file that `calibrate` writes and `predict` reads: costs of a machine and workloads. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from hvd_adam.errors import UserError
from hvd_adam.simulate.machine import Codec, Link, Machine
from hvd_adam.simulate.step import STRATEGIES, WIRE_BYTES, Setting, simulate
from hvd_adam.simulate.traffic import Ranks
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
    **dict.fromkeys(("samples", "threads", "ranks_per_host"), _COUNT),
    "elements": (1, 2**29),  # of a bucket: larger than any parameter that was measured, and simulated in seconds
    **dict.fromkeys(("jitter", "uncertainty"), (0.0, 100.0)),  # relative
    "exact": (0, 10**12),
    "cores": (0.01, 1e6),
    "message_bytes": (2.0**20, 1e18),  # a bucket becomes so many messages, which are simulated one by one
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
    machine = _machine(values["machine"])
    for name, workload in workloads.items():
        _require_positive_steps(workload, machine, int(local), f"workloads.{shown(name)}.unexplained")
    return Calibration(machine, workloads, int(local), values["description"])


def _require_positive_steps(workload: Workload, machine: Machine, local: int, place: str) -> None:
    """Checks that no more is subtracted from a simulated step of two hosts than it takes."""
    for name, seconds in workload.unexplained.items():
        strategy, _, compression = name.partition("-")
        if strategy not in STRATEGIES or compression not in WIRE_BYTES:
            raise ValueError(f"{place} has an unknown {shown(name)}")
        if simulate(workload, Setting(Ranks(2 * local, local), strategy, compression), machine).seconds <= 0:
            raise ValueError(f"{place}.{shown(name)} is {seconds:g}: more than a step takes is subtracted")


# What makes a field of a dataclass from a value of the file, given its name and its place in the file.
Maker = Callable[[Any, str, str], Any]


def _machine(values: Any) -> Machine:
    makers: dict[str, Maker] = {
        **dict.fromkeys(("inside", "between"), lambda value, _, place: _made(Link, value, place)),
        "codecs": _each(lambda value, _, place: _made(Codec, value, place)),
        "uncertainty": _each(_number),
        "copies": lambda *given: None if given[0] is None else _copies(*given),
        "collectives": _collectives,
        "trees": _trees,
        "cores": lambda *given: None if given[0] is None else _number(*given),
    }
    return _made(Machine, values, "machine", makers)


def _copies(value: Any, name: str, place: str) -> dict[str, float]:
    made: dict[str, float] = _each(_number)(value, name, place)
    _require_names(made, KINDS, place)
    return made


def _collectives(value: Any, _: str, place: str) -> str:
    if value not in COLLECTIVES:
        raise ValueError(f"{place} is {shown(str(value))}: not one of {', '.join(COLLECTIVES)}")
    return str(value)


def _trees(value: Any, _: str, place: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{place} is {shown(str(value))}: not true or false")
    return value


def _workload(values: Any, place: str) -> Workload:
    return _made(Workload, values, place, {"buckets": _buckets, "unexplained": _each(_number)})


def _buckets(value: Any, _: str, place: str) -> tuple[Bucket, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place} is empty")
    buckets = tuple(_made(Bucket, each, f"{place}[{i}]") for i, each in enumerate(value))
    for i, bucket in enumerate(buckets):
        if bucket.exact > bucket.elements:
            raise ValueError(f"{place}[{i}].exact is {bucket.exact}: more than its elements")
    return buckets


def _made(kind: type[Kind], values: Any, place: str, makers: Mapping[str, Maker] = MappingProxyType({})) -> Kind:
    """Makes a dataclass. Fields without a maker are numbers."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # all are dataclasses
    _require_names(values, names, place)
    found = {}
    for name in names:
        make: Maker = makers.get(name, _number)
        found[name] = make(values[name], name, f"{place}.{name}")
    return kind(**found)


def _each(make: Maker) -> Maker:
    """Returns what makes each value of an object."""

    def made(value: Any, name: str, place: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f"{place} is {shown(str(value))}: not an object")
        return {key: make(each, name, f"{place}.{shown(key)}") for key, each in value.items()}

    return made


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
