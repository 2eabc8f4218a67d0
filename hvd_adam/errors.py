"""What a user can put right. It becomes one line on stderr and exit code 2."""


class UserError(ValueError):
    """Bad input. The message is one line that says what is wrong, where, which value, and what to do."""


class CollectiveError(UserError):
    """A `UserError` that every rank raises at the same point, so that rank 0 alone needs to print it."""


class JobError(Exception):
    """What ends the job on every rank at the same point and is no bad input: one line by rank 0, exit code 1."""


class RankError(JobError):
    """Ends this rank alone, which says so itself."""


class Preempted(Exception):
    """The run has saved itself and ends before its time, on every rank; the same command goes on with it."""


class MembershipChanged(Exception):
    """Hosts have come or left: every rank leaves the run at the same point, to go on among the ranks of now."""
