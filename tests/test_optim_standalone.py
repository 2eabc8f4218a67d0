"""hvd_adam/optim without the rest of the project: copied to an empty directory, imported in isolated processes.

Hazards: the optimizer imports another directory of the package, Horovod, or a package of an extra; it does so only
in a step or when it compiles; `from hvd_adam import Adam` imports more than the class needs.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hvd_adam"

# What setup.cfg installs only with extras, by the names of its modules.
OPTIONAL = "horovod mpi4py psutil torchvision PIL sklearn jsonargparse yaml tqdm tensorboard matplotlib".split()

PROGRAM = '''
import json, sys, warnings
from importlib.machinery import PathFinder

root, optional, implementation = sys.argv[1], set(sys.argv[2].split()), sys.argv[3]
finders = sys.meta_path[:]

class Finder:
    """Hides what is not to be used, as if it were not installed."""

    find_distributions = PathFinder.find_distributions

    @staticmethod
    def find_spec(name, path=None, target=None):
        package, _, rest = name.partition(".")
        part = rest.partition(".")[0]
        if package in optional or (package == "hvd_adam" and part not in ("", "_version", "optim")):
            return None
        return next((spec for finder in finders if (spec := finder.find_spec(name, path, target))), None)

sys.meta_path[:] = [Finder]
sys.path.insert(0, root)
warnings.simplefilter("error", RuntimeWarning)  # a kernel that does not compile
import torch
from hvd_adam import Adam

params = [torch.nn.Parameter(torch.linspace(-1, 1, n, dtype=torch.float64)) for n in (5, 1, 40)]
expected = [torch.nn.Parameter(p.detach().clone()) for p in params]
options = dict(lr=0.01, weight_decay=0.1, amsgrad=True)
optimizers = [Adam(params, implementation=implementation, **options), torch.optim.Adam(expected, **options)]
for step in range(3):
    for optimizer, some in zip(optimizers, (params, expected)):
        for p in some:
            p.grad = torch.cos(torch.arange(p.numel(), dtype=torch.float64) + step)
        optimizer.step()
optimizers[0].load_state_dict(optimizers[1].state_dict())
optimizers[0].step()
optimizers[1].step()
torch.testing.assert_close(params, expected, rtol=1e-12, atol=1e-12)
modules = {name: module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "hvd_adam"}
print(json.dumps(modules))
'''


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A directory with nothing but the version and the optim folder of the package."""
    root = tmp_path_factory.mktemp("standalone")
    shutil.copytree(PACKAGE / "optim", root / "hvd_adam" / "optim", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "_version.py"):
        shutil.copy(PACKAGE / name, root / "hvd_adam")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "foreach", "fused"])
def test_adam_steps_without_the_other_folders_horovod_and_the_extras(copied, tmp_path, implementation):
    # -I: neither the current directory nor PYTHONPATH; installed packages are hidden by the finder.
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, str(copied), " ".join(OPTIONAL), implementation],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    modules = json.loads(done.stdout.splitlines()[-1])
    assert "hvd_adam.optim.adam" in modules
    for name, file in modules.items():
        assert name in ("hvd_adam", "hvd_adam._version") or name.startswith("hvd_adam.optim"), name
        assert Path(file).is_relative_to(copied), file
