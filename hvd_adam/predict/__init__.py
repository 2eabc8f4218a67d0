"""The command `python -m hvd_adam.predict`: the classes of image files. Imports no torch."""
