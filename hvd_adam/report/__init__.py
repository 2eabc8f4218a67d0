"""The command `python -m hvd_adam.report`: one HTML page that shows runs. Imports no torch."""
