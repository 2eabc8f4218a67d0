"""Runs commands in forks of one process that has imported PyTorch, each in a tenth of the time of a new process.

Started as a program, it reads one JSON object a line: "argv" as after `python -m`, "cwd", "environ", "output" (a
path without its ending). It forks, runs the module in the child, and prints the child's exit code.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

from hvd_adam.loading import loading_modules

ROOT = Path(__file__).parents[2]
PRELOADED = (
    *("hvd_adam.training.trainer", "hvd_adam.training.evaluation", "horovod.torch", "jsonargparse", "sklearn"),
    *("matplotlib.backends.backend_agg", "matplotlib.figure", "tensorboard.compat.proto.event_pb2"),
    *("tensorboard.plugins.hparams.summary_v2", "tensorboard.plugins.text.summary_v2"),
)


class ForkedCommands:
    """A context manager; `run` runs a command as `python -m` does and returns its `CompletedProcess`.

    Args:
        folder: where commands run.
        preload: further modules to import once for all of them.
    """

    def __init__(self, folder, *preload):
        self.folder, self.preload = folder, preload

    def __enter__(self):
        environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, *self.preload]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
        )
        return self

    def __exit__(self, *_):
        self.server.stdin.close()
        self.server.wait(timeout=60)
        self.server.stdout.close()

    def run(self, *argv, cwd=None, **environ):
        output, cwd = str(self.folder / "output"), str(cwd or self.folder)
        request = {"argv": list(map(str, argv)), "cwd": cwd, "environ": environ, "output": output}
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        stdout, stderr = (Path(f"{output}.{stream}").read_text() for stream in ("stdout", "stderr"))
        return subprocess.CompletedProcess(argv, code, stdout, stderr)


def serve():
    """Forks for every line of stdin; the children return from here, and end as a program ends."""
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
            return
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


def become(request):
    """Makes this process the command."""
    for number, stream in ((0, None), (1, "stdout"), (2, "stderr")):
        path = os.devnull if stream is None else f"{request['output']}.{stream}"
        file = os.open(path, os.O_RDONLY if stream is None else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(request["environ"])
    os.chdir(request["cwd"])
    sys.path.insert(0, request["cwd"])
    module, *sys.argv[1:] = request["argv"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    with loading_modules():
        for name in (*PRELOADED, *sys.argv[1:]):
            importlib.import_module(name)
    serve()
