"""Trains an image classifier with Adam, data-parallel over all ranks that a launcher started.

python -m hvd_adam.train
horovodrun -np 2 python -m hvd_adam.train
horovodrun -np 8 -H host1:4,host2:4 python -m hvd_adam.train --dataset cifar10 --model resnet18
"""

from hvd_adam.cli import run
from hvd_adam.config import TrainConfig
from hvd_adam.distributed.launch_env import is_elastic
from hvd_adam.errors import UserError
from hvd_adam.recovery.preemption import install_handlers


def main(config: TrainConfig) -> None:
    """The command; runs on every rank."""
    from hvd_adam.recovery import elastic
    from hvd_adam.training.trainer import Trainer  # here: --help and a bad value answer before PyTorch is loaded

    if config.elastic:
        elastic.run(lambda memory: Trainer(config, memory).run(), config.device)
    elif is_elastic():
        raise UserError("the launcher may start ranks anew, which this run would not survive: add --elastic")
    else:
        Trainer(config).run()


if __name__ == "__main__":
    install_handlers()  # at once: PyTorch takes seconds to load, in which a job may be told to stop
    run(main, TrainConfig, "hvd_adam.train")
