"""What evidence about kernels shares: the device a test runs on."""

import contextlib

import pytest

with contextlib.suppress(ModuleNotFoundError):  # pytest reads this for evaluations, too, which need no hypothesis
    from suites.checks import examples  # noqa: F401


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], scope="session")
def device(request):
    """Every check runs twice: in Triton's interpreter on the CPU, and (marker gpu) on a GPU."""
    import torch

    from kvsuite.kernels.triton.launch import interpreting

    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        return torch.device("cuda")
    if not interpreting():
        pytest.skip("this machine has a GPU: the interpreter needs TRITON_INTERPRET=1")
    return torch.device("cpu")
