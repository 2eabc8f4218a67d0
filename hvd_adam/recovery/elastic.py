"""Elastic training: ranks may be lost or added during a run, under an elastic horovodrun.

Every rank keeps a copy of the training state in memory (`InMemoryCheckpoint`). When a rank is lost, the remaining
ranks restart Horovod, load the newest copy and continue. When a host is added, all ranks do so after the update in
progress. Unlike Horovod's own state classes this runs no optimizer step and does not reorder the rest of an epoch:
updates take the same images at any number of ranks (`hvd_adam.data.sampling`).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from hvd_adam.checkpoint.state import TrainingState
from hvd_adam.distributed.broadcast.tensors import broadcast_nested
from hvd_adam.distributed.context import Cluster, current_rank, horovod, init, restart
from hvd_adam.distributed.launch_env import is_elastic
from hvd_adam.errors import MembershipChanged, UserError
from hvd_adam.log import ALL_RANKS, logger
from hvd_adam.text import first_line

# Another rank may be lost while the remaining ranks restart.
ATTEMPTS = 5


class InMemoryCheckpoint:
    """This rank's copy of the training state, and whether the launcher has reported added or removed hosts."""

    def __init__(self) -> None:
        self._state: TrainingState | None = None
        self._hosts_changed = False

    def commit(self, state: TrainingState) -> None:
        """Copies the state, into the memory of the previous copy; a committed state survives the loss of ranks."""
        self._state = state.copy(over=self._state)

    def newest(self, cluster: Cluster) -> TrainingState | None:
        """Returns the newest copy of all ranks on rank 0, and None on other ranks and if no rank has a copy.

        Every rank must call it.

        Args:
            cluster: this process.
        """
        own = -1 if self._state is None else self._state.progress["step"]
        steps = horovod().allgather_object(own, name="hvd_adam.committed") if cluster.size > 1 else [own]
        holder = steps.index(max(steps))
        state = self._state
        if holder:  # rank 0 is new, or its copy is older
            own_fields = None if state is None else state.as_dict()
            state = TrainingState(**broadcast_nested(own_fields, "hvd_adam.newest", holder))
        return state if cluster.rank == 0 else None

    def hosts_changed(self) -> bool:
        """Returns whether hosts were added or removed since Horovod started."""
        return self._hosts_changed

    def on_hosts_updated(self, timestamp: int, result: int) -> None:
        """Receives the launcher's notification; Horovod calls it on rank 0, in a thread of its own."""
        self._hosts_changed = True

    def clear_hosts_changed(self) -> None:
        """Forgets past notifications; called before Horovod restarts with the present hosts."""
        self._hosts_changed = False


class Connections:
    """Horovod's TCP connections to other ranks.

    A rank that has lost another rank keeps its other connections open while it waits for the restart. The ranks
    that wait for data from it would detect that only by Gloo's timeout, and the restart would wait for them.
    """

    def __init__(self) -> None:
        self._own: list[tuple[int, str]] = []

    @contextmanager
    def record(self) -> Iterator[None]:
        """Records the connections that are made in the block as Horovod's."""
        before = set(_established())
        yield
        self._own = [item for item in _established() if item not in before]

    def shut_down(self) -> None:
        """Shuts down the recorded connections, for both sides."""
        for descriptor, _ in set(_established()).intersection(self._own):
            with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                connection.shutdown(socket.SHUT_RDWR)  # unless it has been closed meanwhile


def _established() -> list[tuple[int, str]]:
    """Returns this process's TCP connections: file descriptors and both addresses."""
    import psutil  # here: optional, in the extra `horovod`

    process = psutil.Process()
    connections = getattr(process, "net_connections", None) or process.connections  # before psutil 6
    return [
        (item.fd, f"{item.laddr}-{item.raddr}")
        for item in connections("tcp")
        if item.status == psutil.CONN_ESTABLISHED
    ]


def run(train: Callable[[InMemoryCheckpoint], None], device: str) -> None:
    """Calls `train` until it returns, again each time that ranks are lost or added.

    Args:
        train: one run, from `init` on. It starts from what `newest` returns, commits, and raises
            MembershipChanged on all ranks, after a commit, when hosts have changed.
        device: as in `init`.

    Raises:
        UserError: the launcher is not elastic.
    """
    from horovod.common.elastic import notification_manager
    from horovod.common.exceptions import HorovodInternalError

    if not is_elastic():
        raise UserError("--elastic needs a launcher that restarts ranks: use launch/elastic.sh")
    memory, connections = InMemoryCheckpoint(), Connections()
    _start(init, device, connections)
    notification_manager.init()
    notification_manager.register_listener(memory)
    while True:
        try:
            return train(memory)
        except MembershipChanged:
            pass
        except HorovodInternalError as error:
            where = f"rank {current_rank()} on {socket.gethostname()}"
            logger.warning(f"{where} lost other ranks ({first_line(error)}); restarts", extra=ALL_RANKS)
            connections.shut_down()
        # Outside the except clause, because the traceback would keep the old model and optimizer alive.
        memory.clear_hosts_changed()
        _start(restart, device, connections)


def _start(begin: Callable[[str], Cluster], device: str, connections: Connections) -> None:
    """Starts Horovod among the present ranks; tries again if another rank is lost meanwhile."""
    from horovod.common.exceptions import HorovodInternalError

    for attempt in range(1, ATTEMPTS + 1):
        try:
            with connections.record():
                begin(device)
            return
        except HorovodInternalError as error:
            if attempt == ATTEMPTS:
                raise
            logger.warning(f"the start failed ({first_line(error)}); tries again", extra=ALL_RANKS)
            begin = restart
