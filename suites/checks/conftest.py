"""What the checks share: one thread, a tiny random model and its layers."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from suites.checks import examples  # noqa: F401
from suites.checks.packaged import installed, wheel  # noqa: F401  (fixtures)
from suites.checks.tiny import finished, go, kept, run, world  # noqa: F401  (fixtures)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def alone():
    """pytest in a child process is to know nothing of the workers that these checks may be spread over."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
        del os.environ[name]


@pytest.fixture(scope="session")
def tiny_llama():
    """4 query heads, 2 kv heads, head_dim 32, 2 layers, vocabulary 128, float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
