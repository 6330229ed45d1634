"""Every type of causal model that transformers knows, in its default configuration: exact, or why not.

``python -m suites.checks.sweep`` writes ``docs/models.md`` from it.
"""

import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvsuite import configs
from kvsuite.engines import twin
from kvsuite.errors import UsageError, first_line

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """# Which models kvsuite answers with

Before a model of your own is used, kvsuite makes a *twin* of it: its configuration with few and small layers, a window
of 8 tokens and random weights. The twin's logits on kvsuite's cache must be those of transformers' eager attention, for
a prompt and for tokens decoded one by one. Otherwise the run ends with one sentence and exit code 4, before the weights
are read. So this table decides nothing. It says what came out for the default configuration of each causal type.
`python -m suites.checks.sweep` has written it with transformers {version}.

A method may ask for more than its model has: those that move keys need RoPE in Llama's layout, and no selector acts in
a layer with a sliding window. Such a method is refused by name, also before the weights are read. A model that reads
images or sound is given text alone. The default configurations of `dbrx`, `cohere_compass_text`, `reformer` and `xmod`
are none that transformers itself runs as a decoder.

"""


LACKING = {
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 2, "moe_topk": 1},
    "lfm2_moe": {"layer_types": ["full_attention"] * 32},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}
"""What some default configurations lack, with which transformers itself builds no model."""


def outcome(kind):
    """Why a type of model is refused, in one sentence; empty where it is exact."""
    try:
        config = AutoConfig.for_model(kind, **LACKING.get(kind, {}))
    except Exception as error:  # whatever its validators say
        return f"transformers builds no default configuration: {first_line(error)}"
    try:
        configs.refuse(config.to_dict())
        twin.check(config)
    except UsageError as error:
        return str(error)
    return ""


def main():
    """Write the page."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {kind: outcome(kind) for kind in TYPES}
    exact = [kind for kind, why in found.items() if not why]
    lines = [f"## Exact: {len(exact)} types\n", ", ".join(f"`{kind}`" for kind in exact), ""]
    lines += [f"## Refused: {len(found) - len(exact)} types\n", "| type | why |", "|---|---|"]
    lines += [f"| `{kind}` | {why.replace('|', chr(92) + '|')} |" for kind, why in found.items() if why]
    PAGE.write_text(HEAD.format(version=transformers.__version__) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
