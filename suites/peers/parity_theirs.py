"""kvpress's side of parity.py: ``python parity_theirs.py FOLDER``. Runs where kvpress is installed; knows no kvsuite.

Reads ``job.json`` and ``given.safetensors``: q (layers, heads, T, head_dim) after RoPE, k, v (layers, kv_heads, T,
head_dim), hidden (layers, T, hidden size) and, of each chunk of KVzip's extra pass, ``again 0`` … (layers, n, hidden
size), float32. Writes ``theirs.safetensors``: of each arm what stays, uint8
(layers, kv_heads, T), and its scores, float32."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import kvpress
import torch
import transformers
from kvpress.presses import leverage_press
from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import rotate_half


def double() -> Any:
    """torch for LeverageScorePress, which solves in what it calls float32: rounding there decided which tokens stay."""
    return SimpleNamespace(**vars(torch) | {"float32": torch.float64})


def made(arm: dict[str, Any]) -> tuple[Any, Any]:
    """The press, and the one that scores."""
    kind = getattr(kvpress, arm["press"])
    if arm["press"] == "DMSPress":
        inner = kvpress.KVzapPress()
        return kind(inner, threshold=arm["more"]["threshold"]), inner
    if arm["press"] == "ThinKPress":
        return kind(**arm["more"]), None
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
    """The Gaussian matrix of Compactor and its leverage, as kvsuite draws it: one for all heads, from the layer."""
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
    with (
        mock.patch.object(torch, "randn", partial(sketch, torch.randn, module.layer_idx)),
        mock.patch.object(leverage_press, "torch", double()),
    ):
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


def thresholded(press: Any, scorer: Any, module: Any, given: dict[str, Any], zap: Any) -> tuple[Any, Any]:
    """The same of DMSPress over KVzap, with the given weights."""
    scorer.kvzap_model, module.masked_key_indices = zap, None
    k, hidden = given["k"][None], given["hidden"][None]
    own = SimpleNamespace(keys=k, values=given["v"][None])
    cache = SimpleNamespace(layers={module.layer_idx: own})
    more = {"hidden_states": hidden, "past_key_values": cache, "cache_position": torch.arange(k.shape[2])}
    press.forward_hook(module, [], more, [])
    stays = torch.ones(k.shape[1:3], dtype=torch.bool)
    if module.masked_key_indices is not None:
        _, heads, places = module.masked_key_indices
        stays[heads, places] = False
    return stays, scorer.score(module, hidden, k, None, None, {})[0]


def channels(press: Any, module: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    """Which channels ThinK leaves, bool (kv_heads, head_dim), and as scores the same: no other channel may be."""
    hidden = given["hidden"][None]
    places = module.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    more = {"hidden_states": hidden, "position_embeddings": places}
    keys, _ = press.compress(module, hidden, given["k"][None].clone(), given["v"][None], None, more)
    stays = keys[0].ne(0).any(1)
    return stays, stays.float()


def zipped(arm: dict[str, Any], model: Any, given: dict[str, Any], job: dict[str, Any]) -> list[tuple[Any, Any]]:
    """What stays and the scores, layer by layer, of KVzip, whose extra pass has these hidden states."""
    press = kvpress.KVzipPress(compression_ratio=arm["ratio"], **arm["more"])
    tokenizer = Silent()
    if (Path(job["model"]) / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
    press._context_ids, press.context_length = torch.tensor([job["ids"]]), len(job["ids"])
    press._suffix_ids = tokenizer.encode(turn(tokenizer), return_tensors="pt", add_special_tokens=False)
    pairs = press.prepare(model, tokenizer)
    assert [fed[0].tolist() for _, fed in pairs] == job["fed"], "another request"
    for at, (chunk, _) in enumerate(pairs):
        press.end_idx = press.start_idx + chunk.shape[1]
        for layer in model.model.layers:
            module, index = layer.self_attn, layer.self_attn.layer_idx
            hidden, k, v = given[f"again {at}"][index][None], given["k"][index][None], given["v"][index][None]
            places = torch.arange(k.shape[2], k.shape[2] + hidden.shape[1])[None]
            cos, sin = model.model.rotary_emb(hidden, places)
            fed = kvpress.utils.get_prerope_key_states(module, hidden)
            fed = fed * cos + rotate_half(fed) * sin
            values = module.v_proj(hidden).view(1, hidden.shape[1], -1, module.head_dim).transpose(1, 2)
            keys, values = torch.cat([k, fed], 2), torch.cat([v, values], 2)
            press.score_kvzip(module, hidden, keys, values, None, {"position_embeddings": (cos, sin)})
        press.start_idx = press.end_idx
    press.compress_post(model)
    found = []
    for layer, scores in zip(model.model.layers, press.score_val[:, 0], strict=True):
        _, heads, tokens = layer.self_attn.masked_key_indices
        stays = torch.ones_like(scores, dtype=torch.bool)
        stays[heads, tokens] = False
        found.append((stays, scores))
    return found


class Silent:
    """The tokenizer of a model that has none: says nothing."""

    chat_template = None

    def encode(self, text: str, **how: Any) -> Any:
        return torch.zeros((1, 0), dtype=torch.int64)


def turn(tokenizer: Any) -> str:
    """What its template has between a user's words and the answer, as KVzipPress finds it out."""
    if tokenizer.chat_template is None:
        return "\n"
    mark = "dummy context\n#############"
    message = [{"role": "user", "content": mark}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    return text.split(mark)[1]


@torch.inference_mode()
def main(folder: Path) -> None:
    transformers.utils.logging.disable_progress_bar()
    job, given = json.loads((folder / "job.json").read_text()), load_file(str(folder / "given.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, local_files_only=True).eval()
    modules = [layer.self_attn for layer in model.model.layers]
    hidden, heads = model.config.hidden_size, len(given["k"][0])
    zap = KVzapModel(KVzapConfig(input_dim=hidden, hidden_dim=32, output_dim=heads, n_modules=len(modules)))
    zap.load_state_dict(load_file(str(folder / "zap.safetensors")))
    tensors: dict[str, Any] = {}
    for arm in job["arms"]:
        eager, layers = arm["press"] == "ObservedAttentionPress", []
        if arm["press"] == "KVzipPress":
            layers = zipped(arm, model, given, job)
        for at, module in enumerate(modules if not layers else ()):
            module.rotary_emb = model.model.rotary_emb
            own, (press, scorer) = {name: x[at] for name, x in given.items()}, made(arm)
            if arm["press"] == "DMSPress":
                layers.append(thresholded(press, scorer, module, own, zap))
            elif arm["press"] == "ThinKPress":
                layers.append(channels(press, module, own))
            else:
                layers.append(kept(press, scorer, module, own, eager))
        stays, scores = zip(*layers, strict=True)
        tensors[f"{arm['name']} kept"] = torch.stack(stays).to(torch.uint8)
        tensors[f"{arm['name']} scores"] = torch.stack(scores).float()
    save_file(tensors, str(folder / "theirs.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
