"""The weights of a run: which are trained, where they start, and their moving average."""
