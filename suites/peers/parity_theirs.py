"""kvpress's side of parity.py: ``python parity_theirs.py FOLDER``. Runs where kvpress is installed; knows no kvsuite.

Reads ``job.json`` and ``given.safetensors``: q (layers, heads, T, head_dim) after RoPE, k, v (layers, kv_heads, T,
head_dim) and hidden (layers, T, hidden size), float32. Writes ``theirs.safetensors``: of each arm what stays, uint8
(layers, kv_heads, T), and its scores, float32."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import kvpress
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def made(arm: dict[str, Any]) -> tuple[Any, Any]:
    """The press, and the one that scores."""
    kind = getattr(kvpress, arm["press"])
    if "press" in arm["more"]:
        inner = getattr(kvpress, arm["more"]["press"])(compression_ratio=arm["ratio"])
        return kind(press=inner), inner
    press = kind(compression_ratio=arm["ratio"])
    return press, press


def attention(q: Any, k: Any) -> Any:
    """The causal weights (1, heads, T, T), as eager attention has them."""
    keys = k.repeat_interleave(len(q) // len(k), 0)
    scores = q @ keys.transpose(1, 2) / q.shape[2] ** 0.5
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)[None]


def sketch(randn: Any, layer: int, *shape: int, **more: Any) -> Any:
    """Compactor's Gaussian matrix, as kvsuite draws it: one for all heads, from the layer."""
    return randn(*shape[-2:], generator=torch.Generator().manual_seed(layer)).expand(*shape)


def kept(press: Any, scorer: Any, module: Any, given: dict[str, Any], eager: bool) -> tuple[Any, Any]:
    """What stays, bool (kv_heads, T), and the scores, of one layer."""
    seen: list[Any] = []
    score = type(scorer).score

    def record(*args: Any, **more: Any) -> Any:
        found = score(scorer, *args, **more)
        seen.append(found[0].clone())  # AdaKV writes into it
        return found

    scorer.score = record
    k, v, hidden = (given[name][None] for name in ("k", "v", "hidden"))
    places = module.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    weights = attention(given["q"], given["k"]) if eager else None
    with mock.patch.object(torch, "randn", partial(sketch, torch.randn, module.layer_idx)):
        keys, _ = press.compress(module, hidden, k, v, weights, {"position_embeddings": places})
    (scores,) = seen
    stays = torch.ones_like(scores, dtype=torch.bool)
    if press is scorer:
        index = scores.topk(keys.shape[2], dim=-1).indices
        assert torch.equal(keys[0], given["k"].gather(1, index[..., None].expand(-1, -1, k.shape[3])))
        stays = torch.zeros_like(stays).scatter_(1, index, True)
    else:
        _, heads, places = module.masked_key_indices
        stays[heads, places] = False
    return stays, scores


@torch.inference_mode()
def main(folder: Path) -> None:
    transformers.utils.logging.disable_progress_bar()
    job, given = json.loads((folder / "job.json").read_text()), load_file(str(folder / "given.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, local_files_only=True).eval()
    modules = [layer.self_attn for layer in model.model.layers]
    tensors: dict[str, Any] = {}
    for arm in job["arms"]:
        eager, layers = arm["press"] == "ObservedAttentionPress", []
        for at, module in enumerate(modules):
            module.rotary_emb = model.model.rotary_emb
            press, scorer = made(arm)
            layers.append(kept(press, scorer, module, {name: x[at] for name, x in given.items()}, eager))
        stays, scores = zip(*layers, strict=True)
        tensors[f"{arm['name']} kept"] = torch.stack(stays).to(torch.uint8)
        tensors[f"{arm['name']} scores"] = torch.stack(scores).float()
    save_file(tensors, str(folder / "theirs.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
