"""The report of a stalled job: which ranks are behind, what the others wait for, and what every rank is doing."""

from __future__ import annotations

import os
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

from hvd_adam.distributed.collectives import waiting as sleeping_wait

State = dict[str, Any]  # of one rank: "doing" (or ""), "beats", "idle" seconds, "waits_for" (or None), "stack"


def waits_for(frame: FrameType) -> str | None:
    """Returns the name of the collective that a thread waits for, or its place in the code; None without one.

    Args:
        frame: the thread's innermost frame.
    """
    caller = _of_horovod(frame)
    if not _in_horovod(caller):
        return None
    while caller is not None and _in_horovod(caller):
        if name := _collective_name(caller):
            return name
        caller = caller.f_back
    if caller is None:
        return None
    code = caller.f_code
    return _collective_name(caller) or f"{code.co_name} ({os.path.basename(code.co_filename)}:{caller.f_lineno})"


def _of_horovod(frame: FrameType) -> FrameType | None:
    """Returns a thread's innermost frame, or Horovod's that calls it if it is that of `sleep_while_waiting`."""
    return frame.f_back if frame.f_globals.get("__name__") == sleeping_wait.__name__ else frame


def _in_horovod(frame: FrameType | None) -> bool:
    module = "" if frame is None else str(frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] == "horovod"


def _collective_name(frame: FrameType) -> str | None:
    """Returns the name that a frame gives its collective: in a local `name`, or in its object's `_name`."""
    own = frame.f_locals
    attributes = getattr(own.get("self"), "__dict__", {})
    return next((name for name in (own.get("name"), attributes.get("_name")) if isinstance(name, str)), None)


def oldest_wait(frames: Iterable[FrameType]) -> int | None:
    """Returns Horovod's number of the collective that a thread has waited for longest; None if none waits.

    Numbers increase. `hvd.join()`, which waits for other ranks by intention, does not count.

    Args:
        frames: the innermost frame of each thread.
    """
    innermost = [frame for frame in map(_of_horovod, frames) if frame is not None]
    waiting = [frame for frame in innermost if _in_horovod(frame) and frame.f_code.co_name == "synchronize"]
    numbers = [frame.f_locals.get("handle") for frame in waiting if not _is_join(frame.f_back)]
    return min((number for number in numbers if number is not None), default=None)


def _is_join(frame: FrameType | None) -> bool:
    return frame is not None and _in_horovod(frame) and frame.f_code.co_name == "join"


def stack_of(frame: FrameType) -> str:
    """Returns the stack as a traceback without source lines, since reading them may hang with the file system."""
    calls = [(frame.f_code, line) for frame, line in traceback.walk_stack(frame)]
    lines = [f'  File "{code.co_filename}", line {line}, in {code.co_name}\n' for code, line in reversed(calls)]
    return "".join(line for line in lines if '"<frozen ' not in line)  # Python's import system and start-up


def behind(states: Mapping[int, State | None]) -> list[int]:
    """Returns the ranks that the others wait for: those that do not answer, or do not wait themselves.

    If all ranks wait: those with the least progress; if progress is equal too: those that wait for another
    collective than most ranks.

    Args:
        states: by rank; None for a rank that does not answer.
    """
    waiting = {
        rank: state for rank, state in states.items() if state is not None and state["waits_for"] is not None
    }
    if len(waiting) < len(states):
        return sorted(states.keys() - waiting.keys())
    for key in ("beats", "waits_for"):
        values = {rank: state[key] for rank, state in waiting.items()}
        usual = max(values.values()) if key == "beats" else Counter(values.values()).most_common(1)[0][0]
        others = [rank for rank, value in values.items() if value != usual]
        if others:
            return sorted(others)
    return []


def report(states: Mapping[int, State | None], hosts: list[str], problem: str, remedy: str) -> str:
    """Returns the cause in one line, then what every rank is doing; ranks in the same state share an entry.

    Args:
        states: by rank; None for a rank that does not answer.
        hosts: host names by rank.
        problem: what has happened, such as "no progress for 600 s".
        remedy: what the user can do, as a sentence without its full stop.
    """
    silent = [rank for rank, state in states.items() if state is None]
    late = [rank for rank in behind(states) if rank not in silent]
    waiting, same = defaultdict(list), defaultdict(list)
    for rank, state in sorted(states.items()):
        if state is not None:
            same[state["doing"], state["waits_for"], state["stack"]].append(rank)
            if rank not in late:
                waiting[state["waits_for"]].append(rank)
    facts = [f"{name_ranks(silent, hosts)} not answering (frozen, dead or cut off)"] if silent else []
    facts += [f"{name_ranks(late, hosts)} behind"] if late else []
    facts += [f"{name_ranks(ranks, hosts)} waiting for {name}" for name, ranks in waiting.items()]
    lines = [f"hvd_adam: error: {problem}: {'; '.join(facts)}. {remedy}\n"]
    for (doing, name, stack), ranks in same.items():
        what = f"waiting for {name}" if name else "not waiting for Horovod"
        since = f", without progress since {doing}" if doing else ""
        lines.append(f"{name_ranks(ranks, hosts)}, {what}{since}:\n{stack}")
    return "".join(lines)


def name_ranks(ranks: Iterable[int], hosts: list[str]) -> str:
    """Groups ranks by host: "rank 1 on a, ranks 2, 3 on b"."""
    by_host = defaultdict(list)
    for rank in sorted(ranks):
        by_host[hosts[rank]].append(str(rank))
    return ", ".join(f"rank{'s' * (len(r) > 1)} {', '.join(r)} on {host}" for host, r in by_host.items())
