"""Adam as a torch.optim.Optimizer: construction, state, checkpoints, schedulers, hooks and Horovod.

Hazards covered:
- a bad value is accepted, or one that PyTorch accepts is refused;
- an argument of PyTorch's Adam or AdamW is missing, or has no effect;
- a refused call leaves the optimizer half changed;
- state is missing before the first step, so that a broadcast has to fake one;
- a state dictionary loses or changes something on its way to torch.optim or back, or its tensors stay shared;
- a hyper-parameter is lost when the object is copied, pickled, or rebuilt by Horovod;
- schedulers, hooks, closures or method signatures differ from what PyTorch's own optimizers offer.
"""

import copy
import inspect
import io
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hvd_adam.optim.adam import Adam, PlainOptimizer

IMPLEMENTATIONS = ("reference", "foreach", "fused")
ALL_OPTIONS = dict(
    **dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, amsgrad=True),
    **dict(decoupled_weight_decay=True, maximize=True, implementation="foreach"),
)


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (4,), ())
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def train(optimizer, first, last):
    """Takes steps ``first`` to ``last - 1`` of one fixed run."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def values(optimizer):
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def snapshot(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def assert_same(a, b):
    """Compares state dictionaries and their tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


# --- construction -----------------------------------------------------------------------------------------


def test_signature_is_the_documented_one():
    signature = inspect.signature(Adam)
    assert [f"{p.name}={p.default}" for p in signature.parameters.values() if p.default is not p.empty] == [
        *("lr=0.001", "betas=(0.9, 0.999)", "eps=1e-08", "weight_decay=0.0", "amsgrad=False"),
        *("decoupled_weight_decay=False", "maximize=False", "implementation=auto"),
        *("master_weights=False", "state_format=float32", "stochastic_rounding=False"),
        *("foreach=None", "fused=None"),
        *("capturable=False", "differentiable=False"),
    ]
    assert signature.parameters["amsgrad"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert signature.parameters["decoupled_weight_decay"].kind is inspect.Parameter.KEYWORD_ONLY


def arguments(optimizer):
    return list(inspect.signature(optimizer.__init__).parameters.values())[1:]


@pytest.mark.parametrize("theirs", [torch.optim.Adam, torch.optim.AdamW])
def test_every_argument_of_torch_is_taken_in_the_same_place_with_the_same_default(theirs):
    ours = {p.name: p for p in arguments(Adam)}
    missing = [p.name for p in arguments(theirs) if p.name not in ours]
    assert not missing, (
        f"torch.optim.{theirs.__name__} of PyTorch {torch.__version__} takes {', '.join(missing)}, and Adam does "
        "not: take these arguments, or refuse them with a remedy as `capturable` is refused"
    )
    assert [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        p.name for p in arguments(theirs) if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    differing = {
        p.name for p in arguments(theirs) if (p.kind, p.default) != (ours[p.name].kind, ours[p.name].default)
    }
    assert differing == ({"weight_decay"} if theirs is torch.optim.AdamW else set())


@pytest.mark.parametrize("theirs", [torch.optim.Adam, torch.optim.AdamW])
def test_default_arguments_of_torch_train_as_torch_does(theirs):
    defaults = {p.name: p.default for p in arguments(theirs) if p.default is not p.empty}
    if theirs is torch.optim.AdamW:
        defaults["decoupled_weight_decay"] = True
    p, q = parameters(torch.float64), parameters(torch.float64)
    train(theirs(q), 0, 3)
    train(Adam(p, **defaults), 0, 3)
    for ours, expected in zip(p, q, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "implementation"),
    [
        *(
            ({"foreach": True}, "foreach"),
            ({"fused": True}, "fused"),
            ({"foreach": True, "fused": False}, "foreach"),
        ),
        *(({"foreach": None, "fused": None}, "auto"), ({"foreach": False, "fused": False}, "auto")),
        *(({"fused": True, "foreach": False}, "fused"), ({"fused": True, "implementation": "auto"}, "fused")),
        *(({"fused": True, "implementation": "fused"}, "fused"), ({"fused": 1}, "fused")),
        ({"foreach": None, "fused": False, "implementation": "reference"}, "reference"),
        ({"capturable": False, "differentiable": None}, "auto"),
    ],
    ids=str,
)
def test_names_of_implementations_in_torch_choose_ours(options, implementation):
    in_group = Adam([{"params": parameters(), **options}])
    for optimizer in (Adam(parameters(), **options), in_group):
        assert optimizer.param_groups[0]["implementation"] == implementation
    assert Adam(parameters(), **options).defaults["implementation"] == implementation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"foreach": True, "fused": True}, "`fused` and `foreach` cannot be `True` together"),
        ({"fused": True, "implementation": "foreach"}, "implementation='foreach' and fused=True contradict"),
        (
            {"foreach": True, "implementation": "reference"},
            "implementation='reference' and foreach=True contradict",
        ),
        ({"fused": False, "implementation": "fused"}, "implementation='fused' and fused=False contradict"),
        ({"capturable": True}, r"capturable=True is not supported: .*capture forward and backward only"),
        ({"differentiable": True}, r"differentiable=True is not supported: .*use torch\.optim\.Adam"),
    ],
    ids=str,
)
def test_arguments_of_torch_that_cannot_be_followed_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Adam(parameters(), **options)
    optimizer = Adam(parameters()[:1])
    group = {"params": parameters()[1:], **options}
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == len(optimizer.state) == 1
    assert group.keys() == {"params", *options}


@pytest.mark.parametrize(
    ("default", "options", "implementation"),
    [
        *(("foreach", {"fused": True}, "fused"), ("fused", {"foreach": True}, "foreach")),
        *(("fused", {"fused": False}, "auto"), ("foreach", {"foreach": False}, "auto")),
        *(("foreach", {"fused": False}, "foreach"), ("reference", {"foreach": None}, "reference")),
        ("fused", {"fused": None, "foreach": None}, "fused"),
        ("fused", {"implementation": "reference", "fused": False}, "reference"),
    ],
    ids=str,
)
def test_a_groups_own_choice_precedes_the_constructors(default, options, implementation):
    optimizer = Adam([{"params": parameters(), **options}], implementation=default)
    assert optimizer.param_groups[0]["implementation"] == implementation


def test_groups_of_an_optimizer_of_torch_are_taken():
    theirs = torch.optim.Adam(parameters(), lr=0.5, foreach=True)
    (group,) = Adam(theirs.param_groups).param_groups
    assert (group["lr"], group["implementation"], group["foreach"]) == (0.5, "foreach", True)


def test_positional_arguments_mean_what_they_mean_in_torch():
    given = (0.1, (0.8, 0.95), 1e-6, 0.1, True)
    ours, theirs = Adam(parameters(), *given).defaults, torch.optim.Adam(parameters(), *given).defaults
    assert {key: ours[key] for key in ours.keys() & theirs.keys()} == {
        key: theirs[key] for key in ours.keys() & theirs.keys()
    }
    with pytest.raises(TypeError):
        Adam(parameters(), *given, True)


def test_parameters_of_a_lazy_module_are_refused_until_they_have_a_shape():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"parameter 2 is of a lazy module: run one batch through the model"):
        Adam(model.parameters())
    optimizer = Adam(model[0].parameters())
    with pytest.raises(ValueError, match=r"parameter 0 is of a lazy module"):
        optimizer.add_param_group({"params": model[1].parameters()})
    assert len(optimizer.param_groups) == 1
    model(torch.ones(2, 4)).sum().backward()
    optimizer.add_param_group({"params": model[1].parameters()})
    optimizer.step()
    assert all(state["step"].item() == 1 for state in optimizer.state.values())


@pytest.mark.parametrize(
    "name",
    sorted(
        set(vars(torch.optim.Optimizer))
        & {*vars(Adam), *vars(PlainOptimizer)} - {"__init__", "__module__", "__doc__"}
    ),
)
def test_overridden_methods_have_the_signatures_of_the_base_class(name):
    ours, base = getattr(Adam, name), getattr(torch.optim.Optimizer, name)
    if callable(ours):
        ours, base = (inspect.signature(method).parameters.values() for method in (ours, base))
        assert [(p.name, p.kind, p.default) for p in ours] == [
            # The base class declares the closure without the default that all its subclasses have.
            (p.name, p.kind, None if p.name == "closure" else p.default)
            for p in base
        ]


@pytest.mark.parametrize(
    "bad",
    [
        *({"lr": -1e-3}, {"lr": float("nan")}, {"lr": torch.tensor([1e-3, 1e-3])}, {"lr": torch.tensor(-1.0)}),
        *({"eps": -1e-8}, {"weight_decay": -0.1}),
        *({"betas": (1.0, 0.999)}, {"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.999)}, {"betas": (0.9, -0.1)}),
    ],
    ids=str,
)
def test_values_that_torch_rejects_are_rejected(bad):
    with pytest.raises((ValueError, RuntimeError)):  # RuntimeError: two learning rates in older versions
        torch.optim.Adam(parameters(), **bad)
    with pytest.raises(ValueError):
        Adam(parameters(), **bad)
    with pytest.raises(ValueError):  # PyTorch checks the constructor's values only
        Adam([{"params": parameters(), **bad}])


@pytest.mark.parametrize(
    "betas",
    [
        *((0.9,), (0.9, 0.99, 0.999), (0, 0.999), (torch.tensor(0.9), 0.999), (0.9, torch.tensor(0.999))),
        (torch.tensor(0.9),),
    ],
    ids=str,
)
def test_betas_must_be_two_floats_or_two_tensors(betas):
    with pytest.raises(ValueError, match="betas must be two floats, or two tensors"):
        Adam(parameters(), betas=betas)


def test_tensor_betas_must_have_one_element_and_a_value_in_range():
    with pytest.raises(ValueError, match="Tensor betas must be 1-element"):
        Adam(parameters(), betas=(torch.tensor([0.9, 0.9]), torch.tensor(0.999)))
    with pytest.raises(ValueError, match="Invalid beta parameter at index 1"):
        Adam(parameters(), betas=(torch.tensor(0.9), torch.tensor(1.0)))


@pytest.mark.parametrize("implementation", ["turbo", None])
def test_unknown_implementation_is_rejected_with_the_choices(implementation):
    with pytest.raises(ValueError, match=r"is unknown, choose one of 'reference', 'foreach', 'fused', 'auto'"):
        Adam(parameters(), implementation=implementation)


def test_invalid_parameters_are_rejected_as_by_torch():
    p, q = parameters()[:2]
    cases = [
        ([], ValueError),
        (p, TypeError),
        ([p, "weight"], TypeError),
        ([{"params": {p, q}}], TypeError),
        ([p * 2], ValueError),
        ([{"params": [p]}, {"params": [p, q]}], ValueError),
    ]
    for params, error in cases:
        for make in (torch.optim.Adam, Adam):
            with pytest.raises(error):
                make(params)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(2, dtype=torch.complex64), "complex parameters, but parameter 1 is torch.complex64"),
        (torch.eye(2).to_sparse(), "sparse parameters, but parameter 1 is torch.sparse_coo"),
        (torch.ones(2, dtype=torch.complex64).conj().imag, "negative bit, but parameter 1 is a view"),
    ],
)
def test_complex_sparse_and_lazily_negated_parameters_are_rejected(values, message):
    with pytest.raises(ValueError, match=message):
        Adam([parameters()[0], values.requires_grad_()])


@pytest.mark.parametrize("implementation", ["reference", "foreach", "fused"])
def test_a_parameter_that_gets_the_negative_bit_later_is_rejected_before_anything_changes(implementation):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = Adam(params, implementation=implementation)
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    params[1].data = torch.ones(3, dtype=torch.complex64).conj().imag
    before, steps = params[0].clone(), [int(optimizer.state[p]["step"]) for p in params]
    with pytest.raises(ValueError, match="negative bit, but parameter 1 is a view"):
        optimizer.step()
    assert torch.equal(params[0], before)
    assert [int(optimizer.state[p]["step"]) for p in params] == steps == [1, 1, 1]


@pytest.mark.parametrize("implementation", ["reference", "foreach", "fused"])
def test_a_gradient_with_the_negative_bit_gives_the_update_of_its_values(implementation):
    z, updated = torch.tensor([1 + 2j, 3 - 4j]), []
    for grad in (z.conj().imag, z.conj().imag.resolve_neg()):
        p = torch.nn.Parameter(torch.ones(2))
        optimizer = Adam([p], lr=0.1, implementation=implementation)
        p.grad = grad
        optimizer.step()
        updated.append(p.detach())
    assert torch.equal(*updated)


def test_master_weights_and_stochastic_rounding_exclude_each_other():
    both = dict(master_weights=True, stochastic_rounding=True)
    with pytest.raises(ValueError, match="master_weights and stochastic_rounding exclude each other"):
        Adam(parameters(), **both)
    optimizer = Adam(parameters()[:1], master_weights=True)
    with pytest.raises(ValueError, match="exclude each other"):
        optimizer.add_param_group({"params": parameters()[1:], "stochastic_rounding": True})
    assert len(optimizer.param_groups) == len(optimizer.state) == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lr": "1e-3"}, "lr is '1e-3'; it must be a number"),
        ({"lr": None}, "lr is None; it must be a number"),
        ({"eps": "1e-8"}, "eps is '1e-8'; it must be a number"),
        ({"weight_decay": [0.1]}, r"weight_decay is \[0\.1\]; it must be a number"),
        ({"betas": 0.9}, r"betas is 0\.9; it must be two numbers, such as \(0\.9, 0\.999\)"),
    ],
)
def test_hyper_parameters_that_are_no_numbers_are_refused_by_name(option, message):
    with pytest.raises(TypeError, match=message):
        Adam(parameters(), **option)


def test_rejected_group_leaves_the_optimizer_unchanged():
    p, q, _ = parameters()
    optimizer = Adam([p])
    for group in ({"params": [q], "lr": -1.0}, {"params": [q], "lr": "high"}, {"params": [q.to(torch.cfloat)]}):
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
        assert set(optimizer.state) == {p}


def test_parameters_are_accepted_in_the_forms_that_torch_accepts():
    model = torch.nn.Linear(3, 2)
    forms = [
        lambda: model.parameters(),
        lambda: [{"params": model.weight}, {"params": (p for p in [model.bias]), "lr": 1.0}],
    ]
    for form in forms:
        ours, theirs = Adam(form()), torch.optim.Adam(form())
        assert [len(g["params"]) for g in ours.param_groups] == [len(g["params"]) for g in theirs.param_groups]
        assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in theirs.param_groups]
    try:
        torch.optim.Adam(model.named_parameters())
    except TypeError:
        return  # this PyTorch has no named parameters
    optimizer = Adam(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    train(optimizer, 0, 1)
    theirs = torch.optim.Adam(model.named_parameters())
    theirs.load_state_dict(snapshot(optimizer))
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state[model.weight]["step"].item() == 1
    again = type("Adam", (Adam,), {})(optimizer.param_groups)
    assert again.param_groups[0]["param_names"] == ["weight", "bias"]
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": parameters()})
    assert len(optimizer.param_groups) == 1


def test_state_exists_from_construction_on_for_trained_parameters():
    p, frozen, late = parameters()
    frozen.requires_grad_(False)
    p.data = p.data.t()
    optimizer = Adam([p, frozen], amsgrad=True)
    optimizer.add_param_group({"params": [late], "amsgrad": False})
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert set(optimizer.state[late]) == {"step", "exp_avg", "exp_avg_sq"}
    assert frozen not in optimizer.state
    step = optimizer.state[p]["step"]
    assert (step.shape, step.dtype, step.device.type, step.item()) == ((), torch.float32, "cpu", 0)
    assert optimizer.state[p]["exp_avg"].stride() == p.stride()
    assert not any(tensor.any() for tensor in optimizer.state[p].values())


def test_frozen_parameter_gets_state_with_its_first_gradient():
    p, frozen, _ = parameters()
    frozen.requires_grad_(False)
    optimizer = Adam([p, frozen])
    train(Adam([p]), 0, 1)
    optimizer.step()
    assert frozen not in optimizer.state
    frozen.requires_grad_(True)
    frozen.grad = torch.ones_like(frozen)
    optimizer.step()
    assert optimizer.state[frozen]["step"].item() == 1
    assert optimizer.state[p]["step"].item() == 2


@pytest.mark.parametrize("implementation", ["reference", "foreach", "fused"])
@pytest.mark.parametrize(
    "changed",
    [
        *({"eps": None}, {"weight_decay": None}, {"weight_decay": "0.1"}, {"betas": (1.0, 0.999)}),
        *({"betas": (0.9, 1.5)}, {"betas": (math.nan, 0.999)}),
    ],
)
def test_hyper_parameters_that_a_loop_makes_invalid_are_refused_before_anything_changes(changed, implementation):
    p = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = Adam([p], implementation=implementation)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before, weights = copy.deepcopy(optimizer.state[p]), p.detach().clone()
    optimizer.param_groups[0].update(changed)
    with pytest.raises((TypeError, ValueError), match=next(iter(changed))):
        optimizer.step()
    assert torch.equal(p, weights)
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state[p].items())


@pytest.mark.parametrize("implementation", ["reference", "foreach", "fused"])
def test_eps_and_weight_decay_may_be_tensors_of_one_element(implementation):
    results = []
    for make in (float, lambda number: torch.tensor([number])):
        p = torch.nn.Parameter(torch.ones(64, 64))
        optimizer = Adam([p], implementation=implementation, eps=make(2.0**-20), weight_decay=make(0.125))
        p.grad = torch.ones_like(p)
        optimizer.step()
        results.append(p.detach().clone())
    assert torch.equal(*results)


def test_a_group_that_is_refused_is_not_added():
    optimizer = Adam([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="Tensor weight_decay must be 1-element"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))], "weight_decay": torch.ones(2)})
    assert len(optimizer.param_groups) == len(optimizer.state) == 1


def test_amsgrad_may_be_switched_on_between_steps():
    optimizer = Adam(parameters())
    train(optimizer, 0, 3)
    optimizer.param_groups[0]["amsgrad"] = True
    train(optimizer, 3, 4)
    assert all(torch.equal(s["max_exp_avg_sq"], s["exp_avg_sq"]) for s in optimizer.state.values())


# --- step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sparse_gradient_is_rejected_before_any_parameter_changes(implementation):
    dense, sparse, _ = parameters()
    groups = [{"params": [dense]}, {"params": [sparse]}]
    optimizer = Adam(groups, implementation=implementation)
    before = (dense.detach().clone(), snapshot(optimizer))
    dense.grad, sparse.grad = torch.ones_like(dense), torch.ones_like(sparse).to_sparse()
    with pytest.raises(RuntimeError, match=r"sparse gradients.*torch\.optim\.SparseAdam"):
        optimizer.step()
    assert torch.equal(dense, before[0])
    assert_same(optimizer.state_dict(), before[1])


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this PyTorch enforces the dtype itself")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_of_another_dtype_is_rejected_before_anything_changes(implementation):
    p = parameters(torch.bfloat16)[0]
    optimizer = Adam([p], implementation=implementation)
    p.grad_dtype = None
    p.grad = torch.ones(p.shape)
    with pytest.raises(RuntimeError, match=r"the parameter's torch\.bfloat16, but got torch\.float32"):
        optimizer.step()
    assert optimizer.state[p]["step"].item() == 0


def test_closure_runs_with_gradients_enabled_and_its_loss_is_returned():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = Adam([p], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 1.0
    assert p.item() == pytest.approx(0.5)
    assert optimizer.step() is None


def test_step_hooks_run_once_per_step():
    optimizer = Adam(parameters())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(optimizer, 0, 2)
    assert calls == ["pre", "post"] * 2


def test_global_step_hooks_run_until_they_are_removed():
    optimizer, calls = Adam(parameters()), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("post")),
    ]
    train(optimizer, 0, 1)
    for handle in handles:
        handle.remove()
    train(optimizer, 1, 2)
    assert calls == ["pre", "post"]


def test_profiler_records_each_step_under_its_usual_name():
    optimizer = Adam(parameters())
    train(optimizer, 0, 1)
    with torch.profiler.profile() as profile:
        train(optimizer, 1, 3)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["Optimizer.step#Adam.step"] == 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_learning_rate_is_read_on_every_step(implementation, shape):
    lr = torch.full(shape, 0.5, dtype=torch.float64)
    by_tensor, by_float = (parameters(torch.float64) for _ in range(2))
    with_tensor = Adam(by_tensor, lr=lr, implementation=implementation)
    with_float = Adam(by_float, lr=0.5, implementation=implementation)
    for step in range(4):
        lr.fill_(0.5 / (step + 1))
        with_float.param_groups[0]["lr"] = 0.5 / (step + 1)
        train(with_tensor, step, step + 1)
        train(with_float, step, step + 1)
    assert_same(by_tensor, by_float)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_betas_are_read_on_every_step(implementation, shape):
    betas = tuple(torch.full(shape, beta, dtype=torch.float64) for beta in (0.8, 0.95))
    by_tensor, by_float = (parameters(torch.float64) for _ in range(2))
    with_tensors = Adam(by_tensor, betas=betas, implementation=implementation)
    with_floats = Adam(by_float, betas=(0.8, 0.95), implementation=implementation)
    for step in range(4):
        betas[0].fill_(0.8 - step / 10)
        with_floats.param_groups[0]["betas"] = (betas[0].item(), 0.95)
        train(with_tensors, step, step + 1)
        train(with_floats, step, step + 1)
    assert_same(by_tensor, by_float)
    file = io.BytesIO()
    torch.save(with_tensors.state_dict(), file)
    file.seek(0)
    with_floats.load_state_dict(torch.load(file, weights_only=True))
    assert with_floats.param_groups[0]["betas"] == (betas[0].item(), 0.95)


SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_have_the_same_effect_as_with_torch_optim_adam(name, implementation):
    ours = Adam(parameters(torch.float64), lr=0.01, implementation=implementation)
    theirs = torch.optim.Adam(parameters(torch.float64), lr=0.01, foreach=False)
    for optimizer in (ours, theirs):
        scheduler = SCHEDULERS[name](optimizer)
        for step in range(9):
            train(optimizer, step, step + 1)
            scheduler.step(*([1.0] if name == "plateau" else []))
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] != 0.01
    assert ours.param_groups[0]["betas"] == theirs.param_groups[0]["betas"]
    for p, q in zip(values(ours), values(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


# --- copies and checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))],
    ids=["deepcopy", "pickle"],
)
def test_copy_continues_as_the_original_does(duplicate, implementation):
    optimizer = Adam(parameters(), **{**ALL_OPTIONS, "implementation": implementation})
    train(optimizer, 0, 3)
    twin = duplicate(optimizer)
    train(optimizer, 3, 6)
    train(twin, 3, 6)
    assert_same(twin.state_dict(), optimizer.state_dict())
    assert_same(values(twin), values(optimizer))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_state_dict_can_be_saved_and_loaded_with_weights_only(implementation):
    options = {**ALL_OPTIONS, "implementation": implementation, "lr": torch.tensor(0.01, dtype=torch.float64)}
    first = Adam(parameters(), **options)
    train(first, 0, 3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Adam([torch.nn.Parameter(p.clone()) for p in values(first)])
    second.load_state_dict(torch.load(file, weights_only=True))
    train(first, 3, 6)
    train(second, 3, 6)
    assert_same(second.state_dict(), first.state_dict())
    assert_same(values(second), values(first))


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("theirs", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("ours_first", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_run_continues_in_the_other_library_with_the_same_results(implementation, ours_first, theirs, amsgrad):
    options = dict(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, amsgrad=amsgrad, maximize=True)
    decoupled = theirs is torch.optim.AdamW
    makers = [
        lambda p: theirs(p, foreach=False, **options),
        lambda p: Adam(p, decoupled_weight_decay=decoupled, implementation=implementation, **options),
    ]
    if ours_first:
        makers.reverse()
    whole = makers[0](parameters(torch.float64))
    train(whole, 0, 10)
    first = makers[0](parameters(torch.float64))
    train(first, 0, 5)
    second = makers[1]([torch.nn.Parameter(p.clone()) for p in values(first)])
    second.load_state_dict(snapshot(first))
    train(second, 5, 10)
    for p, q in zip(values(second), values(whole), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    back = makers[0]([torch.nn.Parameter(p.clone()) for p in values(second)])
    back.load_state_dict(snapshot(second))
    assert all(s["step"].item() == 10 for s in back.state.values())


@pytest.mark.parametrize("option", ["master_weights", "stochastic_rounding"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_run_in_half_precision_resumes_bit_for_bit_and_loads_into_torch(implementation, option):
    first = Adam(parameters(torch.bfloat16), lr=1e-3, implementation=implementation, **{option: True})
    train(first, 0, 3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    names = {"step", "exp_avg", "exp_avg_sq"} | ({"master_param"} if option == "master_weights" else set())
    assert all(set(state) == names for state in saved["state"].values())
    assert saved["param_groups"][0][option]

    second = Adam([torch.nn.Parameter(p.clone()) for p in values(first)])
    theirs = torch.optim.Adam([torch.nn.Parameter(p.clone()) for p in values(first)])
    second.load_state_dict(copy.deepcopy(saved))
    theirs.load_state_dict(copy.deepcopy(saved))
    for p, state in zip(values(theirs), saved["state"].values(), strict=True):
        assert torch.equal(theirs.state[theirs.param_groups[0]["params"][0]]["step"], state["step"])
        assert p.dtype == torch.bfloat16
    train(theirs, 3, 4)
    train(first, 3, 6)
    train(second, 3, 6)
    assert_same(second.state_dict(), first.state_dict())
    assert_same(values(second), values(first))


def test_a_loaded_optimizer_saves_what_it_has_loaded():
    parameters = [torch.nn.Parameter(torch.ones(2))]
    saved = Adam(parameters).state_dict()
    loaded = Adam(parameters)
    loaded.load_state_dict(saved)
    loaded.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    first, second = loaded.state_dict()["param_groups"]
    assert first.keys() == second.keys() == saved["param_groups"][0].keys()


def test_loading_does_not_share_tensors_with_the_source():
    first = Adam(parameters())
    train(first, 0, 2)
    second = Adam(parameters())
    second.load_state_dict(first.state_dict())
    before = snapshot(second)
    train(first, 2, 4)
    assert_same(second.state_dict(), before)


@pytest.mark.parametrize(
    "step", [7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.tensor(7.0, dtype=torch.float64)], ids=repr
)
def test_step_count_of_any_form_becomes_a_float32_on_the_cpu(step):
    optimizer = Adam(parameters())
    state_dict = snapshot(optimizer)
    for state in state_dict["state"].values():
        state["step"] = step
    optimizer.load_state_dict(state_dict)
    for state in optimizer.state.values():
        assert (state["step"].shape, state["step"].dtype, state["step"].item()) == ((), torch.float32, 7)


def test_options_of_other_optimizers_are_kept_and_have_no_effect():
    foreign = dict(foreach=True, fused=True, capturable=True, differentiable=True)
    plain, marked = Adam(parameters()), Adam(parameters())
    state_dict = snapshot(marked)
    state_dict["param_groups"][0].update(foreign)
    marked.load_state_dict(state_dict)
    train(plain, 0, 3)
    train(marked, 0, 3)
    assert_same(values(marked), values(plain))
    assert foreign.items() <= marked.state_dict()["param_groups"][0].items()
    (group,) = type("Adam", (Adam,), {})(marked.param_groups).param_groups  # as Horovod does
    assert foreign.items() <= group.items()
    assert group["implementation"] == "auto"


def test_options_that_a_saved_group_lacks_keep_this_optimizers_values():
    optimizer = Adam([{"params": p} for p in parameters()], **ALL_OPTIONS)
    optimizer.param_groups[1]["decoupled_weight_decay"] = False
    state_dict = snapshot(optimizer)
    for group in state_dict["param_groups"]:
        for option in ("decoupled_weight_decay", "maximize", "implementation"):
            del group[option]
    optimizer.load_state_dict(state_dict)
    assert [g["decoupled_weight_decay"] for g in optimizer.param_groups] == [True, False, True]
    assert all(g["maximize"] and g["implementation"] == "foreach" for g in optimizer.param_groups)


def test_parameters_without_saved_state_start_from_zero():
    optimizer = Adam(parameters())
    train(optimizer, 0, 2)
    optimizer.load_state_dict(torch.optim.Adam(parameters()).state_dict())
    assert len(optimizer.state) == 3
    assert not any(tensor.any() for state in optimizer.state.values() for tensor in state.values())


def test_loaded_state_gets_the_strides_of_the_parameters():
    p = torch.nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    optimizer = Adam([p])
    state_dict = snapshot(optimizer)
    state_dict["state"][0]["exp_avg"] = torch.randn(2, 3, 4, 4)
    optimizer.load_state_dict(state_dict)
    assert optimizer.state[p]["exp_avg"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(optimizer.state[p]["exp_avg"], state_dict["state"][0]["exp_avg"])


def corrupt(state_dict, key, value):
    if value is None:
        del state_dict["state"][1][key]
    else:
        state_dict["state"][1][key] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("exp_avg", torch.zeros(5), r"loaded exp_avg of parameter 1 has shape \(5,\), but .* shape \(4,\)"),
        ("max_exp_avg_sq", torch.zeros(()), r"loaded max_exp_avg_sq of parameter 1 has shape \(\)"),
        ("exp_avg_sq", None, "loaded state of parameter 1 is not Adam's: exp_avg_sq is missing"),
        ("step", torch.tensor(-1.0), "loaded step of parameter 1 must be one count"),
        ("step", torch.zeros(4), "loaded step of parameter 1 must be one count"),
    ],
)
def test_state_that_does_not_fit_is_rejected_before_anything_changes(key, value, message):
    optimizer = Adam(parameters(), amsgrad=True)
    train(optimizer, 0, 2)
    before = snapshot(optimizer)
    bad = snapshot(optimizer)
    bad["param_groups"][0]["lr"] = 77.0
    bad["state"][0]["exp_avg"] += 1
    corrupt(bad, key, value)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad)
    assert_same(optimizer.state_dict(), before)


def test_unknown_saved_implementation_is_rejected_before_anything_changes():
    optimizer = Adam(parameters())
    before, bad = snapshot(optimizer), snapshot(optimizer)
    bad["param_groups"][0].update(implementation="turbo", lr=77.0)
    with pytest.raises(ValueError, match="'turbo' is unknown"):
        optimizer.load_state_dict(bad)
    assert_same(optimizer.state_dict(), before)


# --- Horovod ------------------------------------------------------------------------------------------------


def test_optimizer_rebuilt_from_its_groups_keeps_every_hyper_parameter():
    p, q, _ = parameters()
    optimizer = Adam([{"params": [p]}, {"params": [q], "lr": 0.5, "betas": (0.1, 0.2)}], **ALL_OPTIONS)
    before = snapshot(optimizer)["param_groups"]
    again = type("Adam", (Adam,), {})(optimizer.param_groups)
    assert_same(snapshot(again)["param_groups"], before)
    assert all(state["step"].item() == 0 for state in again.state.values())


IN_HOROVOD = """
import torch, horovod.torch as hvd
from hvd_adam.optim.adam import Adam

hvd.init()
model = torch.nn.Linear(3, 2)
options = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, amsgrad=True,
               decoupled_weight_decay=True, maximize=True, master_weights=False, stochastic_rounding=True,
               state_format="float32", implementation="reference")
groups = [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias]}]
optimizer = hvd.DistributedOptimizer(Adam(groups, **options), named_parameters=model.named_parameters())
assert isinstance(optimizer, Adam)
for group, lr in zip(optimizer.param_groups, (0.5, 0.01)):
    assert {k: v for k, v in group.items() if k != "params"} == {**options, "lr": lr}, group
before = [p.detach().clone() for p in model.parameters()]
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before)), "the broadcast took a step"
assert all(s["step"].item() == 0 for s in optimizer.state.values())
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
assert all(s["step"].item() == 1 for s in optimizer.state.values())
print("kept")
"""


def test_horovods_wrapper_keeps_every_hyper_parameter_and_fakes_no_step():
    pytest.importorskip("horovod")
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", IN_HOROVOD], cwd=root, capture_output=True, text=True, timeout=250
    )
    assert done.stdout.strip().endswith("kept"), done.stderr
