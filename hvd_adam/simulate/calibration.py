"""The file that `calibrate` writes and `predict` reads: costs of a machine and workloads. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hvd_adam.errors import UserError
from hvd_adam.simulate.machine import Codec, Link, Machine
from hvd_adam.simulate.workload import Bucket, Workload

FORMAT = 1


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
        UserError: there is no such file, or it is not one of `calibrate`.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--calibration {path} cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(f"--calibration {path} is not JSON: write it with hvd_adam.simulate calibrate") from None
    try:
        if values["format"] != FORMAT:
            raise UserError(f"--calibration {path} has format {values['format']}, not {FORMAT}: calibrate again")
        machine = {
            **values["machine"],
            "inside": Link(**values["machine"]["inside"]),
            "between": Link(**values["machine"]["between"]),
            "codecs": {name: Codec(**codec) for name, codec in values["machine"]["codecs"].items()},
        }
        workloads = {
            name: Workload(**{**each, "buckets": tuple(Bucket(**bucket) for bucket in each["buckets"])})
            for name, each in values["workloads"].items()
        }
        return Calibration(Machine(**machine), workloads, values["ranks_per_host"], values["description"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--calibration {path} is not a file of hvd_adam.simulate calibrate ({error}): calibrate again"
        ) from None
