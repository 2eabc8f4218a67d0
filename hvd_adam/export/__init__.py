"""The command `python -m hvd_adam.export`: a trained model as one file. Imports no torch."""
