"""`DistributedAdam`: the optimizer that `distribute` returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from hvd_adam.distributed.averaged_adam import AveragedAdam
from hvd_adam.distributed.join import REDUCE, STEP, Join
from hvd_adam.errors import UserError
from hvd_adam.optim.adam import PlainOptimizer
from hvd_adam.optim.plain_optimizer import not_compiled, outside_inference_mode


class DistributedAdam(AveragedAdam):
    """`Adam` that updates with the mean of the gradients of all ranks; `distribute` returns it.

    It is a `torch.optim.Optimizer`: learning-rate schedulers, step hooks, `param_groups` and `state_dict` work as
    with `torch.optim.Adam`. Gradients are averaged in `backward`, bucket by bucket. When it returns, every
    `p.grad` is the mean over the ranks, with identical bits, so that PyTorch's own ways to log, clip, scale and
    change gradients work unchanged.

    What `p.grad` holds on each rank (with `op="adasum"`: always this rank's own gradient):

    | moment | `p.grad` | with `defer_averaging=True` |
    |---|---|---|
    | after `backward` in `no_sync`, or of a micro-batch that is not the last | sum of own gradients | same |
    | after `backward` otherwise | mean over ranks and micro-batches, times loss scale | undefined, in flight |
    | after `synchronize`, `clip_grad_norm_` | that mean without the loss scale | same |
    | after `step` | unchanged; not clipped by `max_grad_norm` | mean, times the loss scale unless synchronized |
    | after `zero_grad` | None, or zero; unchanged between micro-batches of one update | same |

    A gradient that is changed while it is in flight is refused. Where `strategy="sharded"` reduce-scatters
    (several GPUs, several hosts, int8 or int4), a rank has the mean of its own shard only until
    `synchronize` is called: before that a change is refused, too, and `clip_grad_norm_` is exact. If no rank has a
    gradient for a parameter, `p.grad` is None and it is not updated. If only some ranks have one, the others count
    as zero.

    Every rank must call `backward` equally often before each `step`, and `step`, `synchronize`, `clip_grad_norm_`,
    `broadcast` and `add_param_group` equally often and in the same order. A rank without a batch calls `step`
    without `backward`, or the loop stands in `with optimizer.join():`. With `strategy="sharded"` the same holds
    for `state_dict` and `state_dict_on_root`. All other methods concern one rank only.
    """

    @property
    def grad_norm(self) -> Tensor | None:
        """Global 2-norm of the last averaged gradient before `max_grad_norm` clipped it; 0-dim, or None.

        Every update computes it with `max_grad_norm` or `loss_scaler`. Otherwise, see `finite_grad_norm`.
        """
        return self._step.grad_norm

    @torch.no_grad()
    def finite_grad_norm(self) -> float | None:
        """Computes the global 2-norm of the last update's averaged gradient, before clipping.

        It waits for the device. Call it between `step` and `zero_grad`. Every rank must call it.

        Returns:
            The norm. None if it is not finite, so that the update was skipped; without gradients; and with Adasum,
            which averages no gradients.
        """
        norm = None if self._adasum else self._step.last_norm()
        value = math.nan if norm is None else norm.item()
        return value if math.isfinite(value) else None

    @property
    def skipped(self) -> Tensor | None:
        """Whether the last update was skipped, on all ranks, because the averaged gradient was not finite.

        A 0-dimensional bool tensor on the gradients' device. None if that is not checked.
        """
        return self._step.skipped

    @property
    def skipped_updates(self) -> int:
        """Number of updates skipped so far; waits for an update that is still running on a GPU. May be set."""
        return self._step.skips.count

    @skipped_updates.setter
    def skipped_updates(self, count: int) -> None:
        self._step.skips.count = count

    @property
    def compression(self) -> str:
        """The compression of gradients that is in use."""
        return self._layout.compression

    @outside_inference_mode
    def use_compression(self, compression: str) -> None:
        """Fixes what `compression="auto"` would choose, from the next update on. Every rank must call it.

        Raises:
            CollectiveError: on every rank: the ranks give different compressions.
            UserError: it is not what the option may choose, or `distribute` was called with a fixed compression.
            RuntimeError: called after `backward` and before `step`.
        """
        if self._automatic is None:
            raise UserError("use_compression() needs distribute(compression='auto' or 'auto:any')")
        self._refuse_in_flight("use_compression() between backward() and step() would change what is in flight")
        self._automatic.use(compression)

    # Called by a training loop.

    @not_compiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients. Between micro-batches of one update it does nothing, unless a pass has failed.

        After a backward pass that ended with an exception, such as out of memory, on every rank, it clears them
        and the update starts again with its first micro-batch. If only some ranks have failed, the job ends.

        Args:
            set_to_none: set gradients to None instead of zero.

        Raises:
            RuntimeError: with `defer_averaging` or Adasum, called after `backward` and before `step`, while
                reductions are in flight.
        """
        self._averager.leave_aborted_pass()
        if self._averager.micro_batch and not self._averager.spoiled:
            return
        self._refuse_in_flight("zero_grad() between backward() and step() would clear gradients in flight")
        self._step.forget()
        super().zero_grad(set_to_none)
        self._averager.cleared()
        if self.error_feedback is not None:
            self.error_feedback.roll_back()

    @outside_inference_mode  # what is received in it could not be used outside
    @torch.no_grad()
    def step(  # type: ignore[override]  # PyTorch declares two overloads
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Counts a micro-batch; every `accumulate`-th call updates the parameters. Every rank must call it.

        The update uses `p.grad`, the mean over ranks and micro-batches, unscaled and clipped as `distribute` was
        asked to. These factors are applied inside the update.

        Args:
            closure: computes the loss and its gradients; called once.

        Returns:
            The closure's loss on this rank, or None.

        Raises:
            RuntimeError: `distribute` has been called again for these parameters; called in a hook of backward, on
                several ranks; with Adasum, a closure or a parameter that was frozen when `distribute` was called;
                a GradScaler calls it that was given to `distribute`.
            JobError: on every rank: hyper-parameters, loaded states or numbers of calls differ between ranks.
        """
        self.refuse_superseded()
        if self._ranks > 1 and torch._C._current_graph_task_id() >= 0:
            raise RuntimeError(
                "step() inside backward(), such as in a hook, comes before the gradients are averaged: call it "
                "after backward()"
            )
        loss = self._evaluate(closure)
        self._averager.micro_batch += 1
        if self._averager.micro_batch < self._accumulate:
            self._averager.look()
            return loss
        if self._adasum:
            self._refuse_unhooked()
            self._averager.require_same(self._facts())
            self._horovod.step_adasum(self._store)
        else:
            self._update_averaged()
        self._count_update()
        return loss

    def _update_averaged(self) -> None:
        step, groups, state = self._horovod.step, self.param_groups, self.state
        if self._join is None and self._step.update_behind(step, groups, state):
            return
        self._step.synchronize()
        if self._join is not None:
            self._join.announce(STEP)
        self._ensure_layout()
        if self._join is not None and self._join.some_have_left and not self._strategy.scatters:
            self._layout.broadcast_gradients(self._join.root)  # the loop may have changed them since backward
        self._step.update(step, groups, state)

    def _count_update(self) -> None:
        self._averager.updated()
        self._step.forget()
        self._updates += 1
        if self._automatic is not None:
            self._automatic.after_update(self._step.skipped)

    @not_compiled
    @outside_inference_mode
    @torch.no_grad()
    def synchronize(self) -> None:
        """Makes `p.grad` the unscaled mean over ranks and micro-batches on every rank. Every rank must call it.

        To read or change gradients it is needed with `defer_averaging`, with a loss scaler, and where
        `strategy="sharded"` reduce-scatters. `step` then uses what `p.grad` holds.

        Raises:
            RuntimeError: with Adasum, which averages no gradients; as `step`.
        """
        self._refuse_adasum()
        self._refuse_scattered_in_join("synchronize()")
        self._step.gather()
        self._averager.changes_are_welcome()

    @not_compiled
    @outside_inference_mode
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clips the averaged, unscaled gradient of all parameters to a global 2-norm. Every rank must call it.

        As `torch.nn.utils.clip_grad_norm_`, and exact too where each rank has the mean of its own shard only.

        Args:
            max_norm: largest norm, greater than 0.

        Returns:
            The norm before clipping, 0-dimensional.

        Raises:
            RuntimeError: as `synchronize`.
        """
        self._refuse_adasum()
        self._refuse_scattered_in_join("clip_grad_norm_()")
        return self._step.clip(max_norm)

    def _refuse_scattered_in_join(self, call: str) -> None:
        if self._join is not None and self._strategy.may_scatter:
            raise RuntimeError(
                f"{call} in join() would wait for ranks that have left, where gradients are scattered: use "
                "max_grad_norm of distribute() to clip, or strategy='allreduce'"
            )

    def no_sync(self) -> AbstractContextManager[None]:
        """Returns a context in which `backward` adds to this rank's gradients without averaging them.

        As in DistributedDataParallel, for accumulation by hand: all backward passes of an update but the last run
        inside, and the last one averages their sum. What counts is where `backward` is called.

        Raises:
            UserError: this optimizer counts micro-batches itself (`accumulate` > 1), or uses Adasum.
        """
        if self._accumulate > 1 or self._adasum:
            option = "op='adasum'" if self._adasum else f"accumulate={self._accumulate}"
            raise UserError(f"no_sync() cannot be used with {option} of distribute(): use one of both")
        return self._averager.no_sync()

    @contextmanager
    def join(self, divide_by_initial_world_size: bool = True) -> Iterator[None]:
        """Context for a loop in which ranks have different numbers of batches. Every rank enters it.

        A rank that leaves the block takes part in the reductions and updates of the others, with zeros for its own
        gradients, until all ranks have left; all of them then have the same state. Hyper-parameters and buffers
        become those of a rank that went farthest. In the block, `backward` and `step` send one more small message.
        It must not contain other collectives, such as `SyncBatchNorm`, and must clear gradients for each update.
        As `torch.distributed.algorithms.Join`.

        Args:
            divide_by_initial_world_size: divide sums of gradients by the number of ranks; False divides by the
                number of ranks that still have batches.

        Raises:
            RuntimeError: the optimizer uses Adasum; in the block of another join, or another optimizer trains in
                this one.
        """
        self._refuse_adasum()
        if self._ranks == 1:
            yield
            return
        join = self._join = Join(self, self._strategy.prefix, divide_by_initial_world_size)
        try:
            yield
            self._clear()
            join.leave({REDUCE: self._reduce_after_leaving, STEP: self._step_after_leaving}, self._model)
        finally:
            join.close()
            self._join = None
            self._layout.divide_by(self._ranks)

    def _reduce_after_leaving(self) -> None:
        adds_nothing = self._join is not None and not self._join.divides_by_all
        if adds_nothing:
            self._clear()  # the others divide by their own number
        self._averager.finish_after_leaving(adds_nothing=adds_nothing)

    @torch.no_grad()
    def _step_after_leaving(self) -> None:
        self._update_averaged()
        self._count_update()
        self._clear()

    def _clear(self) -> None:
        PlainOptimizer.zero_grad(self)
        self._averager.cleared()

    def _refuse_unhooked(self) -> None:
        parameter = self._horovod.first_unhooked(self._parameters())
        if parameter is not None:
            raise RuntimeError(
                f"{self._names()[parameter]} has a gradient but was frozen when distribute() was called, so its "
                "updates would not be combined; freeze it again, or call distribute() after unfreezing"
            )

    def _evaluate(self, closure: Callable[[], float] | None) -> float | None:
        if hasattr(self, "found_inf"):
            raise RuntimeError(
                "GradScaler.step() cannot unscale these gradients: give the GradScaler to "
                "distribute(loss_scaler=…) and call optimizer.step() itself"
            )
        if closure is None:
            return None
        if self._adasum:
            raise RuntimeError("step(closure) cannot be used with op='adasum'; call backward() and step() instead")
        with torch.enable_grad():
            return closure()
