"""Adam on a GPU in one process: every implementation against the float64 oracle, and the kernel by itself.

Hazards: a kernel that computes, rounds or indexes otherwise than on CPUs; writes beyond the end of a tensor;
tensors that are not aligned; lengths beyond 2³¹; a step that makes the host wait for the device; a step
captured in a graph, which would repeat its first learning rate; a device that is not the current one.
"""

import pytest
import torch
from helpers.adam_oracle import IMPLEMENTATIONS, Oracle, cases, oracles, sweep, unit_roundoff
from helpers.one_if_finite import check_one_if_finite
from hypothesis import given

from hvd_adam import Adam
from hvd_adam.optim import fused
from hvd_adam.optim.expression import KernelSpec, Tensors, rounding_seed, update_uncompiled
from hvd_adam.optim.optimizer_state import Member, Part
from hvd_adam.optim.reference import adam_update
from hvd_adam.optim.update_rows import UpdateRows, hyper_parameters

GPU = torch.device("cuda")


def on_gpu(params):
    return [torch.nn.Parameter(p.detach().to(GPU), p.requires_grad) for p in params]


def take_step(optimizer, params, gradients):
    for p, g in zip(params, gradients, strict=True):
        p.grad = None if g is None else g.to(p)
    optimizer.step()


def agreeing(case, dtype, steps, exact):
    """Runs every implementation on the GPU and the oracles on the CPU; yields name, parameter and oracle."""
    runs = {name: on_gpu(case.parameters(dtype)) for name in IMPLEMENTATIONS}
    optimizers = {name: case.ours(params, name) for name, params in runs.items()}
    for gradients in case.gradients(dtype, steps):
        for name, params in runs.items():
            take_step(optimizers[name], params, gradients)
        for oracle, g in zip(exact, gradients, strict=True):
            if g is not None:
                oracle.step(g.double())
    for name, params in runs.items():
        for p, oracle in zip(params, exact, strict=True):
            yield name, p.detach().cpu().double(), oracle


@sweep(15)
@given(case=cases())
def test_float64_agrees_with_the_oracle_to_1e_12(case):
    for name, ours, oracle in agreeing(case, torch.float64, 50, oracles(case, torch.float64)):
        scale = oracle.largest + 100 * float(oracle.group["lr"])  # as in test_adam
        assert ((ours - oracle.theta).abs() <= 1e-12 * scale).all(), name


@sweep(15)
@given(case=cases())
def test_float32_stays_within_the_running_error_bound(case):
    for name, ours, oracle in agreeing(case, torch.float32, 100, oracles(case, torch.float32)):
        assert oracle.valid
        assert ((ours - oracle.theta).abs() <= oracle.e_theta).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_master_weights_stay_within_the_bound_of_float32(implementation, dtype):
    generator = torch.Generator().manual_seed(7)
    p = torch.nn.Parameter(torch.randn(4000, generator=generator).to(GPU, dtype))
    options = dict(lr=1e-3, weight_decay=0.1, amsgrad=True, master_weights=True)
    optimizer = Adam([p], implementation=implementation, **options)
    info = torch.finfo(torch.float32)
    bounds = unit_roundoff(torch.float32), info.smallest_normal * info.eps
    oracle = Oracle(optimizer.param_groups[0], False, p.detach().cpu().double(), *bounds)
    for _ in range(100):
        gradient = torch.randn(4000, generator=generator).to(dtype)
        take_step(optimizer, [p], [gradient])
        oracle.step(gradient.double())
    master = optimizer.state[p]["master_param"]
    assert oracle.valid
    assert ((master.cpu().double() - oracle.theta).abs() <= oracle.e_theta).all()
    assert torch.equal(p.detach(), master.to(dtype))


# --- the kernel ---------------------------------------------------------------------------------------------

LENGTHS = (1, 15, 16, 17, 1023, 1024, 1025, 4099, (1 << 20) + 3, 3 << 20)
GROUP = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, decoupled_weight_decay=False, maximize=False)
HELD = (
    (torch.float32, {"state_format": "8bit"}),
    (torch.float32, {"state_format": "bfloat16"}),
    (torch.bfloat16, {"state_format": "8bit", "master_weights": "8bit"}),
    (torch.bfloat16, {"state_format": "bfloat16", "stochastic_rounding": True}),
    (torch.float16, {"state_format": "8bit", "master_weights": True}),
)


@pytest.mark.parametrize(("dtype", "options"), HELD, ids=str)
def test_state_in_few_bits_makes_the_steps_of_a_cpu_within_a_code(dtype, options):
    """Both have the same random bits; a last bit of a division may decide between two codes."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((513, 300), (64, 64), (5, 7), (33, 129))
    here = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    there = on_gpu(here)
    common = {"lr": 1e-2, "weight_decay": 0.1, "implementation": "fused", **options}
    optimizers = [Adam(params, **common) for params in (here, there)]
    for _ in range(2):
        gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        for optimizer, params in zip(optimizers, (here, there), strict=True):
            take_step(optimizer, params, gradients)
    for p, q in zip(here, there, strict=True):
        # A code of the first step's moments moves the second step by up to 1/79 of the rate; and a last bit.
        torch.testing.assert_close(
            q.detach().cpu(), p.detach(), rtol=2**-7 if dtype != torch.float32 else 0, atol=3e-4
        )
        own, other = (optimizer.state[t] for optimizer, t in zip(optimizers, (p, q), strict=True))
        for name, held in own.items():
            if held.dtype in (torch.int8, torch.uint8):
                differs = (held.int() - other[name].cpu().int()).abs()
                assert differs.float().mean() < 0.01, name


ROUNDINGS = {"master_weights": "master", "stochastic_rounding": "stochastic"}


def update(spec, tensors, step, grad_scale=None, position=0, **options):
    """Updates one parameter with the kernel of a spec."""
    options = {**GROUP, "amsgrad": tensors.max_exp_avg_sq is not None, **options}
    options |= {name: spec.rounding == kind for name, kind in ROUNDINGS.items()}
    (group,) = Adam([torch.nn.Parameter(torch.zeros(1, dtype=spec.dtype))], **options).param_groups
    p = torch.nn.Parameter(tensors.param)
    p.grad = tensors.grad
    state = {name: t for name, t in vars(tensors).items() if t is not None and name not in ("param", "grad")}
    states = {p: {"step": torch.tensor(step - 1.0), **state}}
    rows = UpdateRows(spec, [Member(p, 0, position, Part.of(p))], [group], states)
    assert all(states[p][name] is t for name, t in state.items())
    with torch.no_grad():
        fused.update(spec, rows.batch(), hyper_parameters([group]), grad_scale)


def poisoned(length, offset, dtype, device=GPU):
    """Returns a tensor of NaN and a view of random numbers in it, `offset` elements after a multiple of 16."""
    around = torch.full((length + 48,), float("nan"), dtype=dtype, device=device)
    return around, around[16 + offset : 16 + offset + length].copy_(torch.randn(length, device=device))


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_kernel_agrees_with_the_oracle_at_any_length_and_alignment_and_stays_in_bounds(dtype, offset):
    torch.manual_seed(torch.seed())  # other numbers each time; pytest prints those of a failure
    spec = KernelSpec("cuda", dtype, dtype, "nearest")
    for length in LENGTHS:
        around, inside = zip(*(poisoned(length, offset, dtype) for _ in range(5)), strict=True)
        p, g, m, v, v_max = inside
        v.abs_(), v_max.abs_()
        theta, first, second, largest = (t.double() for t in (p, m, v, v_max))
        paper = dict(alpha=1e-2, beta1=0.8, beta2=0.95, epsilon=1e-6, lambda_=0.1)
        adam_update(theta, g, first, second, largest, t=3, **paper)
        update(spec, Tensors(p, g, m, v, v_max), 3)
        # Some ten roundings of the arithmetic, of numbers of size 1 to 10, and one in storing.
        arithmetic, stored = unit_roundoff(spec.compute_dtype), unit_roundoff(dtype)
        for ours, exact in ((p, theta), (m, first), (v, second), (v_max, largest)):
            bound = (20 * arithmetic + stored) * (exact.abs() + 1)
            assert ((ours.double() - exact).abs() <= bound).all(), length
        assert all(t.isnan().sum() == 48 for t in around), length


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_rounding_agrees_with_the_expression_on_the_cpu(rounding):
    spec = KernelSpec("cuda", torch.bfloat16, torch.float32, rounding)
    length, position = 5003, (2**31 - 100 - rounding_seed(3, 0)) % 2**31  # the hash's counter passes 2³¹ within it
    here = Tensors(
        torch.randn(length).bfloat16(),
        torch.randn(length).bfloat16(),
        torch.randn(length),
        torch.rand(length),
        master_param=torch.randn(length) if rounding == "master" else None,
    )
    if rounding == "master":
        here.master_param.copy_(here.param)
    there = Tensors(**{name: None if t is None else t.to(GPU) for name, t in vars(here).items()})
    update(spec, there, 3, position=position, weight_decay=0.0)
    update_uncompiled(spec, here, None, {**GROUP, "weight_decay": 0.0}, 3, position)
    # The last bit of float32 may decide between two neighbouring bfloat16; this affects few elements.
    ours, exact = there.param.cpu().float(), here.param.float()
    differ = ours != exact
    assert differ.sum() <= length * 2e-3
    assert ((ours - exact).abs() <= 2**-7 * exact.abs())[differ].all()
    torch.testing.assert_close(there.exp_avg.cpu(), here.exp_avg, rtol=2**-21, atol=2**-21)


def test_grad_scale_on_the_device_multiplies_and_nan_changes_nothing():
    spec = KernelSpec("cuda", torch.float32, torch.float32, "nearest")
    tensors = Tensors(*(torch.rand(3001, device=GPU) for _ in range(4)))
    copies = [Tensors(*(t.clone() for t in vars(tensors).values() if t is not None)) for _ in range(3)]
    scales = torch.tensor(0.25, device=GPU), torch.tensor(0.25), torch.tensor(float("nan"), device=GPU)
    for copy, scale in zip(copies, scales, strict=True):
        update(spec, copy, 5, scale)
    assert torch.equal(copies[0].param, copies[1].param)
    assert not torch.equal(copies[0].param, tensors.param)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(copies[2], name), getattr(tensors, name))


def test_elements_beyond_two_to_the_31_are_updated():
    length = 2**31 + 70
    if torch.cuda.mem_get_info()[0] < 5 * 2 * length:
        pytest.skip("needs 22 GB of free GPU memory")
    spec = KernelSpec("cuda", torch.bfloat16, torch.bfloat16, "nearest")
    tensors = Tensors(*(torch.zeros(length, dtype=torch.bfloat16, device=GPU) for _ in range(4)))
    tensors.grad[-1] = tensors.grad[2**31 - 1] = tensors.grad[0] = 1.0
    update(spec, tensors, 1)
    assert tensors.param.nonzero().flatten().tolist() == [0, 2**31 - 1, length - 1]


def test_elements_that_are_not_finite_are_found_at_any_place():
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    check_one_if_finite(GPU, dtypes, lengths=(1, 15, 1023, 1024, 1025, 100_003))


# --- a step -------------------------------------------------------------------------------------------------


def small_model():
    torch.manual_seed(0)
    layers = (torch.nn.Linear(64, 128), torch.nn.BatchNorm1d(128), torch.nn.GELU(), torch.nn.Linear(128, 10))
    return torch.nn.Sequential(*layers).to(GPU)


def backward(model, seed=0):
    torch.manual_seed(seed)
    model(torch.randn(32, 64, device=GPU)).square().mean().backward()


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}], ids=str)
def test_step_does_not_synchronize_with_the_device(implementation, options):
    model = small_model()
    optimizer = Adam(model.parameters(), implementation=implementation, **options)
    for step in range(4):
        optimizer.zero_grad()
        backward(model)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(
            "error" if step else "default"
        )  # the first one compiles and builds the tables
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_small_models_are_fused_and_not_moved():
    model = small_model()
    optimizer = Adam(model.parameters())
    backward(model)
    tensors = [t for p in model.parameters() for t in (p, p.grad, optimizer.state[p]["exp_avg"])]
    places = [t.data_ptr() for t in tensors]
    optimizer.step()
    assert optimizer._store.implementations == ["fused"]
    assert [t.data_ptr() for t in tensors] == places


def test_graph_capture_of_the_step_is_rejected_and_of_forward_and_backward_trains():
    eager, graphed = small_model(), small_model()
    optimizers = [Adam(model.parameters(), lr=1e-2) for model in (eager, graphed)]
    for model, optimizer in zip((eager, graphed), optimizers, strict=True):
        backward(model)
        optimizer.step()  # from now on the gradients keep their memory
    images = torch.zeros(32, 64, device=GPU)
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    state = {name: value.clone() for name, value in graphed.state_dict().items()}
    with torch.cuda.stream(side):  # PyTorch's recipe: warm up on another stream
        for _ in range(3):
            optimizers[1].zero_grad(set_to_none=False)
            graphed(images).square().mean().backward()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        optimizers[1].zero_grad(set_to_none=False)
        graphed(images).square().mean().backward()
    graphed.load_state_dict(state)  # batch-norm statistics from before the warm-up
    for seed in range(3):
        torch.manual_seed(seed)
        batch = torch.randn(32, 64, device=GPU)
        optimizers[0].zero_grad()
        eager(batch).square().mean().backward()
        optimizers[0].step()
        images.copy_(batch)
        graph.replay()
        optimizers[1].step()
    for ours, theirs in zip(graphed.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizers[1].step()


def test_state_of_torch_loads_and_training_continues():
    model, other = small_model(), small_model()
    ours, theirs = Adam(model.parameters()), torch.optim.Adam(other.parameters(), fused=True)
    for seed in range(3):
        for net, optimizer in ((model, ours), (other, theirs)):
            optimizer.zero_grad()
            backward(net, seed)
            optimizer.step()
    ours.load_state_dict(theirs.state_dict())
    model.load_state_dict(other.state_dict())
    for net, optimizer in ((model, ours), (other, theirs)):
        optimizer.zero_grad()
        backward(net, 9)
        optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_parameters_on_a_device_that_is_not_current_are_updated():
    p = torch.nn.Parameter(torch.ones(5000, device="cuda:1"))
    p.grad = torch.ones_like(p)
    Adam([p], implementation="fused").step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, 1 - 1e-3))
