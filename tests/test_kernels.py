"""The compiled update and its cache on disk, mostly in subprocesses.

Hazards covered:
- something that changes from step to step, or that a user may change, compiles a kernel again;
- modes of the process (default dtype, disabled torch.compile, deterministic algorithms) change results;
- two processes of a host compile the same kernel, or wait for each other forever;
- a cache that is damaged, or was left by a killed process, changes results or stops a run;
- without compiler, home or writable directory the optimizer fails instead of using foreach;
- the scalars lose accuracy; stochastic rounding depends on where a tensor begins.
"""

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers.forked_python import forked_python

from hvd_adam import Adam
from hvd_adam.optim import expression
from hvd_adam.optim.kernels import cpp_compiler, kernel_cache

ROOT = Path(__file__).parents[1]

RUN = """
import json, sys, warnings
import torch
from hvd_adam.optim.adam import Adam

def train(implementation):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 50))
    optimizer = Adam([p], implementation=implementation)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        p.grad = torch.cos(p.detach() * (step + 1))
        optimizer.step()
    return p.tolist()

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fused = train("fused")
print(json.dumps({
    "fused": fused,
    "foreach": train("foreach"),
    "torch.compile": "torch._dynamo" in sys.modules,
    "warnings": [f"{w.category.__name__}: {w.message}" for w in caught if "hvd_adam" in str(w.message)],
}))
"""


def start(cache, code=RUN, *arguments, forked=True, **environment):
    """Starts a process that runs `code` with its kernel cache below `cache`, or with this user's if it is None.

    With forked=False it is a new process, not a fork of one that has imported PyTorch.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    if cache is not None:
        environment["XDG_CACHE_HOME"] = str(cache)
    return subprocess.Popen(
        [forked_python() if forked else sys.executable, "-c", code, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process):
    output, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def assert_right(result):
    """Compares 100 steps of float32 in two orders of the same operations."""
    assert result["warnings"] == []
    # Each step adds some ten roundings of numbers below 2 and moves by at most the rate; gradients follow the
    # parameter and may enlarge an error (cos(t x) has the slope t, the rate falls with 1/t): 1e-3 leaves room.
    torch.testing.assert_close(torch.tensor(result["fused"]), torch.tensor(result["foreach"]), rtol=0, atol=1e-3)


def kernels_directory(cache):
    (directory,) = (Path(cache) / "hvd_adam" / "kernels").iterdir()
    return directory


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A cache with the kernel of RUN, and the output of the run that compiled it."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, finish(start(cache, forked=False))


# --- compilations -----------------------------------------------------------------------------------------


def test_100_steps_with_a_changing_learning_rate_compile_one_kernel_without_torch_compile(warm):
    cache, result = warm
    assert_right(result)
    assert not result["torch.compile"]
    assert len(list(kernels_directory(cache).glob("*.so"))) == 1


def logging_compiler(directory, before=":"):
    """Returns a C++ compiler that appends $WHO to directory/log for each file that it compiles."""
    script = directory / "c++"
    compiler = shutil.which("g++") or shutil.which("c++")
    log = f'echo "$WHO" >> "{directory}/log"; {before}'
    script.write_text(f'#!/bin/sh\n{log}\nexec "{compiler}" "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="needs a C++ compiler")
def test_of_two_concurrent_processes_one_compiles_and_both_have_right_results(tmp_path):
    compiler = logging_compiler(tmp_path)
    processes = [start(tmp_path / "cache", CXX=compiler, WHO=who) for who in ("first", "second")]
    results = [finish(process) for process in processes]
    for result in results:
        assert_right(result)
    assert results[0]["fused"] == results[1]["fused"]
    assert len(set((tmp_path / "log").read_text().split())) == 1


MODES = """
import hashlib, json, sys, warnings
import torch
from hvd_adam.optim.adam import Adam

warnings.simplefilter("error", RuntimeWarning)  # without a kernel it would be foreach, whose bits differ
DTYPES = {"default": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "float16": torch.float16}

def train(dtype, **options):
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(1000, generator=generator, dtype=torch.float64).to(dtype))
    optimizer = Adam([p], lr=1e-2, weight_decay=0.1, implementation="fused", **options)
    for step in range(20):
        p.grad = torch.randn(1000, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.step()
    return hashlib.sha256(str(p.double().tolist()).encode()).hexdigest()

torch.set_default_dtype(DTYPES[sys.argv[1]])
if sys.argv[1] == "default":
    torch.use_deterministic_algorithms(True)
halves = {name: DTYPES[name] for name in ("bfloat16", "float16")}
cases = {name: (dtype, {}) for name, dtype in DTYPES.items()}
cases |= {f"{name}, amsgrad": (dtype, {"amsgrad": True}) for name, dtype in DTYPES.items()}
cases |= {f"{name}, masters": (dtype, {"master_weights": True}) for name, dtype in halves.items()}
cases["bfloat16, stochastic"] = (torch.bfloat16, {"stochastic_rounding": True})
print(json.dumps({case: train(dtype, **options) for case, (dtype, options) in cases.items()}))
"""


@pytest.fixture(scope="module")
def expected():
    """What MODES computes, by case, in a process without a special mode."""
    return finish(start(None, MODES, "default"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "float16"])
def test_the_default_dtype_changes_no_bit(dtype, expected):
    """Kernels and their arguments must not depend on it: masters were wrong, float64 crashed."""
    assert finish(start(None, MODES, dtype)) == expected


@pytest.mark.parametrize("variable", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_without_torch_compile_no_bit_changes(variable, expected):
    assert finish(start(None, MODES, "default", forked=False, **{variable: "1"})) == expected


MANY = """
import json, warnings
from itertools import product
import torch
from hvd_adam.optim.adam import Adam

warnings.simplefilter("error", RuntimeWarning)
p = torch.nn.Parameter(torch.ones(100))
optimizer = Adam([p], implementation="fused")

def step():
    p.grad = torch.ones(100, dtype=torch.float32)
    optimizer.step()

for threads in range(1, 13):
    torch.set_num_threads(threads)
    step()
torch.set_default_dtype(torch.float64)
step()
torch.use_deterministic_algorithms(True)
step()
with torch.autocast("cpu", dtype=torch.bfloat16):
    step()
for elements in (1, 2, 6, 15, 16, 17):
    q = torch.nn.Parameter(torch.ones(elements, dtype=torch.float32))
    small = Adam([q], implementation="fused")
    q.grad = torch.ones(elements, dtype=torch.float32)
    small.step()
specs = 0
for dtype, amsgrad, decay in product((torch.float32, torch.float64), (False, True), (0.0, 0.1)):
    for decoupled in (False, True):
        q = torch.nn.Parameter(torch.ones(9, dtype=dtype))
        each = Adam([q], weight_decay=decay, amsgrad=amsgrad, decoupled_weight_decay=decoupled,
                    implementation="fused")
        q.grad = torch.ones(9, dtype=dtype)
        each.step()
        specs += 1
        assert abs(q[0].item() - (0.999 - 1e-4 * decoupled * (decay > 0))) < 1e-6, (dtype, amsgrad, decay)
print(json.dumps({"last": p[0].item(), "specs": specs}))
"""


def test_threads_modes_lengths_and_specs_may_change_in_one_process():
    result = finish(start(None, MANY))
    # 15 steps of constant gradient, each of the rate 1e-3, and some roundings of 2^-24 each.
    assert result["last"] == pytest.approx(1 - 15e-3, abs=15 * 8 * 2**-24)
    assert result["specs"] == 16


# --- damaged and missing caches ------------------------------------------------------------------------------


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def emptied(path):
    os.truncate(path, 0)


def garbage(path):
    path.write_bytes(bytes(range(1, 256)) * (path.stat().st_size // 255 + 1))


@pytest.mark.parametrize("damage", [truncated, emptied, garbage], ids=lambda f: f.__name__)
def test_cache_with_every_file_damaged_does_no_harm(warm, tmp_path, damage):
    shutil.copytree(warm[0], tmp_path / "cache")
    files = [p for p in kernels_directory(tmp_path / "cache").iterdir() if p.name != "lock"]
    assert {path.suffix for path in files} == {".sha256", ".so"}
    for path in files:
        damage(path)
    assert_right(finish(start(tmp_path / "cache")))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="needs a C++ compiler")
def test_damaged_kernel_is_compiled_again_and_the_others_are_kept(tmp_path):
    compiler = logging_compiler(tmp_path)
    double = RUN.replace("50))", "50, dtype=torch.float64))")
    for who, code in (("single", RUN), ("double", double)):
        assert_right(finish(start(tmp_path / "cache", code, CXX=compiler, WHO=who)))
    (damaged,) = kernels_directory(tmp_path / "cache").glob("*float32*.so")
    truncated(damaged)
    for who, code in (("single again", RUN), ("double again", double)):
        assert_right(finish(start(tmp_path / "cache", code, CXX=compiler, WHO=who)))
    assert (tmp_path / "log").read_text().splitlines() == ["single", "double", "single again"]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="needs a C++ compiler")
def test_process_killed_while_compiling_does_no_harm_to_the_next(tmp_path):
    for name in ("begun", "never"):
        os.mkfifo(tmp_path / name)
    compiler = logging_compiler(tmp_path, before=f'echo > "{tmp_path}/begun"; read _ < "{tmp_path}/never"')
    killed = start(tmp_path / "cache", forked=False, CXX=compiler, WHO="killed")
    (tmp_path / "begun").read_text()  # returns when the compiler runs
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    directory = kernels_directory(tmp_path / "cache")
    (directory / "adam-old.partial").touch()  # as a compiler that was killed later leaves it
    assert not list(directory.glob("*.so"))
    assert_right(finish(start(tmp_path / "cache")))
    assert not list(directory.glob("*.partial"))
    assert len(list(directory.glob("*.so"))) == 1


def test_without_a_compiler_it_warns_once_and_has_the_results_of_foreach(tmp_path):
    (tmp_path / "bin").mkdir()
    result = finish(start(tmp_path, CXX="/nonexistent/c++", PATH=str(tmp_path / "bin")))
    assert result["fused"] == result["foreach"]
    (warning,) = result["warnings"]
    assert warning.startswith("RuntimeWarning: hvd_adam: no fused update here, using foreach (")
    assert "\n" not in warning
    assert "compiler" in warning.lower()


def test_a_compiler_that_hangs_and_a_lock_that_stays_held_end_in_bounded_time(tmp_path, monkeypatch):
    monkeypatch.setattr(cpp_compiler, "COMPILE_SECONDS", 0.2)
    monkeypatch.setattr(kernel_cache, "LOCK_SECONDS", 0.2)
    monkeypatch.setattr(kernel_cache, "cache_dir", lambda: tmp_path)
    (tmp_path / "c++").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "c++").chmod(0o700)
    (tmp_path / "empty.cpp").touch()
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.raises(RuntimeError, match=r"the C\+\+ compiler has not ended after 0.2 s: .*c\+\+"):
        cpp_compiler.compile_library("empty", tmp_path / "empty.cpp", {})
    with (
        FileLock(tmp_path / "lock"),
        pytest.raises(RuntimeError, match=r"another process has held .*lock for 0\.2 s"),
    ):
        cpp_compiler.compile_library("empty", tmp_path / "empty.cpp", {})


def test_unwritable_cache_directory_does_no_harm(tmp_path):
    (tmp_path / "file").touch()
    below = str(tmp_path / "file" / "below")
    assert_right(finish(start(below, HOME=below)))


def test_user_without_home_gets_a_temporary_directory(tmp_path, monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    directory = kernel_cache.cache_dir.__wrapped__()
    assert directory.parent == tmp_path


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decoupled", [False, True])
def test_scalars_give_the_papers_update(dtype, decoupled):
    for step, betas in product((1, 2, 10, 1000, 2**24), ((0.9, 0.999), (0.0, 0.0), (0.5, 0.0), (0.99, 0.9999))):
        group = dict(lr=0.01, betas=betas, eps=1e-8, weight_decay=0.1, decoupled_weight_decay=decoupled)
        decay, one_minus_beta1, beta2, one_minus_beta2, size, eps = (
            torch.tensor(expression.scalars(group, step), dtype=torch.float64).to(dtype).tolist()
        )
        # Rounded once to `dtype` after some operations in float64; 1 - beta**step cancels to at least 1e-4.
        exactly = dict(rel=torch.finfo(dtype).eps + 1e-11, abs=0)
        assert decay == pytest.approx(-0.001 if decoupled else 0.1, **exactly)
        assert (one_minus_beta1, one_minus_beta2) == pytest.approx((1 - betas[0], 1 - betas[1]), **exactly)
        assert beta2 == pytest.approx(betas[1], **exactly)
        for m, v in ((0.3, 0.2), (-1e-6, 1e-20)):
            m_hat, v_hat = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
            papers = 0.01 * m_hat / (v_hat**0.5 + 1e-8)
            ours = size * m / (v**0.5 + eps)
            assert ours == pytest.approx(papers, rel=2 * torch.finfo(dtype).eps + 1e-11, abs=0)


def test_stochastic_rounding_keeps_values_that_are_not_finite_or_exact():
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.5, -3.0e38])
    for number in range(100):
        rounded = expression.round_stochastically(x, torch.tensor(number * 9973))
        assert rounded[:2].tolist() == [float("inf"), -float("inf")]
        assert rounded[2].isnan()
        assert rounded[3:6].tolist() == [0.0, 0.0, 1.5]
        assert rounded[4].signbit()


def test_stochastic_rounding_is_unbiased_for_every_sign_and_fraction():
    n = 1 << 16
    for sign, fraction in product((1, -1), (1 / 65536, 0.1, 0.5, 0.9, 65535 / 65536)):
        x = torch.full((n,), sign * (1 + fraction * 2**-7))
        rounded = expression.round_stochastically(x, torch.tensor(12345)).double()
        assert set(rounded.tolist()) <= {sign * 1.0, sign * (1 + 2**-7)}
        exact = (abs(x[0].double().item()) - 1) * 2**7
        # Of n draws with this probability; the smallest probabilities give about one hit.
        sigma = (exact * (1 - exact) / n) ** 0.5
        assert abs((rounded.abs() - 1).mean().item() * 2**7 - exact) <= 6 * sigma + 1 / n


def test_stochastic_rounding_uses_the_same_bits_wherever_a_buffer_is_split():
    x = torch.linspace(-3, 3, 1000)
    for first in (0, 12345, 2**31 - 500):  # the last one passes the end of the seeds on its way
        whole = expression.round_stochastically(x, torch.tensor(first))
        for cut in (16, 496, 512, 800):
            rest = expression.round_stochastically(x[cut:], torch.tensor((first + cut) % 2**31))
            assert torch.equal(whole[cut:], rest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_master_is_replaced_only_where_its_parameter_has_changed(dtype):
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(10000, generator=generator) * torch.logspace(-12, 4, 10000)
    master = torch.cat([master, torch.tensor([0.0, 3e38, float("inf"), float("nan")])])
    p = master.to(dtype)
    assert torch.equal(expression.current_master(p, master).nan_to_num(), master.nan_to_num())
    changed = torch.where(torch.arange(len(p)) % 2 == 0, torch.tensor(0.25, dtype=dtype), p)
    found = expression.current_master(changed, master)
    assert torch.equal(found[1::2].nan_to_num(), master[1::2].nan_to_num())
    # A master that rounds to 0.25 itself is as good.
    assert torch.equal(found[::2].to(dtype), changed[::2])


@pytest.mark.parametrize(
    ("tensors", "elements", "chosen"), [(63, 8, "foreach"), (64, 8, "fused"), (1, 1 << 20, "fused")]
)
def test_auto_fuses_many_elements_and_many_tensors(tensors, elements, chosen):
    params = [torch.nn.Parameter(torch.ones(elements)) for _ in range(tensors)]
    frozen = torch.nn.Parameter(torch.ones(1 << 20), requires_grad=False)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = Adam([*params, frozen])
    optimizer.step()
    assert optimizer._store.implementations == [chosen]


@pytest.mark.parametrize(
    ("options", "shape", "chosen"),
    [
        ({"state_format": "8bit"}, (64, 64), "fused"),
        ({"state_format": "bfloat16"}, (64, 64), "fused"),
        ({"state_format": "8bit"}, (4096,), "foreach"),  # as every vector, held as float32
        ({"master_weights": "8bit"}, (64, 64), "fused"),
        ({"master_weights": True}, (64, 64), "foreach"),
    ],
    ids=str,
)
def test_auto_fuses_state_in_few_bits_at_every_size(options, shape, chosen):
    p = torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = Adam([p], **options)
    optimizer.step()
    assert optimizer._store.implementations == [chosen]
