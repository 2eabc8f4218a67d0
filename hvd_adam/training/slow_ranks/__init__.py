"""Which rank holds the others up during training, and by what."""
