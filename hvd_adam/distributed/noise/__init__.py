"""The gradient noise scale of a training: what a larger batch would bring."""
