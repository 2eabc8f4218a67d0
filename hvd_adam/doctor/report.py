"""The doctor's result types: checks with a status, and the report of one rank, as plain values for JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hvd_adam.extras import extra_command

OK, WARN, FAIL = "ok", "warn", "fail"
STATUSES = (OK, WARN, FAIL)  # from good to bad

INSTALL_COMMAND = extra_command("train")


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was checked.
        status: "ok", "warn" or "fail".
        found: the value that was found and, unless the status is "ok", what is wrong with it.
        remedy: what to do; never empty unless the status is "ok".
    """

    name: str
    status: str
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Check:
    """Returns a passed check."""
    return Check(name, OK, found)


def warn(name: str, found: str, remedy: str) -> Check:
    """Returns a warning: training runs, but may be slow or fail later."""
    return Check(name, WARN, found, remedy)


def fail(name: str, found: str, remedy: str) -> Check:
    """Returns a failure: training does not run, or gives wrong results."""
    return Check(name, FAIL, found, remedy)


def worst(statuses: Iterable[str]) -> str:
    """Returns the worst status; "ok" if there is none."""
    return max(statuses, key=STATUSES.index, default=OK)


def from_error_message(name: str, message: str) -> Check:
    """Splits an error message of this package, "what is wrong; what to do" or with a colon, into a failure."""
    for separator in ("; ", ": "):
        found, _, remedy = message.partition(separator)
        if remedy:
            return fail(name, found, remedy)
    return fail(name, message, "see the documentation of this package")


def one_line(error: BaseException) -> str:
    """Returns the type and the message of an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def join_distinct(texts: Iterable[str], limit: int = 4) -> str:
    """Joins the distinct texts with commas; counts those beyond `limit`."""
    texts = list(dict.fromkeys(texts))
    return ", ".join(texts[:limit]) + (f" and {len(texts) - limit} more" if len(texts) > limit else "")


def attempt(name: str, check: Callable[[], Check]) -> Check:
    """Runs a check; returns a warning if the check itself raises an exception."""
    try:
        return check()
    except Exception as error:
        return warn(name, f"could not be checked: {one_line(error)}", "check it manually")


@dataclass
class Report:
    """The results of one rank or one host.

    Attributes:
        rank: rank in the job; 0 without a launcher.
        host: host name.
        checks: checks that need no other rank.
        versions: versions that must be identical on all ranks, by package.
        facts: JSON values by name, which are checked after they have been compared with those of other ranks.
    """

    rank: int
    host: str
    checks: list[Check] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Report:
        """Builds a report from what `to_json` returned; ignores fields that this version does not have."""
        known = {item.name: values[item.name] for item in fields(cls) if item.name in values}
        return cls(**{**known, "checks": [Check(**check) for check in known["checks"]]})
