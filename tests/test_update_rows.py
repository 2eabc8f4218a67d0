"""The fused update: nothing is moved, and every run has the results of torch.optim.Adam.

Hazards covered:
- a parameter, gradient or state tensor moves, so that others who hold its memory no longer see it;
- a tensor is replaced (zero_grad, load_state_dict, p.data, p.grad.data, Module.to) and its old memory is used;
- a gradient that lies in memory in another order than its parameter is read in the wrong order;
- a parameter changes that no step should change: frozen, without gradient, rejected;
- parameters that share memory are updated at the same time;
- strides, empty and 0-dim tensors or mixed dtypes are misplaced;
- a copy (deepcopy, pickle, torch.save) shares memory with its original, or trains differently;
- autograd no longer notices that a saved value has been overwritten.
"""

import copy
import io
import pickle

import pytest
import torch

from hvd_adam.optim.adam import Adam

SHAPES = ((3, 5), (), (7,), (0,), (2, 3, 4, 4), (1,), (33,))
OPTIONS = dict(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
STATES = ("exp_avg", "exp_avg_sq")


def parameters(dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def clones(params):
    """Returns copies with the same values, strides and requires_grad."""
    return [torch.nn.Parameter(p.detach().clone(), p.requires_grad) for p in params]


def fused(params, **options):
    return Adam(params, implementation="fused", **{**OPTIONS, **options})


def stock(params, **options):
    return torch.optim.Adam(params, foreach=False, **{**OPTIONS, **options})


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(optimizer, step, absent=()):
    """Sets gradients that depend only on the step, so that errors do not feed back."""
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params_of(optimizer)):
        gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if p.requires_grad:
            p.grad = None if i in absent else gradient


def train(first, last, *optimizers, absent=()):
    for step in range(first, last):
        for optimizer in optimizers:
            give_gradients(optimizer, step, absent)
            optimizer.step()


def assert_close(ours, theirs):
    """At most 20 steps of float64 with some 30 roundings each, of numbers of size 1, differ by less than 1e-12."""
    for p, q in zip(ours, theirs, strict=True):
        assert p.shape == q.shape
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-12)


def assert_same_run(ours, theirs):
    """Compares parameters, moments and step counts."""
    assert_close(params_of(ours), params_of(theirs))
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        found = theirs.state.get(q) or {"step": torch.tensor(0.0)}
        assert ours.state[p]["step"].item() == found["step"].item()
        for name in found.keys() - {"step"}:
            assert_close([ours.state[p][name]], [found[name]])


def pair(dtype=torch.float64, shapes=SHAPES, **options):
    params = parameters(dtype, shapes)
    return fused(clones(params), **options), stock(params, **options)


# --- places in memory --------------------------------------------------------------------------------------


def addresses(optimizer):
    """Returns the addresses of parameters, gradients and state."""
    tensors = [t for p in params_of(optimizer) for t in (p, p.grad, *optimizer.state[p].values()) if t is not None]
    return [t.data_ptr() for t in tensors]


def test_step_moves_nothing_and_has_torchs_values():
    ours, theirs = pair()
    for step in range(3):
        for optimizer in (ours, theirs):
            give_gradients(optimizer, step)
        before, gradients = addresses(ours), [p.grad for p in params_of(ours)]
        ours.step()
        theirs.step()
        assert addresses(ours) == before
        assert all(p.grad is grad for p, grad in zip(params_of(ours), gradients, strict=True))
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_the_gradients_for_good(set_to_none):
    ours, theirs = pair()
    for step in range(4):
        for optimizer in (ours, theirs):
            optimizer.zero_grad(set_to_none=set_to_none)
            for i, p in enumerate(params_of(optimizer)):
                if (i + step) % 3:  # accumulated by backward; the others stay empty
                    (p * (step + 1.0)).sum().backward()
            optimizer.step()
        assert_same_run(ours, theirs)
    ours.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in params_of(ours))


def test_backward_through_overwritten_values_fails_as_with_torch():
    for make in (stock, fused):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = make([p])
        loss = (p * p).sum()
        for _ in range(2):  # in the second step the table exists already
            loss = (p * p).sum()
            loss.backward(retain_graph=True)
            optimizer.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


# --- which parameters -------------------------------------------------------------------------------------


def test_parameters_without_gradient_are_skipped_as_torch_skips_them():
    ours, theirs = pair()
    for step, absent in enumerate([(1, 4), (), (0, 1, 2, 3, 4, 5, 6), (0, 6), (2,)]):
        before = [p.detach().clone() for p in params_of(ours)]
        train(step, step + 1, ours, theirs, absent=absent)
        assert all(torch.equal(params_of(ours)[i], before[i]) for i in absent)
    assert_same_run(ours, theirs)


def test_frozen_parameters_do_not_change_until_they_are_unfrozen():
    ours, theirs = pair()
    for optimizer in (ours, theirs):
        params_of(optimizer)[4].requires_grad_(False)
    ours, theirs = fused(params_of(ours)), stock(params_of(theirs))
    frozen = params_of(ours)[4]
    place, values = frozen.data_ptr(), frozen.detach().clone()
    train(0, 3, ours, theirs)
    assert frozen.data_ptr() == place
    assert torch.equal(frozen, values)
    for optimizer in (ours, theirs):
        params_of(optimizer)[4].requires_grad_(True)
    train(3, 6, ours, theirs)
    assert_same_run(ours, theirs)
    for optimizer in (ours, theirs):
        params_of(optimizer)[0].requires_grad_(False)
        params_of(optimizer)[0].grad = None
    train(6, 8, ours, theirs)
    assert_same_run(ours, theirs)


def test_group_added_after_steps_is_updated():
    (*first, last), theirs_params = parameters(), parameters()
    ours, theirs = fused(first), stock(theirs_params[:-1])
    train(0, 3, ours, theirs)
    ours.add_param_group({"params": [last], "lr": 0.5})
    theirs.add_param_group({"params": theirs_params[-1:], "lr": 0.5})
    train(3, 6, ours, theirs)
    assert_same_run(ours, theirs)


def test_options_and_members_of_groups_may_be_edited():
    params = parameters()
    ours_params = clones(params)
    ours, theirs = (
        make([{"params": some[:3]}, {"params": some[3:], "lr": 0.1}])
        for make, some in ((fused, ours_params), (stock, params))
    )
    train(0, 2, ours, theirs)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0].update(lr=0.2, betas=(0.5, 0.6), weight_decay=0.0, maximize=True)
        optimizer.param_groups[1].update(eps=1e-3, weight_decay=0.3)
    train(2, 4, ours, theirs)
    for optimizer in (ours, theirs):
        first, second = (group["params"] for group in optimizer.param_groups)
        second.append(first.pop(1))
        dropped = first.pop(0)
        dropped.grad = None
    train(4, 6, ours, theirs)
    assert_same_run(ours, theirs)
    assert_close(ours_params, params)  # also the removed ones


def test_weight_used_twice_is_updated_once():
    models = []
    for make in (fused, stock):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4)).double()
        model[2].weight = model[0].weight
        optimizer = make(model.parameters())
        for step in range(5):
            optimizer.zero_grad()
            model(torch.full((2, 4), step + 1.0, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        assert model[2].weight is model[0].weight
        models.append(model)
    ours, theirs = models
    # Gradients follow the parameters here: errors of 1e-15 may grow by some factor each step.
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-10, atol=1e-10)


def shared(kind):
    whole = torch.arange(12, dtype=torch.float64) / 7
    slices = {
        "the same": (slice(0, 12), slice(0, 12)),
        "overlapping": (slice(0, 8), slice(4, 12)),
        "contained": (slice(0, 12), slice(3, 5)),
    }[kind]
    return [torch.nn.Parameter(whole[piece]) for piece in slices] + [torch.nn.Parameter(torch.ones(3).double())]


@pytest.mark.parametrize("kind", ["the same", "overlapping", "contained"])
def test_parameters_that_share_memory_continue_to_share_it(kind):
    # Without weight decay: two parameters would decay the same memory in an undefined order.
    ours, theirs = fused(shared(kind), weight_decay=0.0), stock(shared(kind), weight_decay=0.0)
    train(0, 5, ours, theirs)
    assert_same_run(ours, theirs)


def test_frozen_parameter_that_shares_memory_with_a_trained_one_continues_to_share_it():
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    tied = torch.nn.Parameter(p.detach(), requires_grad=False)
    train(0, 1, fused([p, tied]))
    assert torch.equal(p, tied)


def test_parameters_in_shared_memory_stay_there():
    p = torch.nn.Parameter(torch.ones(3).share_memory_())
    train(0, 1, fused([p]))
    assert p.is_shared()


def test_two_optimizers_can_step_the_same_parameters_in_turn():
    params = parameters()
    ours_params = clones(params)
    ours = [fused(ours_params), fused(ours_params[2:], lr=0.1)]
    theirs = [stock(params), stock(params[2:], lr=0.1)]
    for step in range(3):
        train(step, step + 1, *ours)
        train(step, step + 1, *theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_run(a, b)


# --- kinds of tensors -------------------------------------------------------------------------------------


def test_all_strides_give_torchs_results_and_dense_ones_are_kept():
    views = {
        "channels last": lambda base: base.to(memory_format=torch.channels_last),
        "transposed": lambda base: base.transpose(0, 3),
        "strided slice": lambda base: base[..., ::2],
        "one of a large tensor": lambda base: base[1],
        "one column": lambda base: base[:, :1],
    }
    generator = torch.Generator().manual_seed(1)
    tensors = [view(torch.randn(2, 3, 4, 5, generator=generator).double()) for view in views.values()]
    ours = fused([torch.nn.Parameter(t) for t in tensors])
    strides = [p.stride() for p in params_of(ours)]
    theirs = stock([torch.nn.Parameter(t.clone(memory_format=torch.contiguous_format)) for t in tensors])
    train(0, 4, ours, theirs)
    assert_same_run(ours, theirs)
    for p, before in list(zip(params_of(ours), strides, strict=True))[:2]:
        assert p.stride() == ours.state[p]["exp_avg"].stride() == before


def test_expanded_parameter_does_not_disturb_the_others():
    """Three elements share one number: torch's in-place operations reject it, so its values are not checked."""
    expanded = torch.nn.Parameter(torch.ones(1).expand(3))
    plain = torch.nn.Parameter(torch.ones(3))
    optimizer = fused([plain, expanded])
    place = expanded.data_ptr()
    plain.grad = torch.ones(3)
    optimizer.step()
    assert expanded.data_ptr() == place
    assert (plain < 1).all()


def test_dtypes_of_a_group_are_updated_as_if_alone():
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float32, torch.float64)
    together = [torch.nn.Parameter(torch.linspace(-1, 1, 20 + i).to(dtype)) for i, dtype in enumerate(dtypes)]
    separate = clones(together)
    optimizer = fused(together)
    train(0, 3, optimizer)
    for step in range(3):
        give_gradients(optimizer, step)  # the separate ones get copies of these
        for p, q in zip(separate, together, strict=True):
            p.grad = q.grad.clone()
        for p in separate:
            if step == 0:
                p.optimizer = fused([p])
            p.optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(separate, together, strict=True))


def test_model_with_only_empty_parameters_counts_its_steps():
    ours, theirs = pair(shapes=((0,), (3, 0)))
    train(0, 2, ours, theirs)
    assert_same_run(ours, theirs)
    assert ours.state[params_of(ours)[0]]["step"].item() == 2


def test_lstm_trains_as_with_torch():
    runs = []
    for make in (fused, stock):
        torch.manual_seed(0)
        model = torch.nn.LSTM(3, 4, num_layers=2).double()
        optimizer = make(model.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 2, 3))[0].square().sum().backward()
            optimizer.step()
        runs.append(list(model.parameters()))
    # Gradients follow the parameters here: errors of 1e-15 may grow by some factor each step.
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-10)


# --- replaced by user code --------------------------------------------------------------------------------


def replace_gradient_data(optimizer):
    for p in params_of(optimizer):
        p.grad.data = p.grad.detach() * 2


def replace_data(optimizer):
    for p in params_of(optimizer):
        p.data = p.detach() * 0.5


def change_in_place(optimizer):
    with torch.no_grad():
        for p in params_of(optimizer):
            p.mul_(0.5)
            p.grad.add_(1)
            optimizer.state[p]["exp_avg"].mul_(3)


def replace_state(optimizer):
    for p in params_of(optimizer):
        optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"] * 2
        optimizer.state[p]["step"] = torch.tensor(7.0)


def reset_state(optimizer):
    optimizer.state.clear()


def load_own_state(optimizer):
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["exp_avg"] += 1
    optimizer.load_state_dict(state_dict)


def load_another_state(optimizer):
    other = stock(parameters())
    train(10, 13, other)
    state_dict = {**optimizer.state_dict(), "state": copy.deepcopy(other.state_dict()["state"])}
    optimizer.load_state_dict(state_dict)


def use_one_vector(optimizer):
    vector = torch.nn.utils.parameters_to_vector(params_of(optimizer)).detach() + 1
    torch.nn.utils.vector_to_parameters(vector, params_of(optimizer))


INTERVENTIONS = (
    *(replace_gradient_data, replace_data, change_in_place, replace_state, reset_state),
    *(load_own_state, load_another_state, use_one_vector),
)


@pytest.mark.parametrize("intervene", INTERVENTIONS, ids=lambda f: f.__name__)
def test_next_step_uses_tensors_replaced_between_steps(intervene):
    ours, theirs = pair()
    train(0, 3, ours, theirs)
    for optimizer in (ours, theirs):
        give_gradients(optimizer, 3)
        intervene(optimizer)
        optimizer.step()  # with the replaced tensors
    assert_same_run(ours, theirs)
    train(4, 7, ours, theirs)
    assert_same_run(ours, theirs)


def test_gradients_with_replaced_data_are_used():
    """`p.grad.data = …` keeps the object, and zero_grad and backward continue to use it."""
    ours, theirs = pair()
    train(0, 2, ours, theirs)
    for optimizer in (ours, theirs):
        replace_gradient_data(optimizer)
    for step in range(3):
        for optimizer in (ours, theirs):
            optimizer.zero_grad(set_to_none=False)
            sum((p * (step + 1.0)).sum() for p in params_of(optimizer)).backward()
            optimizer.step()
    assert_same_run(ours, theirs)


MODULE_CHANGES = {
    "to(float64)": lambda model: model.to(torch.float64),
    "float().double()": lambda model: model.float().double(),
    "to(channels_last)": lambda model: model.to(memory_format=torch.channels_last),
    "share_memory()": lambda model: model.share_memory(),
}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("change", MODULE_CHANGES)
def test_model_may_be_converted_between_steps(change, set_to_none):
    runs = []
    for make in (fused, stock):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(36, 2))
        model = model if change == "to(float64)" else model.double()
        optimizer = make(model.parameters())
        for step in range(6):
            if step == 3:
                MODULE_CHANGES[change](model)
                if change == "to(float64)":
                    # torch's own moments stay float32 and its next step fails: reset both.
                    optimizer.state.clear()
            optimizer.zero_grad(set_to_none=set_to_none)
            weight = model[0].weight
            images = torch.linspace(-1, 1, 150, dtype=weight.dtype).view(2, 3, 5, 5)
            model(images).square().sum().backward()
            optimizer.step()
        runs.append([p.detach() for p in model.parameters()])
    # Gradients follow the parameters: 1e-10 where all is float64, else three steps of float32, 1e-7 each, grown.
    tolerance = 1e-4 if change == "to(float64)" else 1e-10
    torch.testing.assert_close(*runs, rtol=tolerance, atol=tolerance)
    assert runs[0][0].dtype == torch.float64


def test_model_converted_to_half_continues_with_state_in_the_new_dtype():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer = fused(model.parameters())
    train(0, 2, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    model.half()
    model.zero_grad()
    train(2, 4, optimizer)
    for p, q in zip(model.parameters(), before, strict=True):
        assert p.dtype == optimizer.state[p]["exp_avg"].dtype == torch.float16
        assert optimizer.state[p]["step"].item() == 4
        # Two steps of at most 3 lr each, by Cauchy and Schwarz, and roundings of 2^-11.
        assert ((p.float() - q).abs() <= 6 * 0.01 + 4 * 2**-11 * q.abs() + 2**-14).all()


@pytest.mark.parametrize("bad", ["sparse", "dtype"])
def test_rejected_gradient_changes_nothing(bad):
    if bad == "dtype" and not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this PyTorch enforces the dtype itself")
    params = [*parameters(torch.float32), *parameters(torch.float64)]
    optimizer = fused(params)
    train(0, 2, optimizer)
    give_gradients(optimizer, 2)
    if bad == "sparse":
        params[-1].grad = torch.ones(params[-1].shape, dtype=torch.float64).to_sparse()
    else:
        params[-1].grad = None
        params[-1].grad_dtype = None
        params[-1].grad = torch.ones(params[-1].shape)
    grads = [p.grad.clone() for p in params[:-1]]
    values, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(RuntimeError, match=r"sparse gradients|parameter's torch\.float64"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, values, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=False))
    for old, new in zip(state.values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


# --- copies -----------------------------------------------------------------------------------------------


def through_a_file(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda t: pickle.loads(pickle.dumps(t)), "file": through_a_file}


@pytest.mark.parametrize("name", COPIES)
def test_copy_of_model_and_optimizer_trains_as_the_original_and_independently(name):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer = fused(model.parameters(), amsgrad=True)
    train(0, 3, optimizer)
    model_copy, optimizer_copy = COPIES[name]((model, optimizer))
    assert all(p is q for p, q in zip(params_of(optimizer_copy), model_copy.parameters(), strict=True))
    copied = [p.detach().clone() for p in model_copy.parameters()]
    train(3, 6, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model_copy.parameters(), copied, strict=True))
    train(3, 6, optimizer_copy)
    assert all(torch.equal(p, q) for p, q in zip(model_copy.parameters(), model.parameters(), strict=True))
    ours, theirs = optimizer_copy.state_dict()["state"], optimizer.state_dict()["state"]
    for i in theirs:
        assert all(torch.equal(ours[i][key], theirs[i][key]) for key in theirs[i])


@pytest.mark.parametrize("name", COPIES)
def test_copy_of_a_model_shares_no_memory_with_it(name):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer = fused(model.parameters())
    train(0, 1, optimizer)
    duplicate = COPIES[name](model)
    before = [p.detach().clone() for p in duplicate.parameters()]
    train(1, 3, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(duplicate.parameters(), before, strict=True))
    model.load_state_dict(duplicate.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
