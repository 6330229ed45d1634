"""Which dtype a model computes in, and why."""

import pytest
import torch

from kvsuite.engines import precision


@pytest.fixture
def seconds(monkeypatch):
    """What the measurement is to find, by dtype."""
    found = {}
    monkeypatch.setattr(precision, "_measure", lambda layer, dtypes: {dtype: found[dtype] for dtype in dtypes})
    return found


def test_the_faster_dtype_computes(tiny_llama, seconds):
    model = tiny_llama.to(torch.bfloat16)
    try:
        seconds.update({torch.bfloat16: 5.0, torch.float32: 1.0})
        assert precision.compute_dtype(model, "auto") == (
            torch.float32,
            "measured here: bfloat16 is 5.0 times slower than float32",
        )
        seconds.update({torch.bfloat16: 0.5})
        assert precision.compute_dtype(model, "auto") == (
            torch.bfloat16,
            "measured here: bfloat16 is 2.0 times faster than float32",
        )
        assert precision.compute_dtype(model, "float32") == (torch.float32, "--kv-dtype float32")
    finally:
        tiny_llama.float()


def test_a_checkpoint_in_float32_stays_so(tiny_llama, seconds):
    assert precision.compute_dtype(tiny_llama, "auto")[0] == torch.float32


def test_both_dtypes_are_measured_on_one_thread(monkeypatch):
    """On two, beside other work, their waiting was measured: 1.2 times faster instead of 6 times slower."""
    layer, linear, seen, threads = torch.nn.Linear(32, 64), torch.nn.functional.linear, set(), torch.get_num_threads()
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w: (seen.add((x.dtype, torch.get_num_threads())), linear(x, w))[1]
    )
    torch.set_num_threads(2)
    try:
        found = precision._measure(layer, (torch.bfloat16, torch.float32))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen == {(torch.bfloat16, 1), (torch.float32, 1)}
    assert set(found) == {torch.bfloat16, torch.float32}
    assert all(value > 0 for value in found.values())
