"""Diagnoses a machine, other hosts or a job, and gives a remedy for each fault: `python -m hvd_adam.doctor`.

Modules, lowest layer first:

- `report`: the result types `Check` and `Report`.
- `machine`, `gpu`, `software`, `links`, `throughput`: the checks and measurements of one rank.
- `gather`: exchanges values between ranks before Horovod has started.
- `worker`: runs one rank's checks in a separate process, because a broken library can hang or crash it.
- `worker_process`: starts and monitors that process.
- `job_checks`, `measurement_checks`: pure functions that reduce the reports of all ranks to one line per check.
- `remote`: checks other hosts over ssh.
- `output`: the table and the JSON object.
- `command`: the command itself. `hosts` is the short check that the scripts in launch/ make first.

Everything outside the worker process needs the standard library only.
"""
