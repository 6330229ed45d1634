"""Whether kvsuite's selectors and budgets keep the tokens that kvpress keeps, on the same tensors. docs/parity.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arms
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kvsuite import models
from kvsuite.cache.adapter import attention_modules
from kvsuite.cache.layer import highest
from kvsuite.cache.observations import LastQueries
from kvsuite.cache.prefill import PrefilledLayer
from kvsuite.engines.request import Request
from kvsuite.engines.transformers import TransformersEngine
from kvsuite.methods import Method, parse
from kvsuite.methods.codecs.think import Pruned, Think

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WITHIN = 1e-5
"""Tokens whose scores are so close to the lowest that stays, relative to it, may be others."""
SHARES = (1 / 2, 1 / 4, 1 / 8)
SNAPKV = "snapkv:budget={n},window=64,kernel=5,pool=avg"
CHUNK = 256
KVZIP = f"kvzip:budget={{n}},chunk={CHUNK}"
KVZIP_PLUS = KVZIP.replace("kvzip", "kvzip-plus")
PEERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("streaming-llm:budget={n},positions=absolute", "StreamingLLMPress", {}),
    ("knorm:budget={n}", "KnormPress", {}),
    ("keydiff:budget={n}", "KeyDiffPress", {}),
    ("tova:budget={n},recent=1", "TOVAPress", {}),
    ("lagkv:budget={n}", "LagKVPress", {}),
    ("observed-attention:budget={n}", "ObservedAttentionPress", {}),
    ("expected-attention:budget={n}", "ExpectedAttentionPress", {}),
    ("leverage:budget={n}", "LeverageScorePress", {}),
    ("compactor:budget={n},blend={ratio}", "CompactorPress", {}),
    (SNAPKV, "SnapKVPress", {}),
    (SNAPKV + " + pyramid:window=64,rule=kvpress", "PyramidKVPress", {}),
    (SNAPKV + " + ada:rule=kvpress", "AdaKVPress", {"press": "SnapKVPress"}),
    ("expected-attention:budget={n} + ada:rule=kvpress", "AdaKVPress", {"press": "ExpectedAttentionPress"}),
    (KVZIP + " + dms", "KVzipPress", {"chunk_size": CHUNK}),
    (KVZIP + " + ada:alpha=0,rule=kvpress", "KVzipPress", {"chunk_size": CHUNK, "layerwise": True}),
    (KVZIP_PLUS + " + dms", "KVzipPress", {"chunk_size": CHUNK, "kvzip_plus_normalization": True}),
    ("kvzap:weights={zap} + dms:threshold=-4", "DMSPress", {"threshold": -4}),
    ("think", "ThinKPress", {"key_channel_compression_ratio": 0.4}),
)
"""A method of kvsuite with kvpress's parameters, the press, and what else makes it."""


@dataclass(frozen=True)
class Case:
    """One model and one text: where its tensors come from."""

    name: str
    model: Path
    ids: list[int]


def real(length: int) -> Case:
    """The default model and a presidential message."""
    model = models.default_model()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def tokens(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return found

    text = arms.prompts(1, 2 * length, lambda text: len(tokens(text)))[0]["context"]
    return Case("SmolLM2-135M-Instruct", model, tokens(text)[:length])


def random(folder: Path, heads: int, kv_heads: int, head_dim: int, length: int) -> Case:
    """A model with random weights, large enough that attention is uneven."""
    name = f"random, {heads} heads over {kv_heads}, head_dim {head_dim}"
    torch.manual_seed(heads)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, initializer_range=0.1, max_position_embeddings=4096,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / str(heads))
    return Case(name, folder / str(heads), torch.randint(512, (length,)).tolist())


def spelled(length: int, zap: Path, sets: int) -> list[dict[str, Any]]:
    """Every pair at every budget, or once where there is none. ``zap``: KVzap's weights; ``sets``: the model's layers
    times its kv heads."""
    found = []
    for text, press, more in PEERS:
        for share in SHARES:
            tokens = round(share * length)
            half = 0.5  # they truncate their product with the length
            if press == "PyramidKVPress":
                half = 0
            if press == "KVzipPress":  # truncates how many go, of the whole model
                half = -0.5 / sets
            ratio = 1 - (tokens + half) / length
            name = text.format(n=tokens, ratio=ratio, zap=zap)
            found.append({"name": name, "press": press, "more": more, "ratio": ratio, "tokens": tokens})
            if "{n}" not in text:
                break
    return found


def engine(case: Case) -> TransformersEngine:
    """The model in float32, with its tokenizer where it has one."""
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32, local_files_only=True)
    has = (case.model / "tokenizer.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(case.model, local_files_only=True) if has else None
    return TransformersEngine(model, tokenizer, backend="reference")


def zap(engine: TransformersEngine, file: Path) -> Path:
    """Weights of the shape that KVzap's have, random, with scores around -4."""
    noise, tensors = torch.Generator().manual_seed(0), {}
    for layer in engine.layers:
        for at, shape in ((0, (32, layer.hidden_size)), (2, (layer.kv_heads, 32))):
            name = f"layers.{layer.index}.{at}"
            tensors[f"{name}.weight"] = torch.randn(shape, generator=noise) / shape[1] ** 0.5
            tensors[f"{name}.bias"] = torch.full(shape[:1], -2.0 * at)
    save_file(tensors, str(file))
    return file


def prefilled(
    engine: TransformersEngine, case: Case, asked: list[dict[str, Any]]
) -> tuple[list[PrefilledLayer], list[torch.Tensor], list[list[int]]]:
    """The prefilled layers, of the context and each chunk of KVzip's extra pass the hidden states (layers, n, hidden
    size), and of the chunks the token ids."""
    seen = [observation for arm in asked for observation in parse(arm["name"]).observes]
    whole = [*seen, LastQueries(len(case.ids))]
    fed: list[list[int]] = []
    hidden: list[list[torch.Tensor]] = [[] for _ in engine.layers]
    hooks = [engine.model.register_forward_pre_hook(_keep_ids(fed), with_kwargs=True)]
    modules = zip(attention_modules(engine.model), hidden, strict=True)
    hooks += [module.register_forward_pre_hook(_keep_hidden(own), with_kwargs=True) for module, own in modules]
    context = engine.prefill(Request("parity", "", "", 1), case.ids, [], whole).context
    for hook in hooks:
        hook.remove()
    chunks = range(1, 1 + -(-len(case.ids) // CHUNK))  # behind the prefill; later passes feed the same
    return context, [torch.stack([own[at] for own in hidden]) for at in (0, *chunks)], [fed[at] for at in chunks]


def _keep_ids(fed: list[list[int]]) -> Any:
    return lambda module, args, kwargs: fed.append(kwargs["input_ids"][0].tolist())


def _keep_hidden(hidden: list[torch.Tensor]) -> Any:
    return lambda module, args, kwargs: hidden.append(kwargs["hidden_states"][0])


def chosen(method: Method, context: list[PrefilledLayer]) -> torch.Tensor:
    """Which tokens stay, bool (layers, kv_heads, T); of a codec that drops channels which of them, (…, head_dim)."""
    heads, length, dim = context[0].k.shape
    if method.selector is None:
        assert isinstance(method.codec, Think)
        kept = torch.zeros(len(context), heads, dim, dtype=torch.bool)
        for layer, seen in enumerate(context):
            spec = Pruned(dim, dim - int(dim * method.codec.prune), method.codec.recent)
            kept[layer].scatter_(1, spec.fit(seen.k, seen[method.observes[0]])[0].long(), True)
        return kept
    tokens = method.tokens(length)
    scores = [method.selector.score(seen, tokens) for seen in context]
    kept = torch.zeros(len(context), heads, length, dtype=torch.bool)
    for layer, counts in enumerate(method.budget.allot(scores, tokens).tolist()):
        for head, index in enumerate(highest(scores[layer], counts)):
            kept[layer, head, index] = True
    return kept


def compared(mine: torch.Tensor, other: torch.Tensor, scores: torch.Tensor, budget: str) -> dict[str, Any]:
    """mine, other: bool (layers, kv_heads, T), what stays; scores: kvpress's. What shares a budget has one lowest score
    that stays: a layer's heads under ada, all under dms."""
    if budget == "ada":
        mine, other, scores = (x.flatten(1, 2)[:, None] for x in (mine, other, scores))
    if budget == "dms":
        mine, other, scores = (x.flatten()[None, None] for x in (mine, other, scores))
    lowest = scores.masked_fill(~other, torch.inf).amin(-1, keepdim=True)
    apart = ((scores - lowest).abs() / lowest.abs()).masked_fill(mine == other, 0.0)
    same_counts = torch.equal(mine.sum(-1), other.sum(-1))
    return {
        "sets": mine.shape[0] * mine.shape[1],
        "same": int((mine == other).all(-1).sum()),
        "tokens": int(other.sum()),
        "others": int((mine & ~other).sum()),
        "furthest": float(apart.max()),
        "holds": same_counts and float(apart.max()) <= WITHIN,
    }


def measure(case: Case, python: str, folder: Path) -> list[dict[str, Any]]:
    model = engine(case)
    sets = sum(layer.kv_heads for layer in model.layers)
    asked = spelled(len(case.ids), zap(model, folder / "zap.safetensors"), sets)
    context, (first, *again), fed = prefilled(model, case, asked)
    whole = LastQueries(len(case.ids))
    given = {
        "q": torch.stack([seen[whole] for seen in context]),
        "k": torch.stack([seen.k for seen in context]),
        "v": torch.stack([seen.v for seen in context]),
        "hidden": first,
    }
    given |= {f"again {at}": x for at, x in enumerate(again)}
    save_file({name: x.contiguous() for name, x in given.items()}, str(folder / "given.safetensors"))
    job = {"model": str(case.model), "ids": case.ids, "fed": fed, "arms": asked}
    (folder / "job.json").write_text(json.dumps(job))
    subprocess.run([python, str(HERE / "parity_theirs.py"), str(folder)], check=True, env=alone())
    theirs = load_file(str(folder / "theirs.safetensors"))
    rows = []
    for arm in asked:
        mine, other = chosen(parse(arm["name"]), context), theirs[f"{arm['name']} kept"].bool()
        found = compared(mine, other, theirs[f"{arm['name']} scores"], parse(arm["name"]).budget.name)
        rows.append({"case": case.name, **arm, **found})
    return rows


def alone() -> dict[str, str]:
    """The environment without paths of ours."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def draw(rows: list[dict[str, Any]]) -> None:
    table = Table("kvsuite", "kvpress", "sets the same", "other tokens", "furthest", "", box=None)
    for text, press, more in PEERS:
        own = [row for row in rows if (row["press"], row["more"]) == (press, more)]
        sets, same = sum(row["sets"] for row in own), sum(row["same"] for row in own)
        others, tokens = sum(row["others"] for row in own), sum(row["tokens"] for row in own)
        furthest, holds = max(row["furthest"] for row in own), all(row["holds"] for row in own)
        table.add_row(
            text.replace("budget={n},", "").replace(":budget={n}", "").replace("{ratio}", "…").replace("{zap}", "…"),
            press + (f"({more['press']})" if "press" in more else ""),
            f"{same:,} of {sets:,}",
            f"{others:,} of {tokens:,}",
            f"{furthest:.0e}",
            "holds" if holds else "FAILS",
        )
    Console(width=140, highlight=False).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--kvpress", default=os.environ.get("KVSUITE_KVPRESS"), metavar="PYTHON", help="its interpreter"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "parity.json")
    asked = parser.parse_args()
    if not asked.kvpress:
        parser.error("name the interpreter of an environment with kvpress: --kvpress or KVSUITE_KVPRESS (install.py)")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        cases = [
            real(12 + 3 * 256),  # whole chunks for compactor
            random(Path(folder), 8, 2, 128, 12 + 2 * 256),
            random(Path(folder), 4, 4, 64, 12 + 2 * 256),
        ]
        for case in cases:
            own = Path(folder) / str(len(rows))
            own.mkdir()
            rows += measure(case, asked.kvpress, own)
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text(json.dumps(rows, indent=1))
    draw(rows)
    if not all(row["holds"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
