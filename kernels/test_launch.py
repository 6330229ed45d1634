"""Launching: what is recorded is not run, what runs is what was recorded."""

import torch
import triton
import triton.language as tl

from kvsuite.kernels.triton.launch import launch, recording


@triton.jit
def _double(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    tl.store(x_ptr + at, x * 2, mask=at < n)


def test_a_recorded_launch_does_not_run_until_it_is_asked_to(device):
    x = torch.arange(40.0, device=device)
    with recording() as found:
        launch(_double, (3,), {"x_ptr": x, "n": 40}, {"BLOCK": 16})
    assert torch.equal(x.cpu(), torch.arange(40.0))
    found[0].run()
    assert torch.equal(x.cpu(), torch.arange(40.0) * 2)


def test_an_empty_grid_is_nothing_to_do(device):
    launch(_double, (0,), {"x_ptr": torch.zeros(1, device=device), "n": 1}, {"BLOCK": 16})
