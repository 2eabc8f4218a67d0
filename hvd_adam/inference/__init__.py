"""What was trained, for use: models from checkpoints, and their predictions. Needs no data set and no Horovod."""
