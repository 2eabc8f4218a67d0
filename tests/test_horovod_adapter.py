"""The private names of Horovod's wrapper that `horovod_adapter` uses, and no other module.

Hazards: a Horovod that renames or drops one of them, which would only show as gradients that are not reduced.
"""

import re
from pathlib import Path

import horovod.torch as hvd
import pytest
import torch
from helpers.on_ranks import on_ranks
from helpers.small_training import small_model

import hvd_adam
from hvd_adam.distributed import horovod_adapter
from hvd_adam.distributed.horovod_adapter import ADASUM_NAMES, AVERAGE_NAMES, WRAPPER_NAMES

NAMES = {*WRAPPER_NAMES, *AVERAGE_NAMES, *ADASUM_NAMES}


@on_ranks(2, "mpi")
@pytest.mark.parametrize("op", ["sum", "adasum"])
def test_the_installed_horovod_has_every_private_name(cluster, op):
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters())
    adasum = op == "adasum"
    wrapper = hvd.DistributedOptimizer(
        optimizer, model.named_parameters(), op=hvd.Adasum if adasum else hvd.Sum, groups=None if adasum else 1
    )
    names = [*WRAPPER_NAMES, *(ADASUM_NAMES if adasum else AVERAGE_NAMES)]
    assert [name for name in names if not hasattr(wrapper, name)] == []


def test_every_private_name_in_use_is_listed():
    source = Path(horovod_adapter.__file__).read_text()
    assert set(re.findall(r"wrapper\.(_\w+)", source)) == NAMES


def test_no_other_module_uses_a_private_name_of_horovod():
    modules = [path for path in Path(hvd_adam.__file__).parent.rglob("*.py") if path.name != "horovod_adapter.py"]
    pattern = re.compile(rf"\.({'|'.join(NAMES)})\b")
    assert [path.name for path in modules if pattern.search(path.read_text())] == []
