"""Adam and AdamW as a ``torch.optim.Optimizer`` written from the papers' formulas."""

import functools
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from hvd_adam.optim import fused
from hvd_adam.optim.flat_layout import Layout, can_be_flattened, overlapping
from hvd_adam.optim.flat_storage import FlatStorage, check_gradient
from hvd_adam.optim.functional import (
    Batch,
    Group,
    moment_dtype,
    rounding,
    seed,
    state_dtypes,
    update_foreach,
    update_reference,
)
from hvd_adam.optim.validation import (
    check_hyper_parameters,
    check_implementation,
    check_loaded_state,
    check_parameters,
)

Params = Iterable[Tensor] | Iterable[Group] | Iterable[tuple[str, Tensor]]

# On a CPU "auto" takes the fused kernel from this size on. Below, a step takes a millisecond or two either way,
# and compiling takes seconds. On a GPU it always does: what counts for small models is the number of launches.
_FUSED_ELEMENTS = 1 << 20

# On a CPU a batch that stays in cache makes a step of 11 M parameters take 20 ms instead of 42 ms, and no
# whole-model temporary is paged in. A GPU wants few launches, so there a batch may be as large as it likes.
_CPU_BATCH_ELEMENTS = 1 << 18

# The options that decide about layout and kernels.
_LAYOUT_OPTIONS = ("implementation", "amsgrad", "decoupled_weight_decay", "master_weights", "stochastic_rounding")

_UPDATES = {"reference": update_reference, "foreach": update_foreach}


def _as_it_is(decorated: Callable[..., Any]) -> Callable[..., Any]:
    """A method of PyTorch's optimizer without what its decorator does where torch.compile is not in use.

    That would be to import all of torch.compile: 1.4 s on every rank at its start.
    """
    plain = getattr(decorated, "__wrapped__", decorated)

    @functools.wraps(plain)
    def method(*args: Any, **options: Any) -> Any:
        return (decorated if "torch._dynamo" in sys.modules else plain)(*args, **options)

    return method


class PlainOptimizer(torch.optim.Optimizer):
    """PyTorch's, see `_as_it_is`."""

    add_param_group = _as_it_is(torch.optim.Optimizer.add_param_group)
    load_state_dict = _as_it_is(torch.optim.Optimizer.load_state_dict)
    state_dict = _as_it_is(torch.optim.Optimizer.state_dict)
    zero_grad = _as_it_is(torch.optim.Optimizer.zero_grad)


class Adam(PlainOptimizer):
    """Adam (Kingma & Ba, arXiv 1412.6980, algorithm 1) that takes what ``torch.optim.Adam`` takes.

    With ``decoupled_weight_decay`` it is AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2), with
    ``amsgrad`` AMSGrad (Reddi, Kale & Kumar 2018, algorithm 2). State is kept in each parameter's own
    dtype, half precision included, as PyTorch does: two tensors of the parameter's size (three with
    ``amsgrad``) and a step count, all of them there from construction on for every parameter that requires
    a gradient. A step takes O(n) time for n elements. Every hyper-parameter lives in the parameter groups,
    where it may be changed between steps. ``state_dict`` goes to and from ``torch.optim.Adam`` and
    ``AdamW``. The step count is a float32 and exact up to 2**24 steps, where every bias correction has long
    been 1.

    Args:
        params: parameters, or dictionaries of groups, or (name, parameter) pairs where PyTorch takes them.
            Real floating point, dense, on any mixture of devices and dtypes.
        lr: learning rate α, at least 0. A 1-element tensor is read anew on every step; on a GPU each read
            waits for the device.
        betas: decay rates of the moments, floats in [0, 1).
        eps: ε, outside the root, at least 0. In float16 everything below 6e-8 is 0, the default too.
        weight_decay: λ, at least 0.
        amsgrad: divide by the largest second moment so far.
        decoupled_weight_decay: shrink the parameters by lr · weight_decay instead of adding
            weight_decay · parameter to the gradient.
        maximize: ascend instead of descending.
        master_weights: keep a float32 copy of float16 and bfloat16 parameters (``master_param`` in the state),
            update that, and round it into the parameter. Their moments are float32 then.
        stochastic_rounding: round bfloat16 parameters up or down with the probabilities that make the
            expectation exact, instead of to nearest, where small updates vanish. Their moments are float32 then.
            The random bits follow from step and position: runs repeat, and ranks agree.
        implementation: "reference" is the paper line by line in float64, "foreach" the multi-tensor form in
            the parameters' dtype, "fused" one compiled pass over flat buffers (``optim.flat_storage``: parameters,
            gradients and state become views of them), "auto" picks: fused on a GPU, and from 2**20 elements on
            elsewhere. Without a compiler (Triton on a GPU) it warns and does what foreach does.

    Raises:
        ValueError: a hyper-parameter out of range, a complex or sparse parameter, an unknown implementation,
            both ``master_weights`` and ``stochastic_rounding``.
    """

    # Whether parameters move into flat buffers for other implementations than "fused", too.
    _always_flat = False

    # What the last step's layout was made for, and what it made. Not part of the state: made anew when it is gone.
    _signature: object = None
    _state_ids: Sequence[int] = ()
    _implementations: Sequence[str] = ()
    _unflattened_implementations: Sequence[str] = ()  # what cannot be flat has no fused form
    _storages: Sequence[FlatStorage] = ()
    _specs: Mapping[tuple[int, torch.device, torch.dtype], fused.KernelSpec]  # by group, device, dtype
    _unflattened: Set[Tensor] = frozenset()
    _frozen: Sequence[Tensor] = ()  # would be flat if they were trained

    _source: dict[str, Any] | None = None  # what load_state_dict is loading

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        implementation: str = "auto",
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "implementation": implementation,
        }
        check_hyper_parameters(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters and make their state; missing options take the constructor's values.

        Raises:
            ValueError: as the constructor does; the optimizer is then as it was.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_hyper_parameters(group)
            check_parameters(group["params"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._make_missing_state(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient and return the closure's loss, if there is a closure.

        Parameters without a gradient are left wholly alone: no decay, no step count.

        Raises:
            RuntimeError: a gradient is sparse or not of its parameter's dtype; nothing has then been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state dictionary of this class, or of ``torch.optim.Adam`` or ``AdamW``.

        Raises:
            ValueError: it is not Adam's or does not fit the parameters; nothing has then been changed.
        """

        def remember(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            self._source = state_dict

        # After all hooks of the user's. PyTorch casts what it hands on to each parameter's dtype, which would
        # round float32 moments and masters of half-precision parameters.
        handle = self.register_load_state_dict_pre_hook(remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._source = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the state of a pickle, or what ``load_state_dict`` has made of a state dictionary.

        A loaded state is checked before anything is changed, copied (PyTorch would share the tensors with
        their source), and completed: options that its groups lack keep this optimizer's values, and
        parameters without state get zeros. Options of other optimizers are kept but have no effect.

        Raises:
            ValueError: the loaded state is not Adam's or does not fit the parameters.
        """
        own_groups = self.__dict__.get("param_groups")
        if own_groups is None:  # unpickling or copying: the state is this class's own, and whole
            super().__setstate__(state)
            return
        for own, loaded in zip(own_groups, state["param_groups"], strict=True):
            for option in self.defaults:  # in one order on all ranks
                if option in own:
                    loaded.setdefault(option, own[option])
            loaded["betas"] = tuple(map(float, loaded["betas"]))  # PyTorch's may be tensors
            check_implementation(loaded["implementation"])
        check_loaded_state(state)
        exact = self._exact_state()
        super().__setstate__(state)
        for group in self.param_groups:
            for p in group["params"]:
                if self.state.get(p):
                    self.state[p] = _copied_state(p, exact.get(p, self.state[p]), group)
            self._make_missing_state(group)

    def _exact_state(self) -> dict[Tensor, dict[str, Any]]:
        """What is being loaded, as it was saved."""
        if self._source is None:
            return {}
        numbers = [number for group in self._source["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        saved = self._source["state"]
        return {p: saved[number] for number, p in zip(numbers, params, strict=True) if number in saved}

    def _make_missing_state(self, group: Group) -> None:
        for p in group["params"]:
            if p.requires_grad:
                self._whole_state(p, group)

    def _whole_state(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        """Return the state of ``p``, with zeros for what is not there yet."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        for name, dtype in state_dtypes(group, p.dtype).items():
            if name not in state:
                initial = p.detach() if name == "master_param" else torch.zeros_like(p, dtype=dtype)
                state[name] = initial.to(dtype)
            elif state[name].dtype != dtype:  # an option has been changed since
                state[name] = state[name].to(dtype)
        return state

    # How a step is made.

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """What PyTorch wraps `step` in, for hooks and profilers; where there are none it is left out.

        It takes 0.1 ms where caches are cold, as they are after a step over many parameters.
        """
        wrapped = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def stepping(self: "Adam", *args: Any, **kwargs: Any) -> Any:
            return (wrapped if self._is_watched() else func)(self, *args, **kwargs)

        return stepping

    def _is_watched(self) -> bool:
        own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        of_all = torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks
        return bool(own or of_all or torch.autograd._profiler_enabled())

    def _update(self, grad_scale: Tensor | None = None) -> None:
        """Makes one step with the gradients times `grad_scale`, 0-dimensional, on their device or the CPU.

        Where everything is fused on a GPU, one that lies there and is NaN makes a step that changes nothing but
        the counts, which `FlatStorage.undo_step_counts` puts right.
        """
        self._ensure_layout()
        if any(flat.device.type == "cuda" for flat in self._storages) and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "Adam's step cannot be captured in a CUDA graph: learning rate and step count are numbers of the "
                "host, and would stay what they are now; capture forward and backward, and call step() outside"
            )
        present = [flat.collect() for flat in self._storages]
        groups = range(len(self.param_groups)) if self._unflattened else ()
        batches = [(batch, i) for i in groups for batch in self._batches(i)]
        for flat, has_grad in zip(self._storages, present, strict=True):
            self._update_flat(flat, has_grad, grad_scale)
        for batch, i in batches:
            torch._foreach_add_(batch.counts, 1)
            _UPDATES[self._unflattened_implementations[i]](batch, self.param_groups[i], grad_scale)

    def _update_flat(self, flat: FlatStorage, present: list[bool], grad_scale: Tensor | None) -> None:
        for run in flat.runs(present):
            group, implementation = self.param_groups[run.group], self._implementations[run.group]
            for position, buffers in flat.buffers(run, state_dtypes(group, flat.dtype)):
                if implementation == "fused":
                    spec = self._specs[run.group, flat.device, flat.dtype]
                    numbers = fused.scalars(group, run.step)
                    fused.update(spec, buffers, _descending(group, grad_scale), numbers, seed(run.step, position))
                    continue
                size = _CPU_BATCH_ELEMENTS if flat.device.type == "cpu" else buffers.param.numel()
                for number, piece in enumerate(buffers.split(size)):
                    batch = Batch.of(piece, run.step, position + number * size)
                    _UPDATES[implementation](batch, group, grad_scale)

    def _ensure_layout(self) -> None:
        """Lays the storage out where that has not been done, or no longer fits."""
        signature = [
            (*map(group.get, _LAYOUT_OPTIONS), group["weight_decay"] != 0, *map(id, group["params"]))
            for group in self.param_groups
        ]
        thawed = any(p.grad is not None for p in self._frozen)
        kept = self._state_ids == self._ids_of_state()
        fit = all((kept and flat.holds_params()) or flat.fits(self.state) for flat in self._storages)
        if thawed or signature != self._signature or not fit:
            self._build_layout()
            self._signature, kept = signature, False
        if not kept:
            self._state_ids = self._ids_of_state()

    def _ids_of_state(self) -> list[int]:
        """Which tensors the state consists of. (The flat buffers keep theirs, so no other takes over an id.)"""
        return list(map(id, chain.from_iterable(map(dict.values, self.state.values()))))

    def _build_layout(self) -> None:
        """Decides what is fused, and moves that into flat buffers."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad or p.grad is not None:
                    self._whole_state(p, group)
        self._implementations = self._resolve_implementations()
        params = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
        shared = overlapping(list(params))
        flat = {
            p: i
            for p, i in params.items()
            if (self._always_flat or self._implementations[i] == "fused")
            and can_be_flattened(p)
            and p not in shared
        }
        self._frozen = [p for p in flat if not self.state.get(p)]
        for p in self._frozen:
            del flat[p]
        kinds: dict[tuple, list[Tensor]] = defaultdict(list)
        for p, i in flat.items():
            kinds[p.device, p.dtype, moment_dtype(self.param_groups[i], p.dtype)].append(p)
        self._storages = [self._make_storage(params, [flat[p] for p in params]) for params in kinds.values()]
        self._specs = {
            (i, flat.device, flat.dtype): _spec(self.param_groups[i], flat.device, flat.dtype)
            for flat in self._storages
            for i in set(flat.groups)
        }
        self._unflattened = params.keys() - flat.keys()
        self._unflattened_implementations = ["foreach" if i == "fused" else i for i in self._implementations]

    def _make_storage(self, params: list[Tensor], groups: list[int]) -> FlatStorage:
        return FlatStorage(params, groups, self.state, Layout.of(params))

    def _resolve_implementations(self) -> list[str]:
        """The implementation of each group: "auto" decided, and "fused" only where it can be had."""
        elements = sum(p.numel() for group in self.param_groups for p in group["params"])
        resolved = []
        for group in self.param_groups:
            implementation = group["implementation"]
            if implementation == "auto":
                large = elements >= _FUSED_ELEMENTS or any(p.is_cuda for p in group["params"])
                implementation = "fused" if large else "foreach"
            resolved.append(implementation)
        if "fused" in resolved and (problem := self._compile_error(resolved)):
            self._warn_unfused(problem)
            resolved = ["foreach" if implementation == "fused" else implementation for implementation in resolved]
        return resolved

    def _warn_unfused(self, problem: str) -> None:
        warnings.warn(f"hvd_adam: no fused update here, using foreach ({problem})", RuntimeWarning, stacklevel=2)

    def _compile_error(self, resolved: list[str]) -> str | None:
        """Compiles what is to be fused: None, or why that cannot be."""
        specs = {
            _spec(group, p.device, p.dtype): None
            for group, implementation in zip(self.param_groups, resolved, strict=True)
            if implementation == "fused"
            for p in group["params"]
        }
        return next((problem for spec in specs if (problem := fused.compile_error(spec))), None)

    def _batches(self, i: int) -> list[Batch]:
        """Sorts what group `i` has outside the flat buffers, and with gradients, by device and dtype."""
        group, position = self.param_groups[i], 0
        batches: dict[tuple[torch.device, torch.dtype], list[Batch]] = defaultdict(lambda: [Batch()])
        for p in group["params"]:
            position += p.numel()
            if p.grad is None or p not in self._unflattened:
                continue
            check_gradient(p)
            same_kind = batches[p.device, p.dtype]
            filled = sum(t.numel() for t in same_kind[-1].params)
            if p.is_cpu and filled and filled + p.numel() > _CPU_BATCH_ELEMENTS:
                same_kind.append(Batch())
            state = self._whole_state(p, group)
            wanted = {name: state[name] for name in ("step", *state_dtypes(group, p.dtype))}
            same_kind[-1].append(p, wanted, position - p.numel())
        return [batch for same_kind in batches.values() for batch in same_kind]


def _spec(group: Group, device: torch.device, dtype: torch.dtype) -> fused.KernelSpec:
    coupling = "decoupled" if group["decoupled_weight_decay"] else "coupled"
    decay = coupling if group["weight_decay"] != 0 else "none"
    kind = rounding(group, dtype)
    return fused.KernelSpec(device.type, dtype, moment_dtype(group, dtype), group["amsgrad"], decay, kind)


def _descending(group: Group, grad_scale: Tensor | None) -> Tensor | None:
    """What the gradients are multiplied with: to ascend is to descend against them."""
    if not group["maximize"]:
        return grad_scale
    return torch.tensor(-1.0) if grad_scale is None else -grad_scale


def _copied_state(p: Tensor, loaded: dict[str, Any], group: Group) -> dict[str, Tensor]:
    """Copy a loaded state into tensors laid out like ``p``, its step count to the CPU wherever it lay."""
    state = {"step": torch.tensor(float(loaded["step"]), dtype=torch.float32, device="cpu")}
    dtypes = state_dtypes({**group, "amsgrad": "max_exp_avg_sq" in loaded}, p.dtype)
    for key, dtype in dtypes.items():
        if key in loaded:
            state[key] = torch.empty_like(p, dtype=dtype).copy_(loaded[key])
    return state
