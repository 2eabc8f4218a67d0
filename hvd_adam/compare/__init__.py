"""The command `compare`: Adam next to other optimizers, and studies of what its training depends on."""
