"""`SyncBatchNorm`: N ranks normalize as one rank does with the whole batch.

Hazards: means of means where ranks have different numbers of samples; a gradient without the part of other ranks;
running statistics with the wrong count; options (momentum None, no affine part, no statistics), hooks, attributes
or a derived class's own forward lost in conversion; a collective outside training, where ranks have different
numbers of batches; a second derivative without its terms.
"""

import copy
import logging

import pytest
import torch
from helpers.on_ranks import on_ranks
from helpers.training_runs import one_line, train
from torch import nn
from torch.nn.utils import parametrize, prune

from hvd_adam import Adam, distribute
from hvd_adam.distributed.sync_batchnorm import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, convert
from hvd_adam.errors import UserError


def small_model(**options):
    torch.manual_seed(0)
    # No bias before a normalization: its gradient consists of rounding errors, which Adam would enlarge.
    first, last = torch.nn.Conv2d(2, 3, 3, bias=False), torch.nn.Linear(48, 4, bias=False)
    norms = torch.nn.BatchNorm2d(3, **options), torch.nn.BatchNorm1d(4, **options)
    layers = first, norms[0], torch.nn.Tanh(), torch.nn.Flatten(), last, norms[1]
    return torch.nn.Sequential(*layers).double()


def whole_batches(samples):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(samples, 2, 6, 6, generator=generator, dtype=torch.float64) for _ in range(3)]


OPTIONS = ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False})


@on_ranks(2)
def test_two_ranks_train_as_one_rank_with_the_whole_batch(cluster):
    for options in OPTIONS:
        model, oracle = convert(small_model(**options)), small_model(**options)
        optimizer = distribute(Adam(model.parameters(), lr=1e-2), model)
        reference = torch.optim.Adam(oracle.parameters(), lr=1e-2)
        for batch in whole_batches(8):
            reference.zero_grad()
            oracle(batch).pow(3).mean().backward()
            reference.step()
            optimizer.zero_grad()
            model(batch.chunk(2)[cluster.rank]).pow(3).mean().backward()
            optimizer.step()
        for name, expected in oracle.state_dict().items():
            found, message = model.state_dict()[name], f"{options} {name}"
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, msg=message)
        torch.testing.assert_close(model.eval()(batch), oracle.eval()(batch), rtol=1e-9, atol=1e-11)


@on_ranks(2)
def test_ranks_with_different_numbers_of_samples_are_weighted_by_samples(cluster):
    layer, oracle = convert(torch.nn.BatchNorm1d(3)).double(), torch.nn.BatchNorm1d(3).double()
    batch = torch.randn(8, 3, dtype=torch.float64)
    part = batch[:2] if cluster.rank == 0 else batch[2:]
    expected = oracle(batch)[:2] if cluster.rank == 0 else oracle(batch)[2:]
    torch.testing.assert_close(layer(part), expected, rtol=1e-12, atol=1e-12)


@on_ranks(2)
def test_a_mean_that_is_large_next_to_the_deviation_loses_no_more_digits_than_in_one_process(cluster):
    batch = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    for offset in (100.0, 1e4):
        shifted = batch + offset
        expected, layer = torch.nn.BatchNorm1d(3).double(), convert(torch.nn.BatchNorm1d(3))
        wanted, found = expected(shifted.double()).chunk(2)[cluster.rank], layer(shifted.chunk(2)[cluster.rank])
        # Subtracting the mean is exact to half a unit in the last place of the offset.
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=offset * torch.finfo(torch.float32).eps)
        torch.testing.assert_close(layer.running_var.double(), expected.running_var, rtol=1e-5, atol=0)


@on_ranks(2)
def test_a_rank_without_samples_adds_nothing(cluster):
    layer, oracle = convert(torch.nn.BatchNorm1d(3)).double(), torch.nn.BatchNorm1d(3).double()
    batch = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = oracle(batch)
    found = layer(batch[:0] if cluster.rank else batch)
    torch.testing.assert_close(found, expected[:0] if cluster.rank else expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_var, oracle.running_var, rtol=1e-12, atol=1e-12)
    found.sum().backward()
    assert layer.weight.grad.isfinite().all()


@on_ranks(2)
def test_bfloat16_images_are_normalized_in_float32(cluster):
    layer = convert(torch.nn.BatchNorm2d(3))
    output = layer(torch.randn(4, 3, 5, 5, dtype=torch.bfloat16) + 100)
    assert output.dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32
    assert output.float().mean().abs() < 0.05


@on_ranks(0)
def test_on_one_rank_it_equals_batch_norm_of_pytorch(cluster):
    model = small_model()
    converted = convert(copy.deepcopy(model))
    (batch, *_) = whole_batches(4)
    assert torch.equal(converted(batch), model(batch))
    assert [type(layer) for layer in converted if isinstance(layer, SyncBatchNorm)] == [
        SyncBatchNorm2d,
        SyncBatchNorm1d,
    ]
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        SyncBatchNorm(3).double()(batch[0, 0, 0])
    assert torch.equal(SyncBatchNorm(2).double()(batch), nn.BatchNorm2d(2).double()(batch))


# Evaluation.


@on_ranks(2)
def test_evaluation_makes_no_collective_and_equals_pytorch(cluster):
    for options in (*OPTIONS, {"track_running_stats": False, "affine": False}):
        model = small_model(**options)
        for batch in whole_batches(8):
            model(batch)  # running statistics that are not the initial ones
        converted = convert(copy.deepcopy(model)).eval()
        for batch in whole_batches(4)[: 1 + 2 * cluster.rank]:  # rank 0 has fewer
            assert torch.equal(converted(batch + cluster.rank), model.eval()(batch + cluster.rank)), options
        converted.train()
        converted[1].eval()  # frozen statistics in a model that is being trained
        converted[5].eval()
        if cluster.rank:
            converted(batch).sum().backward()


@on_ranks(2)
def test_without_running_statistics_each_rank_evaluates_its_own_batch(cluster):
    layer = convert(nn.BatchNorm1d(1, track_running_stats=False, affine=False)).eval()
    output = layer(torch.tensor([[0.0], [2.0]]) + 10 * cluster.rank)
    torch.testing.assert_close(output, torch.tensor([[-1.0], [1.0]]), rtol=0, atol=1e-4)


@on_ranks(2)
def test_statistics_that_are_switched_off_or_removed_later_train_as_in_pytorch(cluster):
    def without_updates(layer):
        layer.track_running_stats = False

    def without_statistics(layer):
        layer.running_mean = layer.running_var = None

    def without_count(layer):
        layer.num_batches_tracked = None

    (batch, *_) = whole_batches(8)
    for change in (without_updates, without_statistics, without_count):
        for momentum in (0.1, None):
            layers = convert(nn.BatchNorm2d(2, momentum=momentum)).double(), nn.BatchNorm2d(2, momentum=momentum)
            for layer in layers:
                change(layer.double())
            ours = layers[0](batch.chunk(2)[cluster.rank])
            theirs = layers[1](batch).chunk(2)[cluster.rank]
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
            for mine, other in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


# Conversion.


class WithActivation(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class WithOtherDefaults(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels, eps=1e-3)


class SynchronizedWithActivation(SyncBatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


def wrapped(layer):
    plain = layer.forward
    layer.forward = lambda input: plain(input).relu()
    return layer


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


KEPT = {
    "derived, with an activation": (lambda: WithActivation(3), "WithActivation"),
    "derived, with other defaults": (lambda: WithOtherDefaults(3), "WithOtherDefaults"),
    "PyTorch's synchronized one": (lambda: nn.SyncBatchNorm(3), "SyncBatchNorm"),
    "with a forward of its own": (lambda: wrapped(nn.BatchNorm2d(3)), "BatchNorm2d"),
    "parametrized": (lambda: parametrized(nn.BatchNorm2d(3)), "ParametrizedBatchNorm2d"),
    "scripted": (lambda: torch.jit.script(nn.BatchNorm2d(3)), "RecursiveScriptModule"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("kind", KEPT)
def test_a_layer_that_may_compute_something_else_is_kept_and_named(kind, caplog):
    make, class_name = KEPT[kind]
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(make()))
    before, batch = copy.deepcopy(model), torch.randn(4, 3, 5, 5)
    kept, kept_class = model[1][0], type(model[1][0])
    with caplog.at_level(logging.WARNING, "hvd_adam"):
        assert convert(model) is model
    (record,) = caplog.records
    assert f"not synchronized, because only torch.nn.BatchNorm1d, 2d and 3d are: 1.0 ({class_name})" in record.msg
    assert model[1][0] is kept
    assert type(kept) is kept_class
    assert type(model[0]) is SyncBatchNorm2d
    assert torch.equal(model[1](batch), before[1](batch))
    assert model.state_dict().keys() == before.state_dict().keys()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("kind", KEPT)
def test_strict_conversion_refuses_such_a_layer_and_changes_nothing(kind):
    model = nn.Sequential(nn.BatchNorm2d(3), KEPT[kind][0]())
    with pytest.raises(UserError, match=r"is not synchronized, .*: 1 \(.*use these classes, or derive from"):
        convert(model, strict=True)
    assert type(model[0]) is nn.BatchNorm2d


def test_of_many_such_layers_a_few_are_named():
    model = nn.Sequential(*(WithActivation(3) for _ in range(9)))
    with pytest.raises(UserError, match=r"4 \(WithActivation\), 4 more; use") as caught:
        convert(model, strict=True)
    assert "5 (" not in str(caught.value)
    with pytest.raises(UserError, match=r"the model itself \(WithActivation\)"):
        convert(WithActivation(3), strict=True)


@on_ranks(0)
def test_kept_layers_compute_what_they_did(cluster):
    net = nn.Sequential(nn.Conv2d(1, 8, 3), WithActivation(8))
    x = torch.randn(4, 1, 8, 8)
    before = net(x)
    assert torch.equal(convert(net)(x), before)


@on_ranks(2)
def test_a_class_derived_from_ours_is_synchronized(cluster):
    (batch, *_) = whole_batches(8)
    model = convert(nn.Sequential(SynchronizedWithActivation(2), SynchronizedWithActivation(2))).double()
    assert [layer.collective_name for layer in model] == ["hvd_adam.batchnorm.0", "hvd_adam.batchnorm.1"]
    expected = nn.Sequential(WithActivation(2), WithActivation(2)).double()(batch).chunk(2)[cluster.rank]
    torch.testing.assert_close(model(batch.chunk(2)[cluster.rank]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [nn.LazyBatchNorm1d, lambda: nn.LazyBatchNorm1d(affine=False)])
def test_a_lazy_layer_is_refused_until_it_has_a_size(make):
    model = nn.Sequential(nn.BatchNorm1d(3), make())
    with pytest.raises(UserError, match=r"without a size yet: 1 \(LazyBatchNorm1d\); run one batch"):
        convert(model)
    assert type(model[0]) is nn.BatchNorm1d
    model(torch.randn(4, 3))
    assert [type(layer) for layer in convert(model)] == [SyncBatchNorm1d] * 2


def test_layers_without_batch_statistics_are_left_alone(caplog):
    model = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), nn.GroupNorm(1, 3), nn.LayerNorm(3))
    classes = [type(layer) for layer in model]
    with caplog.at_level(logging.WARNING, "hvd_adam"):
        assert [type(layer) for layer in convert(model, strict=True)] == classes
    assert not caplog.records


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_conversion_keeps_everything_that_belongs_to_a_layer(options):
    layer = nn.BatchNorm3d(3, eps=1e-2, dtype=torch.float64, device="meta", **options).eval()
    layer.requires_grad_(False)
    layer.note = ["an attribute"]
    hooks = [
        layer.register_forward_pre_hook(lambda *_: None),
        layer.register_forward_hook(lambda *_: None),
        layer.register_full_backward_hook(lambda *_: None),
        layer.register_state_dict_pre_hook(lambda *_: None),
        layer._register_state_dict_hook(lambda *_: None),
    ]
    assert len(hooks) == 5
    before = dict(vars(layer))
    contents = {key: dict(value) for key, value in before.items() if isinstance(value, dict)}
    keys = list(layer.state_dict())
    model = nn.ModuleDict({"a": layer, "again": layer})
    convert(model)
    after = dict(vars(layer))
    assert after.pop("collective_name") == "hvd_adam.batchnorm.a"
    assert {key: id(value) for key, value in after.items()} == {key: id(value) for key, value in before.items()}
    for key, value in contents.items():
        assert {k: id(v) for k, v in after[key].items()} == {k: id(v) for k, v in value.items()}
    assert list(layer.state_dict()) == keys
    assert model["a"] is model["again"] is layer
    assert layer._version == nn.BatchNorm3d._version


@on_ranks(2)
def test_converted_layers_are_still_found_by_class_and_check_dimensions(cluster):
    for cls, dims in ((nn.BatchNorm1d, (2, 3)), (nn.BatchNorm2d, (4,)), (nn.BatchNorm3d, (5,))):
        layer, plain = convert(cls(3)), cls(3)
        assert isinstance(layer, cls)
        assert isinstance(layer, SyncBatchNorm)
        for mode in (True, False):
            for dim in range(1, 7):
                if dim not in dims:
                    for each in (layer.train(mode), plain.train(mode)):
                        with pytest.raises(ValueError, match="expected"):
                            each(torch.ones([3] * dim))


def test_converting_twice_and_copies_change_nothing():
    model = convert(convert(small_model()))
    twin = copy.deepcopy(model)
    assert [type(layer) for layer in twin] == [type(layer) for layer in model]
    assert twin[1].collective_name == "hvd_adam.batchnorm.1"
    root = nn.BatchNorm1d(3)
    assert convert(root) is root
    assert type(root) is SyncBatchNorm1d


@on_ranks(2)
def test_pruned_and_parametrized_layers_are_synchronized(cluster):
    model, oracle = nn.BatchNorm2d(2).double(), nn.BatchNorm2d(2).double()
    for layer in (model, oracle):
        prune.l1_unstructured(layer, "bias", amount=1)
    convert(model)
    for layer in (model, oracle):
        parametrized(layer)  # after the conversion
    (batch, *_) = whole_batches(8)
    ours, theirs = model(batch.chunk(2)[cluster.rank]), oracle(batch).chunk(2)[cluster.rank]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@on_ranks(2)
def test_a_second_derivative_is_refused_instead_of_missing_terms(cluster):
    layer, x = convert(nn.BatchNorm1d(3)), torch.randn(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.pow(2).sum().backward()


@pytest.mark.multirank
def test_train_refuses_to_synchronize_a_derived_class(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Norm(torch.nn.BatchNorm2d):\n"
        "    def forward(self, x): return super().forward(x).relu()\n"
        "def build(in_channels, num_classes, image_size):\n"
        "    return torch.nn.Sequential(Norm(in_channels), torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    done = train("--max-steps", 1, "--model", "mine:build", "--sync-batchnorm", cwd=tmp_path)
    assert "--sync-batchnorm: batch normalization that is not synchronized" in one_line(done)
    assert "0 (Norm)" in done.stderr
