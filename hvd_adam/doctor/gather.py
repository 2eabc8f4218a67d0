"""Gathers plain values from all ranks before Horovod is started, whether or not Horovod works.

Uses MPI itself where MPI starts the ranks, else horovodrun's key-value store, through which Gloo connects ranks.
"""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

from hvd_adam.distributed.context import horovod_defaults
from hvd_adam.distributed.kv_store import KeyValueStore
from hvd_adam.distributed.launch_env import LaunchInfo, refuse_srun_without_pmix, size_mismatch

POLL_SECONDS = 0.05
POLLS_PER_SECOND = 500  # requests of all ranks together that the store can answer, roughly
REQUEST_SECONDS = 5.0
SCOPE = "hvd_adam.doctor"
RESULT_KEY = "all"  # rank 0's answer to the other ranks


class MissingError(Exception):
    """Some ranks did not arrive in time.

    Attributes:
        ranks: the missing ranks; empty if unknown.
        values: the values of the other ranks, by rank, None for missing ones; empty if unknown.
    """

    def __init__(self, ranks: list[int], values: Sequence[Any] = ()) -> None:
        super().__init__(f"missing ranks {ranks}")
        self.ranks, self.values = ranks, values


class Gathering(ABC):
    """The ranks of a job, with one collective of plain values that all ranks call in the same order."""

    @abstractmethod
    def all(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, by rank.

        Args:
            value: this rank's value, of types that JSON can hold.

        Raises:
            MissingError: a rank did not call it in time.
        """


def mpi() -> ModuleType:
    """Imports mpi4py's MPI without starting it. MPI is finalized when the process exits."""
    import mpi4py

    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    from mpi4py import MPI

    return MPI


def connect(launch: LaunchInfo, store: str | None, timeout: float) -> Gathering:
    """Connects to the other ranks.

    Args:
        launch: this process's rank and the job's size, more than 1.
        store: HOST:PORT of horovodrun's key-value store, as `launch_env.gloo_store_address` returns it; None for
            MPI.
        timeout: seconds to wait for a rank. MPI's own start waits for all ranks without a time limit.

    Raises:
        UserError: MPI sees another number of ranks than the launcher started.
    """
    if store is not None:
        host, _, port = store.rpartition(":")
        client = KeyValueStore(host, int(port), connect_timeout=REQUEST_SECONDS, answer_timeout=REQUEST_SECONDS)
        return _StoreGathering(launch, client, timeout)
    refuse_srun_without_pmix(launch)
    return _MpiGathering(launch, timeout)


class _MpiGathering(Gathering):
    def __init__(self, launch: LaunchInfo, timeout: float) -> None:
        for name, value in horovod_defaults().items():
            os.environ.setdefault(name, value)
        MPI = mpi()
        if not MPI.Is_initialized():
            MPI.Init_thread(MPI.THREAD_MULTIPLE)  # Horovod's thread will share it
        self._ranks, self._timeout = MPI.COMM_WORLD, timeout
        if self._ranks.size != launch.size:
            raise size_mismatch(launch, self._ranks.size)

    def all(self, value: Any) -> list[Any]:
        # MPI would poll while it waits, on cores that other ranks still measure: sleep instead.
        arrived, deadline = self._ranks.Ibarrier(), time.monotonic() + self._timeout
        while not arrived.Test():
            if time.monotonic() > deadline:
                raise MissingError([])
            time.sleep(POLL_SECONDS / 10)
        return [json.loads(text) for text in self._ranks.allgather(json.dumps(value))]


class _StoreGathering(Gathering):
    """Rank 0 collects all values and stores the result for the other ranks."""

    def __init__(self, launch: LaunchInfo, store: KeyValueStore, timeout: float) -> None:
        self._launch, self._store, self._timeout = launch, store, timeout
        self._calls = 0  # so that every call has keys of its own

    def all(self, value: Any) -> list[Any]:
        self._calls += 1
        if self._launch.rank == 0:
            return self._collect(value)
        self._put(str(self._launch.rank), value)
        # Rank 0 may wait for its whole time-out before it answers.
        answer = self._wait_for([RESULT_KEY], 2 * self._timeout)
        if not answer:
            raise MissingError([0])
        if answer[RESULT_KEY]["missing"]:
            raise MissingError(answer[RESULT_KEY]["missing"])
        return cast("list[Any]", answer[RESULT_KEY]["values"])

    def _collect(self, own: Any) -> list[Any]:
        ranks = range(self._launch.size)
        found = {"0": own} | self._wait_for([str(rank) for rank in ranks[1:]], self._timeout)
        missing = [rank for rank in ranks if str(rank) not in found]
        values = [found.get(str(rank)) for rank in ranks]
        self._put(RESULT_KEY, {"missing": missing, "values": values})
        if missing:
            raise MissingError(missing, values)
        return values

    def _wait_for(self, keys: list[str], timeout: float) -> dict[str, Any]:
        """Returns the values that arrive in time, by key."""
        found: dict[str, Any] = {}
        deadline = time.monotonic() + timeout
        while len(found) < len(keys) and time.monotonic() < deadline:
            for key in keys:
                if key not in found and (text := self._store.get(SCOPE, self._numbered(key))) is not None:
                    found[key] = json.loads(text)
            time.sleep(max(POLL_SECONDS, self._launch.size / POLLS_PER_SECOND))
        return found

    def _put(self, key: str, value: Any) -> None:
        self._store.put(SCOPE, self._numbered(key), json.dumps(value))

    def _numbered(self, key: str) -> str:
        return f"{self._calls}.{key}"
