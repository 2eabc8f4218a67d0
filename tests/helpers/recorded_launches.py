"""Steps of the fused Adam with Triton's driver replaced by one that records launches; prints them as JSON.

For a machine without a GPU: the kernel is compiled for compute capability 9.0, and never run.

python tests/helpers/recorded_launches.py
"""

import json

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hvd_adam import Adam
from hvd_adam.optim import fused
from hvd_adam.optim.kernels import triton_kernel, triton_launch

LAUNCHES = []


class Launcher:
    """Takes the place of the C function that Triton compiles for a kernel's signature."""

    def __init__(self, source, metadata):
        pass

    def __call__(self, grid_0, grid_1, grid_2, stream, function, metadata, launch_metadata, enter, leave, *given):
        names = triton_kernel.adam.arg_names
        LAUNCHES.append({"grid": grid_0, "stream": stream, "given": len(given)})
        LAUNCHES[-1] |= {
            name: value for name, value in zip(names, given, strict=False) if isinstance(value, float)
        }


class Utilities:
    """What Triton asks of the driver when it loads a kernel."""

    def load_binary(self, *arguments):
        return 1, 2, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 200_000}


class Driver:
    """A driver without a device."""

    launcher_cls, utils = Launcher, Utilities()

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def main():
    """Makes three steps with one group and three with two that have different learning rates."""
    driver.set_active(Driver())
    fused._compile_verified = triton_launch.kernel  # whose results nobody computes here
    fused.register_backend("cpu", fused.Backend(triton_launch.kernel))
    params = [torch.nn.Parameter(torch.ones(3000)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    for groups in ([{"params": params}], [{"params": params[:1]}, {"params": params[1:], "lr": 1e-2}]):
        optimizer = Adam(groups, implementation="fused")
        for _ in range(3):
            optimizer.step()
    print(json.dumps(LAUNCHES))


if __name__ == "__main__":
    main()
