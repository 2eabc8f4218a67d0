"""Between the ranks, before Horovod: every rank gets what each has to say, whether Horovod works there or not.

By MPI itself where MPI starts the ranks, else by the key-value store of horovodrun, by which Gloo's ranks meet.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from hvd_adam.distributed.context import HOROVOD_DEFAULTS
from hvd_adam.distributed.launch_env import LaunchInfo, refuse_srun_without_pmix, size_mismatch

POLL_SECONDS = 0.05
POLLS_A_SECOND = 500  # that the store of all ranks can answer, roughly
REQUEST_SECONDS = 5.0
SCOPE = "hvd_adam.doctor"


class MissingError(Exception):
    """Ranks that have not come in time.

    Attributes:
        ranks: which; empty where that cannot be told.
        values: what the others have given, by rank; empty where that is not known.
    """

    def __init__(self, ranks: list[int], values: Sequence[Any] = ()) -> None:
        super().__init__(f"missing ranks {ranks}")
        self.ranks, self.values = ranks, values


class Gathering(ABC):
    """The ranks of a job; collectives of plain values, which all ranks call in the same order."""

    @abstractmethod
    def all(self, value: Any) -> list[Any]:
        """What each rank has given, by rank.

        Raises:
            MissingError: a rank has not called it in time.
        """


def mpi() -> ModuleType:
    """Imports mpi4py's MPI, which then is not started yet, and is ended with the process."""
    import mpi4py

    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    from mpi4py import MPI

    return MPI


def connect(launch: LaunchInfo, store: str | None, timeout: float) -> Gathering:
    """Meets the other ranks.

    Args:
        launch: of this rank; more than one.
        store: of Gloo, as `hvd_adam.distributed.context.gloo_store_address` gives it; None for MPI.
        timeout: seconds to wait for a rank; MPI's start itself waits for all without end.

    Raises:
        UserError: MPI sees another number of ranks than the launcher.
    """
    if store is not None:
        return _ByStore(launch, f"http://{store}/{SCOPE}", timeout)
    refuse_srun_without_pmix(launch)
    return _ByMpi(launch, timeout)


class _ByMpi(Gathering):
    def __init__(self, launch: LaunchInfo, timeout: float) -> None:
        for name, value in HOROVOD_DEFAULTS.items():
            os.environ.setdefault(name, value)
        MPI = mpi()
        if not MPI.Is_initialized():
            MPI.Init_thread(MPI.THREAD_MULTIPLE)  # Horovod's thread will share it
        self._ranks, self._timeout = MPI.COMM_WORLD, timeout
        if self._ranks.size != launch.size:
            raise size_mismatch(launch, self._ranks.size)

    def all(self, value: Any) -> list[Any]:
        # Sleeps where MPI would poll, which takes the cores from what the others still measure.
        arrived, end = self._ranks.Ibarrier(), time.monotonic() + self._timeout
        while not arrived.Test():
            if time.monotonic() > end:
                raise MissingError([])
            time.sleep(POLL_SECONDS / 10)
        return [json.loads(text) for text in self._ranks.allgather(json.dumps(value))]


class _ByStore(Gathering):
    def __init__(self, launch: LaunchInfo, address: str, timeout: float) -> None:
        self._launch, self._address, self._timeout, self._count = launch, address, timeout, 0

    def all(self, value: Any) -> list[Any]:
        self._count += 1
        rank, ranks = self._launch.rank, range(self._launch.size)
        if rank:
            self._put(str(rank), value)
            # Rank 0 waits for all before it answers.
            answer = self._wait(["all"], 2 * self._timeout)
            if not answer:
                raise MissingError([0])
            if answer["all"]["missing"]:
                raise MissingError(answer["all"]["missing"])
            return answer["all"]["values"]
        values = {"0": value} | self._wait([str(other) for other in ranks[1:]], self._timeout)
        missing = [other for other in ranks if str(other) not in values]
        listed = [values.get(str(other)) for other in ranks]
        self._put("all", {"missing": missing, "values": listed})
        if missing:
            raise MissingError(missing, listed)
        return listed

    def _wait(self, names: list[str], timeout: float) -> dict[str, Any]:
        """The values that are there in time, by name."""
        found: dict[str, Any] = {}
        end = time.monotonic() + timeout
        while len(found) < len(names) and time.monotonic() < end:
            for name in names:
                if name not in found and (text := self._get(name)) is not None:
                    found[name] = json.loads(text)
            time.sleep(max(POLL_SECONDS, self._launch.size / POLLS_A_SECOND))
        return found

    def _put(self, name: str, value: Any) -> None:
        request = urllib.request.Request(self._url(name), json.dumps(value).encode(), method="PUT")
        self._ask(request).close()

    def _get(self, name: str) -> bytes | None:
        try:
            with self._ask(urllib.request.Request(self._url(name))) as answer:
                return answer.read()
        except urllib.error.HTTPError:  # not there yet
            return None

    def _url(self, name: str) -> str:
        return f"{self._address}/{self._count}.{name}"

    def _ask(self, request: urllib.request.Request) -> Any:
        # A proxy that the environment names is for the world outside.
        return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=REQUEST_SECONDS)
