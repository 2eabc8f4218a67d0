"""One training run, top to bottom: set up on every rank, the loop over epochs and steps, and what it leaves."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml

import hvd_adam
from hvd_adam import checkpoint, data, models
from hvd_adam.adam import Adam
from hvd_adam.broadcast import broadcast_buffers
from hvd_adam.cluster import Cluster, horovod, init, require_same, together
from hvd_adam.config import TrainConfig
from hvd_adam.data.loader import Batch, DeviceLoader
from hvd_adam.distributed import distribute
from hvd_adam.errors import UserError
from hvd_adam.evaluation import Scores, score
from hvd_adam.metrics import METRICS_FILE, RunLog, RunningMean, Stopwatch, plot
from hvd_adam.precision import autocast, loss_scaler, parameter_dtype
from hvd_adam.schedule import LearningRateSchedule, Scaled, learning_rate, scale
from hvd_adam.sync_batchnorm import convert


class Trainer:
    """A run from its configuration; every rank makes one and calls `run`.

    Raises:
        UserError: the configuration does not fit the data, the machine or the ranks; the same on every rank.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.cluster = cluster = init(config.device)
        require_same(cluster, "arguments", asdict(config))
        with together(cluster):
            self.loader = _load(config, cluster)
            self.global_batch = config.global_batch(cluster.size)
            self.steps_per_epoch = self.loader.steps_per_epoch(self.global_batch)
            self.total_steps = config.epochs * self.steps_per_epoch
            if config.max_steps is not None:
                self.total_steps = min(self.total_steps, config.max_steps)
            scaled = _scale(config, cluster)
            self.schedule = _schedule(config, scaled.lr, self.steps_per_epoch, self.total_steps)
            self.model = _build(config, self.loader)
            self.scaler = loss_scaler(config.precision, cluster.device)
        with together(cluster):
            self.folder = _make_folder(config) if cluster.rank == 0 else None
        self.optimizer = distribute(
            _adam(config, self.model, scaled),
            self.model,
            strategy=config.strategy,
            accumulate=config.accumulate,
            compression=config.compression,
            op=config.op,
            max_grad_norm=config.max_grad_norm,
            loss_scaler=self.scaler,
        )
        torch.manual_seed(config.seed + 1 + cluster.rank)  # dropout differs between ranks; weights did not
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.step = 0
        self.skipped = 0  # updates that the loss scaler left out
        self.log = RunLog(self.folder, self.total_steps)
        self.loss = RunningMean(cluster)
        self.watch = Stopwatch()

    def run(self) -> None:
        """Trains, evaluates, and leaves a checkpoint and a plot in the run folder."""
        config, cluster = self.config, self.cluster
        self.log.event("start", 0, 0, world_size=cluster.size, launcher=cluster.launcher, **self._facts())
        self.log.say(
            f"hvd_adam {hvd_adam.__version__}: {config.model} on {config.dataset}, {cluster.size} rank(s) on "
            f"{cluster.device.type}, {self.global_batch} images per update, {self.total_steps} updates"
        )
        scores = None
        for epoch in range(1, config.epochs + 1):
            self._train(epoch)
            last = self.step >= self.total_steps
            if last or epoch % config.eval_every == 0:
                scores = self._evaluate(epoch)
            if last:
                break
        self._finish(epoch, scores)

    def _train(self, epoch: int) -> None:
        """One epoch, or what `max_steps` leaves of it."""
        config, cluster = self.config, self.cluster
        self.model.train()
        self.watch.start()
        batches = self.loader.train_batches(
            config.seed,
            epoch - 1,
            global_batch_size=self.global_batch,
            rank=cluster.rank,
            size=cluster.size,
            accumulate=config.accumulate,
        )
        for _ in range(min(self.steps_per_epoch, self.total_steps - self.step)):
            self._update([next(batches) for _ in range(config.accumulate)], epoch)
            if self.step % config.log_every == 0 or self.step == self.total_steps:
                self._log_step(epoch)
        self.watch.pause()

    def _update(self, micro_batches: list[Batch], epoch: int) -> None:
        """One update from this rank's micro-batches."""
        rate = learning_rate(self.step, self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        for images, labels in micro_batches:
            with autocast(self.config.precision, self.cluster.device):
                logits = self.forward(images)
            loss = F.cross_entropy(logits.to(self.loader.dtype), labels)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            self.optimizer.step()
            self.loss.add(loss, len(images))
        self.step += 1
        self.watch.add(self.global_batch)
        if self.optimizer.skipped_updates > self.skipped:
            self.skipped = self.optimizer.skipped_updates
            self.log.event("skip", self.step, epoch, reason="non-finite gradient", skipped=self.skipped)

    def _log_step(self, epoch: int) -> None:
        loss = self.loss.read()  # waits for the device, so that the lap counts finished work
        rate = self.optimizer.param_groups[0]["lr"]
        self.log.event("step", self.step, epoch, loss=loss, lr=rate, images_per_second=self.watch.lap())

    def _evaluate(self, epoch: int) -> Scores:
        broadcast_buffers(self.model, self.cluster)
        self.model.eval()
        scores = score(self._predict, self.loader, self.cluster)
        values = asdict(scores)
        if self.config.positive_class is None:
            del values["test_balanced_accuracy"]
        self.log.event("eval", self.step, epoch, world_size=self.cluster.size, **values)
        return scores

    def _predict(self, images: torch.Tensor) -> torch.Tensor:
        with autocast(self.config.precision, self.cluster.device):
            return self.model(images)

    def _finish(self, epoch: int, scores: Scores) -> None:
        rate = self.watch.total()
        optimizer = self.optimizer.state_dict()  # on every rank: a sharded one is gathered
        with together(self.cluster):
            if self.folder is not None:
                path = _save(self, epoch, optimizer)
                self.log.event("checkpoint", self.step, epoch, path=str(path.relative_to(self.folder)))
        result = {"test_accuracy": scores.test_accuracy, "test_loss": scores.test_loss}
        if self.config.positive_class is not None:
            result["test_balanced_accuracy"] = scores.test_balanced_accuracy
        self.log.event("end", self.step, epoch, **result, images_per_second=rate, world_size=self.cluster.size)
        self.log.close()
        if self.folder is not None:
            for name, value in result.items():
                self.log.say(f"{name.replace('_', ' ')} {value:.4f}")
            self.log.say(f"throughput {rate:.0f} images/s over {self.cluster.size} rank(s)")
            self.log.say(f"checkpoint {path}\nplot {plot(self.folder)}\nrun folder {self.folder}")

    def _facts(self) -> dict[str, object]:
        versions = {"hvd_adam": hvd_adam.__version__, "torch": torch.__version__}
        return {"global_batch_size": self.global_batch, "total_steps": self.total_steps, "versions": versions}


def _load(config: TrainConfig, cluster: Cluster) -> DeviceLoader:
    images = data.load(
        config.dataset,
        data_dir=config.data_dir,
        download=config.download,
        positive_class=config.positive_class,
        synthetic_shape=config.synthetic_size(),
        synthetic_classes=config.synthetic_classes,
        synthetic_samples=config.synthetic_samples,
    )
    dtype = parameter_dtype(config.precision)
    return DeviceLoader(images, cluster.device, dtype=dtype, channels_last=config.channels_last)


def _build(config: TrainConfig, loader: DeviceLoader) -> torch.nn.Module:
    torch.manual_seed(config.seed)
    model = models.build(
        config.model,
        in_channels=loader.data.channels,
        num_classes=len(loader.data.classes),
        image_size=loader.data.image_size,
        dropout=config.dropout,
    )
    if config.sync_batchnorm:
        convert(model)
    memory_format = torch.channels_last if config.channels_last else torch.preserve_format
    return model.to(loader.device, loader.dtype, memory_format=memory_format)


def _scale(config: TrainConfig, cluster: Cluster) -> Scaled:
    """Adam's hyper-parameters for this many ranks and micro-batches."""
    ranks = cluster.size
    if config.op == "adasum":
        # Adasum keeps the scale of one rank's step; on GPUs with NCCL it averages within a host first
        # (Horovod's documentation, "AdaSum with Horovod", on learning rates).
        ranks = cluster.local_size if cluster.device.type == "cuda" and horovod().nccl_built() else 1
    return scale(ranks * config.accumulate, config.lr_scaling, lr=config.lr, betas=config.betas, eps=config.eps)


def _schedule(config: TrainConfig, peak: float, steps_per_epoch: int, total_steps: int) -> LearningRateSchedule:
    return LearningRateSchedule(
        initial=config.lr,
        peak=peak,
        warmup_steps=config.warmup_epochs * steps_per_epoch,
        total_steps=total_steps,
        decay=config.lr_decay,
        milestones=tuple(epoch * steps_per_epoch for epoch in config.milestones()),
        factor=config.lr_decay_factor,
    )


def _adam(config: TrainConfig, model: torch.nn.Module, scaled: Scaled) -> Adam:
    return Adam(
        model.parameters(),
        lr=scaled.lr,
        betas=scaled.betas,
        eps=scaled.eps,
        weight_decay=config.weight_decay,
        amsgrad=config.amsgrad,
        decoupled_weight_decay=config.decoupled_weight_decay,
        implementation=config.implementation,
    )


def _make_folder(config: TrainConfig) -> Path:
    """Makes the run folder and writes the configuration into it, so that an unwritable one shows now."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{config.dataset}-{config.model}".replace(":", ".")
    folder = Path(config.output_dir or Path("runs") / name)
    try:
        if (folder / METRICS_FILE).exists():
            raise UserError(f"{folder} holds a run already: choose another --output-dir, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(config).items()}
        (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    except OSError as error:
        raise UserError(
            f"cannot write to the run folder {folder} ({error.strerror}): choose another --output-dir"
        ) from None
    return folder


def _save(trainer: Trainer, epoch: int, optimizer: dict[str, Any]) -> Path:
    loader = trainer.loader
    state = {
        "model": trainer.model.state_dict(),
        "optimizer": optimizer,
        "progress": {"step": trainer.step, "epoch": epoch},
        "config": asdict(trainer.config),
        "data": {"classes": list(loader.data.classes), "mean": list(loader.mean), "std": list(loader.std)},
    }
    return checkpoint.save(trainer.folder / "checkpoints", trainer.step, state)
