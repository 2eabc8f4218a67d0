"""`release_gradients=True`: buckets are updated, and their gradients given back, while backward is running.

Hazards: other bits than those of the ordinary update; more buffers than two; ranks that wait for each other in the
middle of backward; a node of backward that silently uses an updated weight; an update with other hyper-parameters
than the rest; state that is read between two updates; whatever needs the whole gradient, and finds none.
"""

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from helpers.on_ranks import launch, on_ranks
from helpers.small_training import digest, everything, same_everywhere

from hvd_adam import Adam, distribute
from hvd_adam.arguments import parse
from hvd_adam.config import TrainConfig
from hvd_adam.distributed.collectives.pieces import ALLREDUCE_BYTES
from hvd_adam.distributed.release.buckets import LIVE, ReducedBuckets
from hvd_adam.distributed.release.optimizer import ReleasingAdam
from hvd_adam.distributed.release.places import send_order
from hvd_adam.distributed.release.stand_ins import ReleasedGradient
from hvd_adam.errors import JobError, UserError

WIDTH = 64
BUCKET = 4 * WIDTH * WIDTH  # bytes: each weight of `make_model` has a bucket of its own


def make_model(dtype=torch.float32, layers=4):
    torch.manual_seed(0)
    hidden = [m for _ in range(layers) for m in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())]
    return torch.nn.Sequential(*hidden, torch.nn.Linear(WIDTH, 4)).to(dtype)


def make_optimizer(model, released=True, adam=None, **options):
    adam = Adam(model.parameters(), **{"lr": 1e-2, "implementation": "fused", **(adam or {})})
    options = {"bucket_mib": BUCKET / 2**20, "skip_nonfinite": False, **options}
    return distribute(adam, model, release_gradients=released, **options)


def loss_of(model, cluster, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + cluster.rank)
    inputs = torch.randn(8, WIDTH, generator=generator).to(next(model.parameters()).dtype)
    return model(inputs).square().mean()


def train(model, optimizer, cluster, passes=3):
    for seed in range(passes):
        optimizer.zero_grad()
        loss_of(model, cluster, seed).backward()
        optimizer.step()


def trained_both_ways(use, make=make_model, **options):
    """Calls `use(model, optimizer)` without and with released gradients, whose bits must be equal.

    Returns the second model.
    """
    trained = []
    for released in (False, True):
        model = make()
        optimizer = make_optimizer(model, released, **options)
        use(model, optimizer)
        trained.append(everything(model, optimizer))
    assert trained[0] == trained[1]
    return model


def train_twice(cluster, backward, model, optimizer):
    """Makes two updates, each from `backward(model, optimizer)` with random numbers of the rank's own."""
    for seed in range(2):
        torch.manual_seed(10 * seed + cluster.rank)
        backward(model, optimizer)
        optimizer.step()
        optimizer.zero_grad()


def assert_same_bits(cluster, dtype=torch.float32, passes=3, change=lambda model: None, **options):
    def make():
        model = make_model(dtype)
        change(model)
        return model

    model = trained_both_ways(lambda *trained: train(*trained, cluster, passes), make, **options)
    assert all(p.grad is None for p in model.parameters())
    assert same_everywhere(digest(model.state_dict()))


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("implementation", ["fused", "foreach", "reference"])
def test_weights_and_state_have_the_bits_of_the_ordinary_update(cluster, implementation):
    assert_same_bits(cluster, adam={"implementation": implementation, "weight_decay": 0.1})


@on_ranks(2)
def test_the_default_device_of_the_process_does_not_matter(cluster):
    model = make_model()
    optimizer = make_optimizer(model)
    loss = loss_of(model, cluster)
    torch.set_default_device("meta")  # on which no value exists
    try:
        loss.backward()
        optimizer.step()
    finally:
        torch.set_default_device("cpu")
    assert same_everywhere(digest(model.state_dict()))


@on_ranks(2)
@pytest.mark.parametrize(
    "adam",
    [{"state_format": "bfloat16"}, {"state_format": "8bit"}, {"amsgrad": True}, {"decoupled_weight_decay": True}],
)
def test_each_state_format_has_the_same_bits(cluster, adam):
    assert_same_bits(cluster, adam=adam)


@on_ranks(2)
@pytest.mark.parametrize("rounding", ["master_weights", "stochastic_rounding"])
def test_half_precision_has_the_same_bits(cluster, rounding):
    assert_same_bits(cluster, torch.bfloat16, adam={rounding: True})


@on_ranks(2)
@pytest.mark.parametrize("compression", ["fp16", "bf16"])
def test_each_compression_has_the_same_bits(cluster, compression):
    assert_same_bits(cluster, compression=compression)


@on_ranks(2)
def test_parameters_of_several_dtypes_have_the_same_bits(cluster):
    class Widened(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.layer(x.double()).float()

    def change(model):
        model[2] = Widened().double()

    assert_same_bits(cluster, change=change)


@on_ranks(2)
def test_a_parameter_that_no_rank_uses_does_not_move(cluster):
    def change(model):
        model.unused = torch.nn.Parameter(torch.ones(WIDTH, WIDTH))

    assert_same_bits(cluster, change=change, adam={"weight_decay": 0.1})


class Wide(torch.nn.Module):
    """Has a weight of more than one piece of an all-reduce, which some ranks do not use."""

    def __init__(self, uses=True):
        super().__init__()
        torch.manual_seed(0)
        self.uses, self.small = uses, torch.nn.Linear(4, 3000)
        self.wide = torch.nn.Parameter(torch.randn(3000, 1100) / 50)

    def forward(self, x):
        x = self.small(x)
        return x @ self.wide if self.uses else x


@on_ranks(2, 3)
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_gradient_that_is_reduced_in_place_has_the_same_bits(cluster, everywhere):
    assert Wide().wide.nbytes > ALLREDUCE_BYTES

    def backward(model, optimizer):
        model(torch.randn(8, 4)).square().mean().backward()
        if isinstance(optimizer, ReleasingAdam):
            assert optimizer.gradient_buffer_bytes < 2 * model.wide.nbytes  # no copy of it

    trained_both_ways(
        lambda *trained: train_twice(cluster, backward, *trained),
        lambda: Wide(uses=everywhere or cluster.rank == 0),
    )


@on_ranks(2)
def test_a_large_gradient_is_copied_only_if_something_else_has_its_memory(cluster):
    placed, sent, start = {}, {}, ReducedBuckets._start_in_place

    def spy(buckets, place, name):
        started = start(buckets, place, name)
        sent[place.params[0]] = started.gradients[0].data_ptr()
        return started

    kept = []
    hooks = {False: lambda p: None, True: lambda p: kept.append(p.grad)}
    for keeps, hook in hooks.items():
        model = Wide()
        model.wide.register_post_accumulate_grad_hook(lambda p: placed.update({p: p.grad.data_ptr()}))
        model.wide.register_post_accumulate_grad_hook(hook)
        optimizer = make_optimizer(model)
        torch.manual_seed(cluster.rank)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ReducedBuckets, "_start_in_place", spy)
            model(torch.randn(8, 4)).square().mean().backward()
        own = kept[0].clone() if kept else None
        optimizer.step()
        assert (placed[model.wide] == sent[model.wide]) != keeps
    assert torch.equal(own, kept[0]) and not same_everywhere(digest(kept[0]))


class Sum(torch.nn.Module):
    """Adds two large parameters, whose gradients autograd places in the same memory, to a small one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.small = torch.nn.Parameter(torch.randn(1100))
        self.a, self.b = (torch.nn.Parameter(torch.randn(3000, 1100)) for _ in range(2))

    def forward(self, x):
        small = (2 * self.small).expand(1, 3000, 1100)  # before the others: its node of backward runs after theirs
        return ((small + (self.a.unsqueeze(0) + self.b.unsqueeze(0))) * x).tanh()


@on_ranks(2)
def test_a_large_gradient_that_other_nodes_of_backward_read_has_the_same_bits(cluster):
    def backward(model, _):
        gradient = torch.randn(1, 3000, 1100)
        model(torch.randn(1, 3000, 1100)).backward(gradient)

    trained_both_ways(lambda *trained: train_twice(cluster, backward, *trained), Sum)


@on_ranks(2)
def test_a_gradient_that_the_loop_gives_to_backward_keeps_its_values(cluster):
    model = Sum()
    optimizer = make_optimizer(model)
    gradient = torch.full((1, 3000, 1100), cluster.rank + 1.0)
    model.a.unsqueeze(0).backward(gradient)
    optimizer.step()
    assert (gradient == cluster.rank + 1).all()


@on_ranks(2)
def test_a_large_gradient_of_the_loop_itself_keeps_its_values(cluster):
    model = Wide(uses=False)
    optimizer = make_optimizer(model)
    own = model.wide.grad = torch.full_like(model.wide, cluster.rank + 1.0)
    optimizer.step()
    assert (own == cluster.rank + 1).all() and same_everywhere(digest(model.wide))


class Branches(torch.nn.Module):
    """Uses one of its layers on each rank: the others have no gradient there."""

    def __init__(self, unused):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.unused = unused

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = x if i == self.unused else layer(x).tanh()
        return x


@on_ranks(2, 3)
def test_ranks_that_use_other_parameters_do_not_wait_for_each_other(cluster):
    def make():
        torch.manual_seed(0)
        return Branches(unused=5 - 2 * cluster.rank)

    trained_both_ways(lambda *trained: train(*trained, cluster), make)


@on_ranks(1, 2)
def test_buckets_are_updated_while_backward_is_running(cluster):
    model = make_model()
    optimizer = make_optimizer(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss_of(model, cluster).backward()
    in_flight = LIVE if cluster.size > 1 else 0
    buckets = [p for p in model.parameters() if p.dim() == 2][in_flight:]  # backward ends with the first ones
    moved = [p for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert {id(p) for p in buckets} <= {id(p) for p in moved}
    assert all(type(p.grad) is ReleasedGradient for p in model.parameters())
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


@on_ranks(1, 2)
def test_at_most_two_buckets_have_buffers(cluster):
    model = make_model(layers=8)
    optimizer = make_optimizer(model)
    found = []

    def look(p):
        gradients = {
            q.grad.untyped_storage().data_ptr(): q.grad.nbytes for q in model.parameters() if q.grad is not None
        }
        found.append((optimizer.gradient_buffer_bytes, sum(gradients.values())))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(look)
    train(model, optimizer, cluster)
    padding = 4 * 512  # flags, message and alignment, at most
    assert max(buffers for buffers, _ in found) <= (LIVE * (BUCKET + padding) if cluster.size > 1 else 0)
    assert max(gradients for _, gradients in found) <= BUCKET + 4 * WIDTH  # those of one bucket and of a bias
    assert optimizer.gradient_buffer_bytes == 0


@on_ranks(2)
def test_a_parameter_that_is_larger_than_a_bucket_has_one_of_two_buffers(cluster):
    model = make_model()
    model[4] = torch.nn.Linear(WIDTH, 2 * WIDTH)  # in the middle of the pass
    model[6] = torch.nn.Linear(2 * WIDTH, WIDTH)
    model.append(torch.nn.Linear(4, 10_000))  # 160 kB, complete first
    optimizer = make_optimizer(model)
    found = []
    model[2].weight.register_post_accumulate_grad_hook(lambda p: found.append(optimizer.gradient_buffer_bytes))
    loss_of(model, cluster).backward()
    found.append(optimizer.gradient_buffer_bytes)
    optimizer.step()
    larger, usual = 2 * BUCKET + 4096, BUCKET + 4096  # flags, message and alignment take less
    assert 2 * BUCKET < found[0] <= larger + usual
    assert BUCKET < found[1] <= 2 * usual


@on_ranks(2)
def test_a_gradient_from_before_is_added(cluster):
    def use(model, optimizer):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        loss_of(model, cluster).backward()
        optimizer.step()

    trained_both_ways(use)


@on_ranks(2)
def test_a_rank_without_a_batch_counts_as_zero(cluster):
    def use(model, optimizer):
        if cluster.rank == 0:
            loss_of(model, cluster).backward()
        optimizer.step()

    assert same_everywhere(digest(trained_both_ways(use).state_dict()))


@on_ranks(1, 2)
def test_parameters_can_be_frozen_unfrozen_and_added(cluster):
    trained = []
    for released in (False, True):
        model, added = make_model(), torch.nn.Parameter(torch.ones(WIDTH, WIDTH))
        model[0].requires_grad_(False)
        optimizer = make_optimizer(model, released)
        train(model, optimizer, cluster, passes=1)
        model[0].requires_grad_(True)
        train(model, optimizer, cluster, passes=1)
        model.added = added
        optimizer.add_param_group({"params": [added]})
        for seed in range(2):
            optimizer.zero_grad()
            (loss_of(model, cluster, seed) + (added * added).mean()).backward()
            optimizer.step()
        trained.append(everything(model, optimizer))
    assert trained[0] == trained[1]


@on_ranks(1, 2)
def test_autograd_refuses_a_weight_that_it_needs_after_the_update(cluster):
    model = make_model()
    optimizer = make_optimizer(model)
    inputs = torch.ones(8, WIDTH, requires_grad=True)
    early = inputs @ model[6].weight.detach()  # its node needs the weight after those of later layers
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(early).sum().backward()
    for call in (optimizer.zero_grad, optimizer.step):
        with pytest.raises(RuntimeError, match="weights, so they are of two updates"):
            call()
    if cluster.size == 1:
        make_optimizer(model)  # which a checkpoint would have been loaded for


@on_ranks(1)
def test_after_a_backward_that_failed_before_any_update_training_continues(cluster):
    trained = []
    for fails in (False, True):
        model = make_model()
        optimizer = make_optimizer(model)
        if fails:
            handle = model[8].weight.register_hook(lambda grad: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                loss_of(model, cluster).backward()
            handle.remove()
        train(model, optimizer, cluster)
        trained.append(everything(model, optimizer))
    assert trained[0] == trained[1]


@on_ranks(1, 2)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_ends_the_job_before_its_bucket_is_updated(cluster, value):
    model = make_model()
    optimizer = make_optimizer(model)
    before = model[0].weight.clone()
    model[0].weight.register_hook(lambda grad: grad.fill_(value) if cluster.rank == 0 else grad)
    with pytest.raises(JobError, match=r"0\.weight is not finite in update 1"):
        loss_of(model, cluster).backward()
        optimizer.step()
    with pytest.raises(RuntimeError, match="weights, so they are of two updates"):
        optimizer.step()  # which would update the rest
    assert torch.equal(model[0].weight, before)
    assert all(p.isfinite().all() for p in model.parameters())


@on_ranks(2)
def test_ranks_that_have_parted_update_nothing(cluster):
    model = make_model()
    optimizer = make_optimizer(model)
    before = digest(model.state_dict())
    optimizer.param_groups[0]["lr"] = 0.1 + cluster.rank
    with pytest.raises(JobError, match=r"lr of parameter group 0: 0\.1 on rank 0, 1\.1 on rank 1"):
        loss_of(model, cluster).backward()
    assert digest(model.state_dict()) == before


@on_ranks(1, 2)
def test_hyper_parameters_that_change_between_backward_and_step_are_refused(cluster):
    model = make_model()
    optimizer = make_optimizer(model)
    loss_of(model, cluster).backward()
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(RuntimeError, match=r"lr of parameter group 0 changed from 0\.01 to 0\.5 between backward"):
        optimizer.step()


@on_ranks(2)
@pytest.mark.parametrize(
    "call", ["backward", "zero_grad", "state_dict", "broadcast", "distribute", "load_state_dict"]
)
def test_what_would_mix_two_updates_is_refused_between_backward_and_step(cluster, call):
    model = make_model()
    optimizer = make_optimizer(model)
    state = optimizer.state_dict()
    calls = {
        "backward": lambda: loss_of(model, cluster, 1).backward(),
        "distribute": lambda: make_optimizer(model),
        "load_state_dict": lambda: optimizer.load_state_dict(state),
    }
    loss_of(model, cluster).backward()
    with pytest.raises(
        RuntimeError, match=r"between backward\(\) and step\(\)|second backward\(\) before step\(\)"
    ):
        calls.get(call, getattr(optimizer, call, None))()
    optimizer.step()
    assert same_everywhere(digest(model.state_dict()))


@on_ranks(1)
def test_a_pass_within_the_pass_is_refused_once_its_weights_are_updated(cluster):
    from torch.utils.checkpoint import checkpoint

    model = make_model()
    layer = model[0]
    make_optimizer(model)
    inputs = torch.ones(8, WIDTH, requires_grad=True)
    shared = checkpoint(layer, checkpoint(layer, inputs, use_reentrant=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"0\.(weight|bias) gets another gradient"):
        shared.sum().backward()


@on_ranks(1)
def test_calls_that_need_the_gradient_are_refused(cluster):
    model = make_model()
    optimizer = make_optimizer(model)
    assert isinstance(optimizer, ReleasingAdam) and optimizer.finite_grad_norm() is None
    for call in (
        optimizer.synchronize,
        optimizer.no_sync,
        optimizer.join,
        lambda: optimizer.clip_grad_norm_(1.0),
        lambda: optimizer.step(lambda: 0.0),
        lambda: optimizer.register_step_pre_hook(lambda *_: None),
    ):
        with pytest.raises(UserError, match=r"needs gradients that release_gradients=True"):
            call()
    with pytest.raises(RuntimeError, match="create_graph"):
        loss_of(model, cluster).backward(create_graph=True)


class Stepping(Adam):
    """Has a step of its own."""

    def step(self, closure=None):
        return super().step(closure)


REFUSED = [
    {"strategy": "sharded"},
    {"strategy": "local"},
    {"op": "adasum"},
    {"accumulate": 2},
    {"max_grad_norm": 1.0},
    {"loss_scaler": torch.amp.GradScaler("cpu")},
    {"compression": "int8"},
    {"compression": "auto"},
    {"defer_averaging": True},
    {"skip_nonfinite": True},
]


@on_ranks(1)
@pytest.mark.parametrize("options", REFUSED)
def test_options_that_need_the_gradient_are_refused(cluster, options):
    name, model = next(iter(options)), make_model()
    with pytest.raises(UserError, match=f"{name}=.* cannot be used with release_gradients=True"):
        distribute(Adam(model.parameters()), model, release_gradients=True, **{"skip_nonfinite": False, **options})


@on_ranks(1)
def test_an_optimizer_whose_step_reads_gradients_is_refused(cluster):
    model = make_model()
    options = {"release_gradients": True, "skip_nonfinite": False}
    with pytest.raises(UserError, match=r"step\(\) of Stepping"):
        distribute(Stepping(model.parameters()), model, **options)
    adam = Adam(model.parameters())
    adam.register_step_pre_hook(lambda *_: None)
    with pytest.raises(UserError, match="hooks before step"):
        distribute(adam, model, **options)


def unscale(model, optimizer):
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))  # makes the scale
    scaler.unscale_(optimizer)


USES = {
    "clip_grad_norm_": lambda model, optimizer: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    "clip_grad_value_": lambda model, optimizer: torch.nn.utils.clip_grad_value_(model.parameters(), 1.0),
    "scaling in place": lambda model, optimizer: model[0].weight.grad.mul_(0.5),
    "a norm": lambda model, optimizer: model[0].weight.grad.norm(),
    "printing": lambda model, optimizer: str(model[0].weight.grad),
    "GradScaler": unscale,
}


@on_ranks(1, 2)
@pytest.mark.parametrize("use", USES)
def test_gradients_that_are_used_after_backward_are_refused(cluster, use):
    model = make_model()
    model.unused = torch.nn.Parameter(torch.ones(WIDTH, WIDTH))  # its bucket waits for step()
    optimizer = make_optimizer(model)
    loss_of(model, cluster).backward()
    with pytest.raises(RuntimeError, match=r"p\.grad is used between backward\(\) and step\(\)"):
        USES[use](model, optimizer)
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


@on_ranks(1, 2)
@pytest.mark.parametrize("new", [None, torch.zeros(WIDTH, WIDTH)])
def test_gradients_that_are_replaced_after_backward_are_refused(cluster, new):
    model = make_model()
    optimizer = make_optimizer(model)
    loss_of(model, cluster).backward()
    model[2].weight.grad = new
    with pytest.raises(RuntimeError, match=r"gradient of 2\.weight was cleared or replaced between backward"):
        optimizer.step()


def triple(p):
    p.grad.mul_(3)


HOOKS = {
    "change": triple,
    "replace": lambda p: setattr(p, "grad", 3 * p.grad),
    "remove": lambda p: setattr(p, "grad", None) if p.dim() == 1 else None,
}


@on_ranks(1, 2)
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_that_are_added_after_distribute_run_before_a_gradient_is_used(cluster, hook):
    def use(model, optimizer):
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(HOOKS[hook])
        train(model, optimizer, cluster)

    trained_both_ways(use)


@on_ranks(1, 2)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_have_the_same_bits(cluster, reentrant):
    from torch.utils.checkpoint import checkpoint

    def use(model, optimizer):
        for seed in range(2):
            hidden = torch.full((8, WIDTH), cluster.rank + seed + 1.0, requires_grad=True)
            for i in (0, 4):
                hidden = checkpoint(model[i : i + 4], hidden, use_reentrant=reentrant)
            model[8](hidden).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    trained_both_ways(use)


@on_ranks(1, 2)
def test_parameters_that_the_loss_of_another_optimizer_reaches_are_named_as_the_cause(cluster):
    generator, critic = make_model()[:8], make_model()
    other = make_optimizer(generator)
    optimizer = make_optimizer(critic)
    loss_of(torch.nn.Sequential(generator, critic), cluster).backward()
    with pytest.raises(RuntimeError, match=r"as of a GAN, freeze these parameters by requires_grad_\(False\)"):
        optimizer.zero_grad()
    other.step()


@on_ranks(2)
@pytest.mark.parametrize("order", [(False, True, False), (True, False, True)])
def test_a_state_continues_with_and_without_the_option(cluster, order):
    expected = make_model()
    train(expected, make_optimizer(expected, released=False), cluster, passes=6)
    weights = state = None
    for first, released in zip((0, 2, 4), order, strict=True):
        model = make_model()
        optimizer = make_optimizer(model, released)
        if state is not None:
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        for seed in range(first, first + 2):
            loss_of(model, cluster, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert digest(weights) == digest(expected.state_dict())


@pytest.mark.multirank
def test_a_run_resumes_with_and_without_the_option(tmp_path):
    def run(folder, *options):
        arguments = [
            "-m",
            "hvd_adam.train",
            "--model",
            "mlp",
            "--epochs",
            "1",
            "--output-dir",
            str(tmp_path / folder),
        ]
        done = launch([*arguments, *options], 0, "gloo", cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr

    run("whole")
    run("changed", "--max-steps", "8", "--release-gradients")
    run("changed", "--max-steps", "16")
    run("changed", "--release-gradients")
    ends = []
    for folder in ("whole", "changed"):
        checkpoints = tmp_path / folder / "checkpoints"
        newest = max(checkpoints.glob("step-*")) / "state.pt"
        saved = torch.load(newest, weights_only=True)
        ends.append((newest.parent.name, digest(saved["model"], saved["optimizer"])))
    assert ends[0] == ends[1]


@on_ranks(2)
def test_ranks_that_train_on_the_same_batches_are_noticed(cluster):
    model = make_model()
    optimizer = make_optimizer(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, replace(cluster, rank=0), passes=8)
    found = any("all ranks train on the same batches" in str(w.message) for w in caught)
    assert found == (cluster.rank == 0)


COMMAND = (
    "--strategy sharded, --strategy local, --op adasum, --accumulate 2, --max-grad-norm 1.0, --noise-scale 5, "
    "--precision fp16, --compression int4, --compression auto, --compile, --device cuda, --elastic, --tune any"
)


@pytest.mark.parametrize("option", COMMAND.split(", "))
def test_the_training_command_refuses_the_same_before_it_starts(option):
    with pytest.raises(UserError, match=f"{option} cannot be used with --release-gradients: "):
        parse(TrainConfig, "hvd_adam.train", ["--release-gradients", *option.split()])


def test_buckets_are_sent_in_the_order_of_their_first_parameters():
    a, b, c, d = (torch.zeros(1) for _ in range(4))
    assert send_order([[a, b], [c, d]], [a, b, c, d]) == [1, 0]
    assert send_order([[a, d], [b, c]], [a, b, c, d]) == [1, 0]
    assert send_order([[b, c], [a, d]], [a, b, c, d]) == [0, 1]
