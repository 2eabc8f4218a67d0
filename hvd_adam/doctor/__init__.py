"""Says what is wrong with a machine or a job, and what to do: `python -m hvd_adam.doctor`.

Imports run upwards: `checks` (what a finding is); `machine`, `gpu`, `software`, `links` and `speed` (what one rank
sees); `gather` (between ranks); `worker` (a rank's examination, in a process of its own, since what is broken may
hang or crash it); `follow` (watches that process); `judge` and `measured` (pure: from the findings of all to one
line a check); `remote` (other hosts by ssh); `show`; `examine` (the command).
"""
