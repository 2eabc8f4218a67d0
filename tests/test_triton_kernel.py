"""The kernels for GPUs on a machine without one: run by Triton's interpreter, and compiled ahead of time.

Hazards: arithmetic that differs from the expression that CPUs compile; writes beyond the end of a buffer; a NaN
that is not skipped, or changes buffers, step counts or the count of skipped updates; memory accesses narrower than
16 bytes; Triton versions that refuse the source.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.on_ranks import on_ranks
from helpers.one_if_finite import check_one_if_finite
from helpers.skipping import check_skipping, made, update

ROOT = Path(__file__).parents[1]
TRITON_DIR = Path(sys.prefix) / "triton"  # where launch/setup.sh --dev installs it if torch has none

paths = [str(path) for path in (TRITON_DIR, ROOT, ROOT / "tests") if path.exists()]
ENVIRON = {"PYTHONPATH": os.pathsep.join(paths)}
INTERPRETED = {**ENVIRON, "TRITON_INTERPRET": "1"}

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None and not TRITON_DIR.exists(),
        reason=f"neither Triton here nor in {TRITON_DIR}: `bash launch/setup.sh --dev` installs it",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is not None and importlib.util.find_spec("triton.backends") is None,
        reason="this Triton, older than 3.0, has another interpreter and another compiler",
    ),
]


def run(*argv, **environ):
    done = subprocess.run(
        [sys.executable, *argv], env={**os.environ, **environ}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def marks(request):
    """The option -m of this run, with which hypothesis draws fewer cases, for a run within it."""
    chosen = request.config.option.markexpr
    return ["-m", chosen] if chosen else []


@pytest.mark.slow
def test_interpreted_kernel_passes_the_tests_of_adam(marks):
    # Without what only repeats updates with other numbers, and takes long here.
    repeats = "too_small_for_nearest or betas1 or betas2 or True-torch.bfloat16 or False-torch.float16"
    chosen = f"(fused or test_update_rows or shards) and not ({repeats})"
    options = "-q -p helpers.interpreted -p no:cacheprovider -W ignore::RuntimeWarning".split()
    tests = [f"tests/test_{name}.py" for name in ("adam", "update_rows", "bucket_layout")]
    output = run("-m", "pytest", *options, *marks, "-k", chosen, *tests, **INTERPRETED)
    assert int(output.rpartition(" passed")[0].split()[-1]) > 100, output


@pytest.mark.slow
def test_interpreted_kernels_for_state_in_few_bits_pass_the_tests_of_those_for_cpus():
    options = "-q -p helpers.interpreted -p no:cacheprovider -W ignore::RuntimeWarning".split()
    chosen = ["-k", "implementations_agree or exchanged_with_torch or (8_bit_masters and fused)"]
    output = run("-m", "pytest", *options, *chosen, "tests/test_state_formats.py", **INTERPRETED)
    assert output.rpartition(" passed")[0].split()[-1] == "5", output


@pytest.mark.slow
def test_interpreted_kernels_for_codes_pass_the_tests_of_those_for_cpus():
    options = "-q -p helpers.interpreted -p no:cacheprovider -W ignore::RuntimeWarning".split()
    chosen = ["-m", "not gpu", "-k", "bits_of_codec_py or beyond_the_end or send_nothing"]  # the others take long
    output = run("-m", "pytest", *options, *chosen, "tests/test_codec_kernels.py", **INTERPRETED)
    assert output.rpartition(" passed")[0].split()[-1] == "5", output


@pytest.fixture(scope="module")
def compiled_ahead():
    return json.loads(run("tests/helpers/compiled_ahead.py", **ENVIRON))


def test_kernel_compiles_for_hopper_to_accesses_of_16_bytes(compiled_ahead):
    """In whole blocks of aligned tensors; the last block of a tensor, and tensors elsewhere, have narrow ones."""
    for name, case in compiled_ahead["cases"].items():
        assert case["bytes"] > 1000, name
        assert case["wide"] == case["expected"], name


def test_kernels_for_codes_compile_for_hopper_to_operations_that_are_rounded_one_by_one(compiled_ahead):
    allowed = {"add.rn.f32", "div.rn.f32", "mul.rn.f32", "sub.rn.f32"}
    for name, case in compiled_ahead["codecs"].items():
        assert set(case["arithmetic"]) <= allowed, name
        assert case["wide"] == {kind: count for kind, count in case["expected"].items() if count}, name


def test_repeated_launches_have_the_form_of_the_first_and_the_numbers_of_their_step():
    """With Triton's driver replaced: without a GPU a launch can only be recorded."""
    launches = json.loads(run("tests/helpers/recorded_launches.py", **ENVIRON))
    assert len(launches) == 6
    assert len({(launch["grid"], launch["stream"], launch["given"]) for launch in launches}) == 1
    for step, launch in enumerate(launches[:3], start=1):
        assert launch["step"] == step
        root = (1 - 0.999**step) ** 0.5
        assert launch["step_size"] == pytest.approx(1e-3 * root / (1 - 0.9**step), rel=1e-12)
    assert all(launch["step"] == 0 for launch in launches[3:])  # groups differ: their numbers are in a table


def use_interpreted_kernel():
    """Makes this process update with the interpreted kernel, which skips NaN without telling the host."""
    import helpers.interpreted  # noqa: F401


@pytest.mark.slow
@on_ranks(0, **INTERPRETED)
def test_kernel_neither_reads_nor_writes_beyond_the_end_of_a_tensor(cluster):
    use_interpreted_kernel()
    from hvd_adam import Adam

    kinds = ("param", "grad", "exp_avg", "exp_avg_sq")
    around = [
        {kind: torch.full((elements + 32,), float("nan")) for kind in kinds}
        for elements in (1, 15, 16, 1023, 1024, 1025, 2600)
    ]
    params = [torch.nn.Parameter(places["param"][16:-16].fill_(0.5)) for places in around]
    optimizer = Adam(params, implementation="fused")
    for p, places in zip(params, around, strict=True):
        p.grad = places["grad"][16:-16].fill_(0.5)
        optimizer.state[p].update({kind: places[kind][16:-16].fill_(0.5) for kind in kinds[2:]})
    optimizer.step()
    for p, places in zip(params, around, strict=True):
        assert all(place.isnan().sum() == 32 for place in places.values()), p.numel()
        assert (p != 0.5).all()


@on_ranks(0, **INTERPRETED)
def test_kernel_for_state_in_few_bits_skips_on_the_device_and_writes_nothing_beyond_the_end(cluster):
    use_interpreted_kernel()
    from hvd_adam import Adam

    for options in ({"state_format": "8bit"}, {"state_format": "bfloat16"}):
        around = torch.full((4099 + 32,), float("nan"))
        p = torch.nn.Parameter(around[16:-16].view(1, -1))  # the last block has 3 elements
        torch.nn.init.constant_(p, 0.5)
        optimizer = Adam([p], implementation="fused", **options)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert around.isnan().sum() == 32
        before = [t.clone() for t in (p, *optimizer.state[p].values())]
        optimizer._store.update(optimizer.param_groups, optimizer.state, torch.tensor(float("nan")))
        optimizer._store.undo_step_counts()
        assert all(map(torch.equal, before, (p, *optimizer.state[p].values())))
        optimizer.step()
        assert p.max() < 0.499


@on_ranks(0, **INTERPRETED)
def test_elements_that_are_not_finite_are_found_at_any_place(cluster):
    use_interpreted_kernel()
    check_one_if_finite(torch.device("cpu"), dtypes=(torch.float32, torch.float64), lengths=(1, 17, 1025))


@on_ranks(0, **INTERPRETED)
def test_update_skipped_on_the_device_changes_nothing(cluster):
    use_interpreted_kernel()
    check_skipping(cluster, {})
    check_skipping(cluster, {"accumulate": 2, "max_grad_norm": 1.0})


@on_ranks(2, **INTERPRETED)
def test_update_skipped_on_the_device_changes_nothing_on_two_ranks_and_sharded(cluster):
    use_interpreted_kernel()
    check_skipping(cluster, {})
    check_skipping(cluster, {"strategy": "sharded", "max_grad_norm": 1.0})


@on_ranks(0, **INTERPRETED)
def test_update_skipped_on_the_device_is_read_later_and_counted_once(cluster):
    use_interpreted_kernel()
    model, optimizer = made()
    for factor in (1.0, float("nan"), 1.0, float("inf"), float("nan")):
        update(model, optimizer, factor)
    assert optimizer._step.skips._count == 2  # the flag of the last one has not been read
    assert optimizer.skipped
    steps = [entry["step"].item() for entry in optimizer.state_dict()["state"].values()]
    assert steps == [2] * 4
    assert optimizer.skipped_updates == 3
    plain, other = made()
    for _ in range(2):
        update(plain, other)
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))


@on_ranks(0, **INTERPRETED)
def test_skipped_update_does_not_change_the_step_count_of_a_state_loaded_after_it(cluster):
    use_interpreted_kernel()
    model, optimizer = made()
    update(model, optimizer)
    saved = optimizer.state_dict()
    update(model, optimizer, float("nan"))
    optimizer.load_state_dict(saved)
    update(model, optimizer)
    assert {entry["step"].item() for entry in optimizer.state_dict()["state"].values()} == {2}
    assert optimizer.skipped_updates == 1


@on_ranks(0, **INTERPRETED)
def test_loss_scaling_skips_and_halves_the_scale(cluster):
    use_interpreted_kernel()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model, optimizer = made(loss_scaler=scaler)
    for factor, scale in ((1.0, 8.0), (float("inf"), 4.0), (1.0, 4.0)):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 6)).square().sum() * factor).backward()
        optimizer.step()
        assert scaler.get_scale() == scale
    assert optimizer.skipped_updates == 1
    assert all(p.isfinite().all() for p in model.parameters())
