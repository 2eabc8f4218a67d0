"""The build of Horovod for the PyTorch and the MPI of this machine: ``python -m hvd_adam.build_horovod``."""
