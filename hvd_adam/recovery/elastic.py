"""Training among ranks that come and go, under an elastic horovodrun.

Every rank keeps a copy of the training in memory (`InMemoryCheckpoint`). When one is lost, those that are
left start Horovod anew, take up the newest copy, and go on; when a host is added, all do so after the update under
way. Unlike Horovod's own state classes this one runs no optimizer step, and does not reorder what is left of an
epoch: updates take the same images whatever the number of ranks (`hvd_adam.data.sampling`).
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

from hvd_adam.checkpoint.state import TrainingState
from hvd_adam.distributed.context import Cluster, current_rank, horovod, init, restart
from hvd_adam.distributed.launch_env import is_elastic
from hvd_adam.errors import MembershipChanged, UserError

# Another rank may be lost while those that are left start anew.
ATTEMPTS = 5


class InMemoryCheckpoint:
    """This rank's copy of the training, and whether the launcher has told it of other hosts."""

    def __init__(self) -> None:
        self._state: TrainingState | None = None
        self._hosts_changed = False

    def commit(self, state: TrainingState) -> None:
        """Takes a copy, over the one before; what has been committed is never lost with other ranks."""
        self._state = state.copy(over=self._state)

    def newest(self, cluster: Cluster) -> TrainingState | None:
        """The newest copy that any rank has, on rank 0; None elsewhere, and without any. Every rank calls it."""
        own = -1 if self._state is None else self._state.progress["step"]
        steps = horovod().allgather_object(own, name="hvd_adam.committed") if cluster.size > 1 else [own]
        holder = steps.index(max(steps))
        state = self._state
        if holder:  # rank 0 is new, or was behind
            state = horovod().broadcast_object(state, holder, name="hvd_adam.newest")
        return state if cluster.rank == 0 else None

    def hosts_changed(self) -> bool:
        """Whether hosts have come or left since Horovod has started."""
        return self._hosts_changed

    def on_hosts_updated(self, timestamp: int, result: int) -> None:
        """Called by Horovod, in a thread of its own, on rank 0."""
        self._hosts_changed = True

    def begin_anew(self) -> None:
        """Forgets what was said of hosts; the ranks are those of now."""
        self._hosts_changed = False


class Connections:
    """Horovod's connections to other ranks.

    A rank that has lost another keeps those to the rest open while it waits to start anew. Ranks that wait for it
    would find out by Gloo's time-out only, and all of them would have to wait for those.
    """

    def __init__(self) -> None:
        self._own: list[tuple[int, str]] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Takes those that are made in the block for Horovod's."""
        before = set(_sockets())
        yield
        self._own = [item for item in _sockets() if item not in before]

    def cut(self) -> None:
        """Ends them for both sides."""
        there = set(_sockets())
        for descriptor, _ in there.intersection(self._own):
            with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                connection.shutdown(socket.SHUT_RDWR)  # unless it has been closed meanwhile


def _sockets() -> list[tuple[int, str]]:
    """This process's TCP connections: descriptors, and what they are connected with."""
    return [
        (item.fd, f"{item.laddr}-{item.raddr}")
        for item in psutil.Process().connections("tcp")
        if item.status == psutil.CONN_ESTABLISHED
    ]


def run(train: Callable[[InMemoryCheckpoint], None], device: str) -> None:
    """Calls `train` until it returns; again each time that ranks are lost or added.

    Args:
        train: one run, from `init` on. It begins from what its `newest` returns, commits, and raises
            MembershipChanged on all ranks, after a commit, when hosts have changed.
        device: as in `init`.

    Raises:
        UserError: the launcher is not elastic.
    """
    from horovod.common.elastic import notification_manager
    from horovod.common.exceptions import HorovodInternalError

    if not is_elastic():
        raise UserError("--elastic needs a launcher that starts ranks anew: use launch/elastic.sh")
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
            _say(
                f"rank {current_rank()} on {socket.gethostname()} lost others ({_first_line(error)}); starts anew"
            )
            connections.cut()
        # Out of the except clause: a traceback would keep the model and the optimizer of before alive.
        memory.begin_anew()
        _start(restart, device, connections)


def _start(begin: Callable[[str], Cluster], device: str, connections: Connections) -> None:
    """Starts Horovod among the ranks of now; another may be lost meanwhile."""
    from horovod.common.exceptions import HorovodInternalError

    for attempt in range(1, ATTEMPTS + 1):
        try:
            with connections.noted():
                begin(device)
            return
        except HorovodInternalError as error:
            if attempt == ATTEMPTS:
                raise
            _say(f"the start failed ({_first_line(error)}); tries again")
            begin = restart


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _say(text: str) -> None:
    print(f"hvd_adam: {text}", file=sys.stderr, flush=True)
