"""horovodrun without its check that Horovod has the requested controller, which imports torch in a new process."""

from horovod.runner import launch

if __name__ == "__main__":  # not in helper processes, which import this module again
    launch.gloo_built = launch.mpi_built = lambda verbose=False: True
    launch.run_commandline()
