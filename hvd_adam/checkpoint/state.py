"""`TrainingState`: all that a run needs to go on where it stopped, and its way into and out of a dictionary.

The dictionary is what a checkpoint holds: plain containers, numbers, strings and tensors, the optimizer in
`torch.optim.Adam`'s format whatever the strategy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from hvd_adam.distributed.context import Cluster, horovod
from hvd_adam.errors import UserError

# What may be another from one part of a run to the next: how fast and where it computes, not what.
FREE = frozenset(
    "epochs max_steps batch_size global_batch_size accumulate implementation strategy compression channels_last "
    "compile deterministic device data_dir download output_dir resume checkpoint_every keep max_time log_every "
    "eval_every check_consistency_every max_skipped elastic commit_every stall_timeout".split()
)


@dataclass
class TrainingState:
    """What rank 0 saves.

    Attributes:
        model: its state dictionary.
        optimizer: its state dictionary, in `torch.optim.Adam`'s format.
        loss_scaler: its state dictionary, or None.
        progress: "step", "epoch" and "epoch_done", updates "skipped" in all and "skipped_in_a_row", the
            "best_accuracy" and last "scores" so far (or None), the "global_batch_size" that steps count and the
            "micro_batch_size", the most images of a rank's micro-batch.
        schedule: "initial" and "peak" learning rate.
        ranks: of each rank "cpu" and "cuda" (or None), the states of its random generators, and "loss", its part
            of the running mean.
        config: the run's configuration.
        data: "classes", and "mean" and "std" of the channels.
    """

    model: dict[str, Any]
    optimizer: dict[str, Any]
    loss_scaler: dict[str, Any] | None
    progress: dict[str, Any]
    schedule: dict[str, float]
    ranks: list[dict[str, Any]]
    config: dict[str, Any]
    data: dict[str, Any]

    def copy(self, over: TrainingState | None = None) -> TrainingState:
        """A copy on the CPU, which training goes on beside; in the memory of an older one, if it may be had."""
        parts = [item.name for item in fields(self)]
        return TrainingState(**{name: _copied(getattr(self, name), getattr(over, name, None)) for name in parts})

    def as_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; `of` takes it."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def of(cls, saved: Mapping[str, Any], where: str) -> TrainingState:
        """Takes a checkpoint's dictionary.

        Raises:
            UserError: something that a resume needs is not in it; names it.
        """
        for item in fields(cls):
            if item.name not in saved:
                raise UserError(f"checkpoint {where} cannot be resumed: it has no {item.name}")
        return cls(**{item.name: saved[item.name] for item in fields(cls)})

    def require_same_run(self, config: Mapping[str, Any], global_batch_size: int | None, where: str) -> None:
        """Refuses a run that is another one than the checkpoint's, by the first difference.

        Without a `global_batch_size` the run takes over the checkpoint's.
        """
        remedy = "use the same, or --resume never and another --output-dir"
        for name, value in config.items():
            theirs = self.config.get(name, value)
            if name not in FREE and theirs != value:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} is {value}, but {theirs} in checkpoint {where}: {remedy}")
        theirs = self.progress["global_batch_size"]
        if global_batch_size not in (None, theirs):
            raise UserError(
                f"an update has {global_batch_size} images, but {theirs} in checkpoint {where}: use "
                f"--global-batch-size {theirs}, or --resume never and another --output-dir"
            )


def require_same_tensors(own: Mapping[str, Any], saved: Mapping[str, Any], where: str) -> None:
    """Refuses saved weights that do not fit a model, by the first difference.

    Args:
        own: the model's state dictionary.
        saved: the checkpoint's.
        where: the checkpoint, for the message.
    """
    for name in sorted({*own, *saved}):
        here, there = (tuple(w[name].shape) if name in w else "absent" for w in (own, saved))
        if here != there:
            raise UserError(
                f"checkpoint {where} is of another model or data set: {name} is {there} in it and {here} in the "
                "model"
            )


def rank_state(cluster: Cluster, loss: tuple[float, float]) -> dict[str, Any]:
    """This rank's entry of `TrainingState.ranks`."""
    cuda = torch.cuda.get_rng_state(cluster.device) if cluster.device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda, "loss": list(loss)}


def gather_rank_states(cluster: Cluster, own: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's entry; every rank calls it. One message of bytes: objects would take two, and pickling."""
    if cluster.size == 1:
        return [own]
    loss = torch.tensor(own["loss"], dtype=torch.float64).view(torch.uint8)
    parts = [own["cpu"], *([] if own["cuda"] is None else [own["cuda"]]), loss]  # alike on all ranks
    everyones = horovod().allgather(torch.cat(parts).unsqueeze(0), name="hvd_adam.ranks")
    entries = []
    for row in everyones:
        cpu, *cuda, loss = (part.clone() for part in row.split([part.numel() for part in parts]))
        total = loss.view(torch.float64).tolist()
        entries.append({"cpu": cpu, "cuda": cuda[0] if cuda else None, "loss": total})
    return entries


def restore_rng_state(entry: Mapping[str, Any], cluster: Cluster) -> None:
    """Sets this rank's random generators to where they were."""
    torch.set_rng_state(entry["cpu"])
    if entry["cuda"] is not None and cluster.device.type == "cuda":
        torch.cuda.set_rng_state(entry["cuda"], cluster.device)


def _copied(value: Any, over: Any = None) -> Any:
    """A copy on the CPU; tensors of the same kind in `over` are overwritten, since fresh memory takes longer."""
    if isinstance(value, torch.Tensor):
        fits = isinstance(over, torch.Tensor) and (over.shape, over.dtype) == (value.shape, value.dtype)
        return over.copy_(value.detach()) if fits else value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        older = over if isinstance(over, Mapping) else {}
        return {key: _copied(item, older.get(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        older = over if isinstance(over, list | tuple) and len(over) == len(value) else [None] * len(value)
        return type(value)(map(_copied, value, older))
    return value
