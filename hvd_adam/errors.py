"""Exceptions that commands turn into exit codes; those for bad input become one line on stderr."""


class UserError(ValueError):
    """Bad input. The message is one line with what is wrong, where, the value, and what to do."""


class CollectiveError(UserError):
    """A `UserError` that every rank raises at the same point, so that rank 0 prints it for all."""


class JobError(Exception):
    """Ends the job on every rank at the same point, for another reason than bad input.

    Rank 0 prints one line; the exit code is 1.
    """


class RankError(JobError):
    """Ends this rank, which prints the message itself: rank 0 need not raise it."""


class Preempted(Exception):
    """The run has saved a checkpoint and ends early on every rank; the same command resumes it."""


class MembershipChanged(Exception):
    """Hosts were added or removed: every rank leaves the run at the same point, and Horovod restarts."""
