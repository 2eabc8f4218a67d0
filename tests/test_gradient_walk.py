"""docs/architecture.md lists the calls that a gradient passes from hook to kernel: these, in this order."""

import re
import sys
from pathlib import Path

import pytest
import torch
from helpers.on_ranks import on_ranks
from helpers.strategies import each_strategy

import hvd_adam
from hvd_adam import Adam, distribute

PACKAGE = str(Path(hvd_adam.__file__).parent)
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"


def walk():
    """Returns the calls on the page: numbered lines that begin with a name in code style."""
    section = PAGE.read_text().partition("**The walk of a gradient**")[2].partition("**The last bucket**")[0]
    return re.findall(r"^\d+\. `([\w.]+)`", section, flags=re.MULTILINE)


def test_the_walk_is_at_most_twelve_calls_long():
    assert 8 <= len(walk()) <= 12


@on_ranks(2)
@each_strategy
def test_a_gradient_passes_the_calls_of_the_page_in_their_order(cluster, strategy):
    if sys.version_info < (3, 11):
        pytest.skip("needs the qualified names of code objects, which Python 3.11 has")
    torch.manual_seed(0)
    # Two buckets: the gradient of the second weight is sent while backward is running.
    model = torch.nn.Sequential(torch.nn.Linear(1500, 1500), torch.nn.Linear(1500, 1500))
    optimizer = distribute(Adam(model.parameters(), implementation="fused"), model, strategy=strategy)
    called = []

    def record(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            called.append(frame.f_code.co_qualname)

    for profile in (None, record):  # the first step compiles
        optimizer.zero_grad()
        sys.setprofile(profile)
        model(torch.ones(2, 1500)).sum().backward()
        optimizer.step()
        sys.setprofile(None)
    remaining = iter(called)
    missing = [name for name in walk() if not any(name == other for other in remaining)]
    assert not missing
