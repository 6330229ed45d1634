"""Are greedy tokens transformers' own on real weights? ``python suites/findings/tokens.py float32 bfloat16 int8 nf4``.

The default model answers eight prompts of 64 to 1,024 tokens, 64 tokens each, from `full` on kvsuite's kernels and from
transformers' DynamicCache under SDPA, with the same weights in memory. Where the tokens part, transformers' lead of its
token over kvsuite's is printed beside the largest difference of the two sides' logits there: a lead that is not larger
is a tie of rounding. docs/findings.md has the result.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from kvsuite import models
from kvsuite.cache import adapter
from kvsuite.engines.decoder import Decoder
from kvsuite.engines.request import Request
from kvsuite.engines.transformers import TransformersEngine
from kvsuite.methods import parse

LENGTHS = (64, 96, 128, 192, 256, 384, 512, 1024)
STEPS = 64


def engine(weights: str) -> TransformersEngine:
    """The default model with such weights: a dtype, torchao's int8 in bfloat16, bitsandbytes' nf4 in float32."""
    folder = models.default_model()
    if weights in ("float32", "bfloat16"):
        return TransformersEngine.load(folder, weights)
    if weights == "int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        how, dtype = TorchAoConfig(Int8WeightOnlyConfig()), torch.bfloat16
    else:
        from transformers import BitsAndBytesConfig

        how, dtype = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32), torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=dtype, device_map="cpu")
    return TransformersEngine(model, None)


@torch.inference_mode()
def theirs(model: Any, ids: list[int]) -> list[torch.Tensor]:
    """Logits, step by step, of transformers' own greedy answer."""
    model.set_attn_implementation("sdpa")
    cache, fed, found = DynamicCache(), torch.tensor([ids]), []
    for _ in range(STEPS):
        found.append(adapter.forward(model, cache, fed)[0].float())
        fed = found[-1].argmax()[None, None]
    model.set_attn_implementation(adapter.NAME)
    return found


@torch.inference_mode()
def ours(own: TransformersEngine, ids: list[int]) -> list[torch.Tensor]:
    """The same from `full`."""
    prompt = own.prefill(Request("text", "", "", STEPS + 1), ids, [])
    decoder = Decoder(own.model, [own.worker(parse("full"), 1, [(len(ids), STEPS + 1)])], 1)
    list(decoder.admit(decoder.workers[0], prompt))
    found = [prompt.logits.float()]
    for _ in range(STEPS - 1):
        list(decoder.step())
        found.append(decoder.logits[0].float())
    return found


def main() -> None:
    """Compare, and print a line a kind of weights."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.default_model(), local_files_only=True)
    text = "\n".join(file.read_text() for file in sorted(models.messages().glob("*.txt"))[:8])
    whole = tokenizer(text)["input_ids"]
    for weights in sys.argv[1:]:
        own, same, parted = engine(weights), 0, []
        for at, n in enumerate(LENGTHS):
            ids = whole[2000 * at : 2000 * at + n]
            pairs = list(zip(ours(own, ids), theirs(own.model, ids), strict=True))
            apart = next((i for i, (a, b) in enumerate(pairs) if a.argmax() != b.argmax()), None)
            same += apart is None
            if apart is not None:
                a, b = pairs[apart]
                parted.append(
                    f"{n}: step {apart}, lead {b.max() - b[a.argmax()]:.3g}, logits {(a - b).abs().max():.3g}"
                )
        print(f"{weights}: {same} of {len(LENGTHS)} answers the same", *parted, sep="; ", flush=True)


if __name__ == "__main__":
    main()
