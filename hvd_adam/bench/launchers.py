"""The commands that start the ranks of a variant. Imports no torch."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvd_adam.bench.config import RanksConfig
from hvd_adam.bench.interleave import Plan
from hvd_adam.distributed.launch_env import BUILD_COMMAND
from hvd_adam.distributed.placement import cores
from hvd_adam.errors import UserError

WORKER = (sys.executable, "-m", "hvd_adam.bench.worker")

# Time-out of the ranks' collectives: a peer that is stopped between two turns must not be considered dead.
COLLECTIVE_TIMEOUT_SECONDS = 86_400


def threads(ranks: int) -> int:
    """Returns the number of threads of each rank."""
    return max(1, len(cores()) // ranks)


def device(config: RanksConfig, ranks: int) -> str:
    """Returns the type of device that ranks compute on: "cpu" or "cuda".

    Raises:
        UserError: there are GPUs, but fewer than ranks.
    """
    import torch

    gpus = torch.cuda.device_count() if config.device != "cpu" and torch.cuda.is_available() else 0
    if not gpus and config.device != "cuda":
        return "cpu"
    if gpus < ranks:
        raise UserError(f"--np {ranks} is more than the {gpus} GPUs here; use fewer ranks, or --device cpu")
    return "cuda"


def description(ranks: int, launcher: str) -> str:
    """Describes how the ranks are started."""
    return "1 rank without a launcher" if ranks == 1 else f"{ranks} ranks, horovodrun --{launcher}"


def horovodrun(name: str, task: Mapping[str, Any], ranks: int, launcher: str) -> Plan:
    """Plans a variant that horovodrun starts. Variants without Horovod only read rank and size from it.

    A single rank is started without horovodrun, so that a variant without Horovod does not need it installed.

    Args:
        name: name of the variant.
        task: task of its ranks.
        ranks: number of ranks.
        launcher: "mpi" or "gloo".

    Raises:
        UserError: this Python's environment has no horovodrun.
    """
    if ranks == 1:
        gloo = {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"}  # horovodrun --gloo sets them
        return Plan(name, task, WORKER, {**_environ(ranks), **(gloo if launcher == "gloo" else {})})
    script = Path(sys.executable).with_name("horovodrun")
    if not script.exists():
        raise UserError(f"{script} does not exist; build Horovod with `{BUILD_COMMAND}`")
    return Plan(name, task, (str(script), "-np", str(ranks), f"--{launcher}", *WORKER), _environ(ranks))


def mpirun(name: str, task: Mapping[str, Any], ranks: int, settings: Mapping[str, str]) -> Plan:
    """Plans a variant that Open MPI's mpirun starts, without binding processes to cores, as horovodrun does.

    Args:
        name: name of the variant.
        task: task of its ranks.
        ranks: number of ranks.
        settings: additional environment variables.

    Raises:
        UserError: there is no mpirun or no mpi4py.
    """
    script = shutil.which("mpirun")
    if script is None:
        raise UserError("there is no mpirun on PATH")
    if importlib.util.find_spec("mpi4py") is None:
        raise UserError("mpi4py is not installed")
    options = ("--allow-run-as-root", "-np", str(ranks), "-H", f"localhost:{ranks}", "--bind-to", "none")
    return Plan(name, task, (script, *options, "--map-by", "slot", *WORKER), {**_environ(ranks), **settings})


def _environ(ranks: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(threads(ranks)),
        "HOROVOD_GLOO_TIMEOUT_SECONDS": str(COLLECTIVE_TIMEOUT_SECONDS),
    }
