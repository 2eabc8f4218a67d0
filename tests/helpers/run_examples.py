"""Runs scripts of examples/ one after another on this rank: `run_examples.py FOLDER`.

The ranks of a job start once for all scripts. `FOLDER/runs.json` has for each run the script, its options and the
default dtype. Each rank writes what it printed, its modules and its random state to `FOLDER/RUN-RANK.pt`. With a
second argument, a run folder, the process first trains there what `finetune.py` starts from.
"""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import torch

from hvd_adam import init
from hvd_adam.config import TrainConfig
from hvd_adam.train import main as train

EXAMPLES = Path(__file__).parents[2] / "examples"


def main(folder: Path, start: str | None = None) -> None:
    cluster = init()
    if start:
        train(TrainConfig(model="shufflenet_v2_x0_5", max_steps=2, output_dir=start))
    for name, (script, options, dtype) in json.loads((folder / "runs.json").read_text()).items():
        torch.set_default_dtype(getattr(torch, dtype))
        sys.argv = [script, *options]
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            left = runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        modules = {key: value.state_dict() for key, value in left.items() if isinstance(value, torch.nn.Module)}
        result = {"output": output.getvalue(), "modules": modules, "random": torch.get_rng_state()}
        torch.save(result, folder / f"{name}-{cluster.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
