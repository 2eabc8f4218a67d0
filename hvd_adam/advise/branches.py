"""Short runs of `hvd_adam.train` that continue a run from its newest checkpoint with another batch.

The checkpoint is read, changed in memory, and written to a temporary folder, in which the branch runs. The run's
own folder is not written to.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hvd_adam.advise.choice import Setting
from hvd_adam.advise.record import Record
from hvd_adam.checkpoint import storage
from hvd_adam.config import TrainConfig
from hvd_adam.distributed.launch_env import BUILD_COMMAND
from hvd_adam.errors import UserError
from hvd_adam.schedule import scale
from hvd_adam.training.run_log import METRICS_FILE, read_events

NEVER = 10**9  # updates
LEAST_RATE = 0.01  # of the peak learning rate; with less, a branch would hardly learn
END_SECONDS = 30.0  # for the ranks of a launcher to end


class Point(NamedTuple):
    """A logged event of a branch: samples since its start, mean loss since the event before, and their speed."""

    samples: int
    loss: float | None
    samples_per_second: float


class Branch(NamedTuple):
    """What a branch has logged, and the loss on the test set at its end, or None if that is not finite."""

    points: list[Point]
    test_loss: float | None


@dataclass(frozen=True)
class Launcher:
    """How `ranks` ranks are started on this host: several of them by `horovodrun --CONTROLLER`."""

    ranks: int
    controller: str

    def command(self) -> list[str]:
        """Returns the words in front of a module's name.

        Raises:
            UserError: there is no horovodrun.
        """
        python = [sys.executable, "-m"]
        if self.ranks == 1:
            return python
        script = Path(sys.executable).with_name("horovodrun")
        if not script.exists():
            raise UserError(f"{script} does not exist: build Horovod with `{BUILD_COMMAND}`")
        return [str(script), "-np", str(self.ranks), f"--{self.controller}", *python]


class Branches:
    """The branches of a run; it loads the newest checkpoint.

    Args:
        record: the run.
        launcher: starts the ranks.

    Attributes:
        record: the run.
        ranks: of a branch.

    Raises:
        UserError: there is no checkpoint, it is damaged, its updates have another number of samples than those in
            the log, or it does not know how many samples an epoch has.
    """

    def __init__(self, record: Record, launcher: Launcher) -> None:
        self.record, self.ranks = record, launcher.ranks
        self._command = launcher.command()
        self._state = storage.load(record.folder)
        batch = self._state.get("progress", {}).get("global_batch_size")
        if batch != record.global_batch:
            raise UserError(
                f"{record.folder}: an update of its newest checkpoint has {batch} samples, but "
                f"{record.global_batch} in metrics.jsonl: use the folder of one run"
            )
        if not isinstance(self._state.get("data", {}).get("train_images"), int):
            raise UserError(f"{record.folder}: its data set has no length: --measure and --confirm need one")

    def require_learning_rate(self) -> None:
        """Raises UserError if the learning rate has decayed so far that a branch would learn nothing."""
        state = self._state
        rate, peak = float(state["optimizer"]["param_groups"][0]["lr"]), float(state["schedule"]["peak"])
        if rate < LEAST_RATE * peak:
            raise UserError(
                f"{self.record.folder}: at its newest checkpoint the learning rate has decayed to {rate:.3g}, of "
                f"{peak:.3g}: resume the run with a larger --epochs, stop it before its end (Ctrl-C), and then "
                "use --confirm"
            )

    def run(self, setting: Setting, updates: int, events: int, *, scaled: bool = True) -> Branch:
        """Trains a branch in a temporary folder, which is removed.

        Args:
            setting: of the branch.
            updates: of the branch.
            events: number of log events.
            scaled: whether --lr-scaling applies; its speed does not depend on that.

        Raises:
            UserError: it fails; the message has the last line of its errors.
        """
        new = changed(self._state, self.record, setting, scaled=scaled)
        start, length = new["progress"]["step"], self._state["data"]["train_images"] // setting.global_batch
        with _temporary_folder() as folder:
            checkpoint = storage.save(folder / "start", start, new)
            options = {
                **{key: value for key, value in self.record.config.items() if hasattr(TrainConfig, key)},
                **_options(setting),
                "resume": str(checkpoint),
                "output_dir": str(folder / "run"),
                "max_steps": start + updates,
                "epochs": -(-(start + updates) // length) + 1,
                "log_every": max(1, round(updates / events)),
            }
            (folder / "config.yaml").write_text(yaml.safe_dump(options))
            _finish([*self._command, "hvd_adam.train", "--config", str(folder / "config.yaml")], setting)
            return _read(folder / "run", start, setting)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Makes a folder, and removes it at the end, also if a signal arrives while it is made."""
    with ExitStack() as stack:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hvd_adam-branch-"))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield Path(folder)


def changed(state: Mapping[str, Any], record: Record, setting: Setting, *, scaled: bool = True) -> dict[str, Any]:
    """Returns the state of a checkpoint after as many samples of the same epoch, with another batch.

    The learning rate stays that of the last update, times what --lr-scaling makes of the other batch; so do the
    betas and ε.

    Args:
        state: of the run; it is not changed.
        record: the run.
        setting: of the branch.
        scaled: whether --lr-scaling applies.

    Raises:
        UserError: --lr-scaling cannot scale the hyper-parameters by so much.
    """
    # Tensors are shared: only containers are copied.
    new = {**state, "config": {**state["config"], **_options(setting)}}
    new["optimizer"] = {**state["optimizer"], "param_groups": deepcopy(state["optimizer"]["param_groups"])}
    factor, rule = (
        setting.global_batch / record.global_batch,
        str(state["config"]["lr_scaling"]) if scaled else "none",
    )
    for group in new["optimizer"]["param_groups"]:
        values = scale(factor, rule, lr=group["lr"], betas=tuple(group["betas"]), eps=group["eps"])
        group.update(values._asdict())
        new["schedule"] = {"initial": values.lr, "peak": values.lr}
    new["ranks"] = [{**rank, "loss": [0.0, 0.0]} for rank in state["ranks"]]
    progress, samples = state["progress"], state["data"]["train_images"]
    own_length, length = samples // record.global_batch, samples // setting.global_batch
    position = (progress["step"] - (progress["epoch"] - 1) * own_length) * record.global_batch
    within = length if progress["epoch_done"] else min(length, round(position / setting.global_batch))
    step = (progress["epoch"] - 1) * length + within
    new["progress"] = {
        **progress,
        "step": step,
        "global_batch_size": setting.global_batch,
        "micro_batch_size": setting.micro_batch,
    }
    return new


def _options(setting: Setting) -> dict[str, Any]:
    """Returns the options in which a branch differs from its run, besides its length."""
    plain = {name: getattr(TrainConfig, name) for name in ("warmup_epochs", "lr_decay_epochs", "lr_decay_factor")}
    return {
        **plain,
        "lr_scaling": "none",
        "lr_decay": "constant",
        "batch_size": None,
        "global_batch_size": setting.global_batch,
        "accumulate": setting.accumulate,
        "noise_scale": None,
        "noise_scale_form": TrainConfig.noise_scale_form,
        "elastic": False,
        "commit_every": TrainConfig.commit_every,
        "init_from": None,
        "max_time": None,
        "eval_every": NEVER,
        "checkpoint_every": NEVER,
        "check_consistency_every": None,
    }


def _finish(command: list[str], setting: Setting) -> None:
    """Runs a command, and ends its ranks if this process is to end."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)  # the ranks end with it; SIGKILL would leave them behind
                with suppress(subprocess.TimeoutExpired):
                    process.wait(END_SECONDS)
                process.kill()
        if code:
            errors.seek(0)
            lines = [line.strip() for line in errors if line.strip()]
            said = next((line for line in reversed(lines) if "hvd_adam" in line), lines[-1] if lines else "")
            raise UserError(
                f"training with {setting.global_batch} samples in an update ended with exit code {code}: {said}"
            )


def _read(folder: Path, start: int, setting: Setting) -> Branch:
    events = [*read_events(folder / METRICS_FILE)]
    points = [
        Point((event["step"] - start) * setting.global_batch, event["loss"], event["images_per_second"])
        for event in events
        if event["event"] == "step"
    ]
    tested = [event["test_loss"] for event in events if event["event"] == "eval"]
    return Branch(points, tested[-1] if tested else None)
