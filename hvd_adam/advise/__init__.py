"""The command `python -m hvd_adam.advise`: batch size and number of ranks for a run. Imports no torch."""
