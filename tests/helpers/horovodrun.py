"""horovodrun without its check that Horovod has the requested controller, which imports torch in a new process."""

if __name__ == "__main__":  # not in horovodrun's processes, which import this module again
    from horovod.runner import launch

    launch.gloo_built = launch.mpi_built = lambda verbose=False: True
    launch.run_commandline()
