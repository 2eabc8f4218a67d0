"""Commands of the package, run in forks of a process that has imported PyTorch, with their output."""

import os
import subprocess

from helpers.forked_python import ForkServer, forked_python


class ForkedCommands:
    """A context manager; `run` runs a command as `python -m` does and returns its `CompletedProcess`.

    Args:
        folder: where commands run.
        preload: further modules to import once for all of them.
    """

    def __init__(self, folder, *preload):
        self.folder, self.preload = folder, preload

    def __enter__(self):
        self._server = ForkServer(*self.preload) if self.preload else None
        return self

    def __exit__(self, *_):
        if self._server:
            self._server.close()

    def run(self, *argv, cwd=None, **environ):
        python = self._server.python if self._server else forked_python()
        command = [python, "-m", *map(str, argv)]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 250}
        done = subprocess.run(command, cwd=cwd or self.folder, env=environ, **options)
        return subprocess.CompletedProcess(argv, done.returncode, done.stdout, done.stderr)
