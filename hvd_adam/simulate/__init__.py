"""The command `simulate`: calibrates a cost model of the training step, and predicts how a job scales."""
