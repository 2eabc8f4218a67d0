"""`ReleasingLayout`: the buckets of an optimizer that releases gradients."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_adam.distributed.context import collective_prefix
from hvd_adam.distributed.gradients.compression import is_half
from hvd_adam.distributed.layout import DistributedLayout, Names
from hvd_adam.distributed.release.averager import ReleasingAverager
from hvd_adam.distributed.release.buckets import ReducedBuckets, ReleasedBuckets
from hvd_adam.distributed.release.places import Place, places_of, send_order
from hvd_adam.optim.optimizer_state import Group, States

_nbytes = operator.attrgetter("nbytes")


class ReleasingLayout(DistributedLayout):
    """Makes the same buckets as `DistributedLayout`, also on one rank, without a buffer for all gradients.

    Each bucket is a section of the update. The arguments are those of `DistributedLayout`.
    """

    _averager: ReleasingAverager

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._follows = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def build(self, groups: Sequence[Group], state: States, names: Names) -> None:
        """Makes buckets of the parameters, and decides what updates them."""
        layouts = self._layouts(groups, names)
        places = []
        for params, layout in layouts:
            in_place = self._ranks > 1 and self.compression == "none" and not is_half(params[0].dtype)
            places += places_of(params, layout, in_place=in_place)
        buckets, prefix = self._make_buckets(places, [p for group in groups for p in group["params"]])
        self.store.build_layout(groups, state, None, buckets.number)
        self._averager.arrange(buckets, prefix)
        self.add_hooks(names, names)  # parameters may have been unfrozen

    def _make_buckets(
        self, places: Sequence[Place], parameters: Sequence[Tensor]
    ) -> tuple[ReleasedBuckets, str | None]:
        params = [place.params for place in places]
        if self._ranks == 1:
            return ReleasedBuckets(params, self._averager), None
        prefix = collective_prefix()
        # A buffer for a parameter that is larger than a bucket goes back to the system.
        usual = [p for p in places if not p.in_place and sum(map(_nbytes, p.params)) <= self._bucket_bytes]
        buckets = ReducedBuckets(
            places,
            self._averager,
            order=send_order(params, parameters),
            prefix=prefix,
            compression=self.compression,
            ranks=self._ranks,
            kept_bytes=max((place.nbytes for place in usual), default=0),
        )
        return buckets, prefix

    def add_hooks(self, parameters: Iterable[Tensor], names: Names) -> None:
        """Connects the parameters that are trained and have no hooks."""
        parameters = list(parameters)
        super().add_hooks(parameters, names)
        self._averager.follow(parameters)
        if self._adapter is not None and self._ranks == 1:  # where Horovod has none
            self._adapter.follow(parameters)
