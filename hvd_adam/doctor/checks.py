"""What the doctor finds: checks with a status, and a rank's report, as plain values that travel as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

OK, WARN, FAIL = "ok", "warn", "fail"
STATUSES = (OK, WARN, FAIL)  # from good to bad


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: "ok", "warn" or "fail".
        found: the value, and what is wrong with it.
        remedy: what to do; never empty, unless the status is "ok".
    """

    name: str
    status: str
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Check:
    """A check that passed."""
    return Check(name, OK, found)


def warn(name: str, found: str, remedy: str) -> Check:
    """A check that found what may cost time, or trouble later."""
    return Check(name, WARN, found, remedy)


def fail(name: str, found: str, remedy: str) -> Check:
    """A check that found what stops or spoils a training."""
    return Check(name, FAIL, found, remedy)


def worst(statuses: Iterable[str]) -> str:
    """The worst of some statuses; "ok" for none."""
    return max(statuses, key=STATUSES.index, default=OK)


def sentence(name: str, message: str) -> Check:
    """A failure from an error message of ours: "what is wrong; what to do", or "what is wrong: what to do"."""
    for separator in ("; ", ": "):
        found, _, remedy = message.partition(separator)
        if remedy:
            return fail(name, found, remedy)
    return fail(name, message, "see the README")


def brief(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def shortened(texts: Iterable[str], most: int = 4) -> str:
    """Different texts in a row, no more than some."""
    texts = list(dict.fromkeys(texts))
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def look(name: str, check: Callable[[], Check]) -> Check:
    """What a check finds; a warning that says so, where it cannot be made at all."""
    try:
        return check()
    except Exception as error:
        return warn(name, f"cannot be looked at: {brief(error)}", "look at it by hand")


@dataclass
class Report:
    """What one rank, or one host, has found by itself.

    Attributes:
        rank: of the job; 0 without a launcher.
        host: its name.
        checks: what it could judge alone.
        versions: of what must be the same everywhere, by name.
        facts: what only a comparison with the others can judge; plain values by name.
    """

    rank: int
    host: str
    checks: list[Check] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Report:
        """From what `plain` gave; what another version of this code has besides is left out."""
        known = {item.name: plain[item.name] for item in fields(cls) if item.name in plain}
        return cls(**{**known, "checks": [Check(**check) for check in known["checks"]]})
