"""The Python half of the launch scripts: exit codes, signals and stderr of horovodrun, mpirun and srun."""
