"""Broadcasts of tensors, and of the state of a training, bit for bit."""
