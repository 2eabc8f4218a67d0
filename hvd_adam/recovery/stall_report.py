"""The report of a stalled job: which ranks are behind, what the others wait for, and what every rank does."""

from __future__ import annotations

import os
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

State = Mapping[str, Any]  # of one rank: "doing", "beats", "idle" seconds, "waits_for" (or None), "stack"


def waits_for(frame: FrameType) -> str | None:
    """The name of the collective that a thread waits for, or where it was called; None if it does not wait.

    Args:
        frame: the thread's innermost.
    """
    if not _is_horovods(frame):
        return None
    while _is_horovods(frame) and not _name_in(frame):
        frame = frame.f_back
    code = frame.f_code
    return _name_in(frame) or f"{code.co_name} ({os.path.basename(code.co_filename)}:{frame.f_lineno})"


def _is_horovods(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] == "horovod"


def _name_in(frame: FrameType) -> str | None:
    """What a frame calls its collective: a local `name`, or one that its object keeps."""
    own = frame.f_locals
    kept = getattr(own.get("self"), "__dict__", {})
    return next((name for name in (own.get("name"), kept.get("_name")) if isinstance(name, str)), None)


def stack_of(frame: FrameType) -> str:
    """The stack as a traceback prints it, without source: reading it may hang with the file system."""
    calls = [(frame.f_code, line) for frame, line in traceback.walk_stack(frame)]
    lines = [f'  File "{code.co_filename}", line {line}, in {code.co_name}\n' for code, line in reversed(calls)]
    return "".join(line for line in lines if '"<frozen ' not in line)  # Python's own way to import and to start


def behind(states: Mapping[int, State | None]) -> list[int]:
    """The ranks that the others wait for: who does not answer, or does not wait itself.

    If all wait, those with least progress; if they are level, those that wait for another collective than most do.

    Args:
        states: by rank; None for one that does not answer.
    """
    missing = [rank for rank, state in states.items() if state is None or state["waits_for"] is None]
    if missing:
        return sorted(missing)
    for key in ("beats", "waits_for"):
        values = {rank: state[key] for rank, state in states.items()}
        usual = max(values.values()) if key == "beats" else Counter(values.values()).most_common(1)[0][0]
        others = [rank for rank, value in values.items() if value != usual]
        if others:
            return sorted(others)
    return []


def report(states: Mapping[int, State | None], hosts: list[str], timeout: float) -> str:
    """What is wrong in one line, then what every rank does; ranks that do the same share an entry.

    Args:
        states: by rank; None for one that does not answer.
        hosts: of all ranks.
        timeout: seconds without progress.
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
    lines = [
        f"hvd_adam: error: no progress for {timeout:g} s: {'; '.join(facts)}. The same command goes on from the "
        "last checkpoint; if this was slow and not stuck, use a longer --stall-timeout\n"
    ]
    for (doing, name, stack), ranks in same.items():
        what = f"waiting for {name}" if name else "not waiting for Horovod"
        lines.append(f"{name_ranks(ranks, hosts)}, {what}, without progress since {doing}:\n{stack}")
    return "".join(lines)


def name_ranks(ranks: Iterable[int], hosts: list[str]) -> str:
    """Ranks by host: "rank 1 on a, ranks 2, 3 on b"."""
    places = defaultdict(list)
    for rank in sorted(ranks):
        places[hosts[rank]].append(str(rank))
    return ", ".join(f"rank{'s' * (len(r) > 1)} {', '.join(r)} on {host}" for host, r in places.items())
