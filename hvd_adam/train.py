"""Trains an image classifier with Adam, data-parallel over all ranks that a launcher started.

python -m hvd_adam.train
horovodrun -np 2 python -m hvd_adam.train
horovodrun -np 8 -H host1:4,host2:4 python -m hvd_adam.train --dataset cifar10 --model resnet18
"""

from hvd_adam.cli import run
from hvd_adam.config import TrainConfig
from hvd_adam.distributed.launch_env import is_elastic
from hvd_adam.errors import UserError
from hvd_adam.extras import require
from hvd_adam.loading import loading_modules
from hvd_adam.recovery.preemption import install_handlers


def main(config: TrainConfig) -> None:
    """Trains; runs on every rank."""
    require("matplotlib", "tensorboard", "tqdm", "yaml")
    # Imported here, so that --help and a bad value are answered before PyTorch is loaded.
    with loading_modules():
        from hvd_adam.recovery import elastic
        from hvd_adam.training.trainer import Trainer

    if config.elastic:
        elastic.run(lambda memory: Trainer(config, memory).run(), config.device)
    elif is_elastic():
        raise UserError("the launcher may restart ranks, which this run would not survive: add --elastic")
    else:
        Trainer(config).run()


if __name__ == "__main__":
    install_handlers()  # first of all: a job may be stopped during the seconds in which PyTorch is loaded
    run(main, TrainConfig, "hvd_adam.train", needs_extra=True)
