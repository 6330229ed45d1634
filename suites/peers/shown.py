"""What a comparison found: parity and speed as plain numbers, and the tables."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

TARGETS = {"8 arms": 6.0, "24 arms": 12.0}
SAME = {"StreamingLLMPress"}
"""Presses whose choice must be ours, token by token."""
WITHIN = 5e-6
"""How far a head's sums of attention may be apart, relative to their norm; both sides compute in float32."""


def parity(both: dict[str, dict[str, Any]], folder: Path, arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of what agrees; ``holds`` is None where the methods differ by design."""
    ours, theirs = both["ours"], both["theirs"]
    mine, other = (load_file(str(folder / f"{side}.safetensors")) for side in ("ours", "theirs"))
    tokens = f"{len(ours['context']):,} + {len(ours['question'])} tokens"
    same = all(ours[part] == theirs[part] for part in ("context", "question"))
    lines = [line("the prompt's token ids", f"{'the same' if same else 'different'}, {tokens}", same)]
    alike = ours["full"] == theirs["full"]
    lines.append(line("full's answer, float32", "the same text" if alike else "another text", alike))
    for press in dict.fromkeys(arm["press"] for arm in arms if arm["press"]):
        lines.append(kept([arm for arm in arms if arm["press"] == press], mine, other))
    if "mass" in mine and "observed" in other:
        mass, observed = mine["mass"], other["observed"]
        summed = observed * torch.arange(observed.shape[-1], 0, -1)
        gap = (mass - summed).abs()
        apart = float((gap.norm(dim=-1) / mass.norm(dim=-1)).max())
        single = float((gap / torch.maximum(mass, summed)).nan_to_num().max())
        what = f"a head's {apart:.1e} apart at most, a single key's {single:.1e}"
        lines.append(line("sums of attention, relative", what, apart <= WITHIN))
    what = f"kvsuite keeps {ours['share']} (rounded), kvpress {theirs['share']} (truncated)"
    lines.append(line(f"a share of 0.2 of {len(ours['context']):,} tokens", what, None))
    return lines


def kept(arms: list[dict[str, Any]], mine: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The kept tokens, (layers, heads, n) each, of all arms with one press."""
    press, same, layers, shared, tokens = arms[0]["press"], 0, 0, 0, 0
    what = f"{arms[0]['name'].split(':')[0]} and {press}, {len(arms)} budget{'s' * (len(arms) > 1)}"
    for arm in arms:
        a, b = mine[f"{arm['name']} kept"], other[f"{arm['name']} kept"]
        if a.shape != b.shape:
            return line(what, f"{arm['name']}: {a.shape[-1]} and {b.shape[-1]} tokens stay", False)
        same += sum(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        shared += sum(int(torch.isin(x, y).sum()) for x, y in zip(a.flatten(0, 1), b.flatten(0, 1), strict=True))
        layers, tokens = layers + len(a), tokens + a.numel()
    said = f"all tokens the same in {same} of {layers} layers, {shared / tokens:.1%} of all tokens"
    return line(what, said, same == layers if press in SAME else None)


def line(what: str, found: str, holds: bool | None) -> dict[str, Any]:
    return {"what": what, "found": found, "holds": holds}


def speed(rounds: list[dict[str, Any]], cells: dict[str, Any], contexts: int) -> list[dict[str, Any]]:
    """Per cell: seconds of both sides, their ratio in each round, and the ceiling of this run."""
    found = []
    for cell, arms in cells.items():
        ours, theirs = ([one[side]["cells"][cell] for one in rounds] for side in ("ours", "theirs"))
        parts = {key: mean(one["ours"][key] for one in rounds) for key in ("prefill", "observing", "alone")}
        parts["batched"] = mean(one["ours"]["batched"][cell] for one in rounds)
        n = len(arms)
        cost = parts["prefill"] + parts["observing"] + n * parts["batched"]
        found.append(
            {
                "cell": cell,
                "contexts": contexts,
                "ours": ours,
                "theirs": theirs,
                "ratios": [b / a for a, b in zip(ours, theirs, strict=True)],
                "ratio": sum(theirs) / sum(ours),
                "target": TARGETS.get(cell),
                "ceiling": n * (parts["prefill"] + parts["alone"]) / cost,
                **parts,
            }
        )
    return found


def draw(told: dict[str, Any]) -> None:
    console = Console(width=100, highlight=False)
    if "speed" in told:
        _speed(console, told)
    if "parity" in told:
        table = Table("what", "found", "", box=None, title="parity, float32", title_justify="left", pad_edge=False)
        for one in told["parity"]:
            table.add_row(one["what"], one["found"], {True: "holds", False: "FAILS", None: ""}[one["holds"]])
        console.print(table)


def _speed(console: Console, told: dict[str, Any]) -> None:
    sides, machine = told["rounds"][0], told["environment"]
    title = f"contexts: {told['speed'][0]['contexts']}; {machine['cores']} cores, {machine['cpu']}"
    table = Table(box=None, title=title, title_justify="left", pad_edge=False)
    for name in ("cell", "kvsuite, s", "kvpress, s", "theirs/ours", "min–max", "target", "ceiling"):
        table.add_column(name, justify="left" if name == "cell" else "right")
    for one in told["speed"]:
        low, high = min(one["ratios"]), max(one["ratios"])
        wish = f"{one['target']:g} ×" if one["target"] else ""
        seconds = [f"{mean(one[side]):.1f}" for side in ("ours", "theirs")]
        table.add_row(
            one["cell"], *seconds, f"{one['ratio']:.2f} ×", f"{low:.2f}–{high:.2f}", wish, f"{one['ceiling']:.1f} ×"
        )
    console.print(table)
    for side in ("ours", "theirs"):
        one = sides[side]
        tried = ", ".join(f"{dtype} {seconds:.2f} s" for dtype, seconds in one["dtypes"].items())
        versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        why = f" (a short prefill: {tried})" if tried else ""
        console.print(f"{side}: {one['dtype']}{why}; {versions}; {one['threads']} threads.")
    for one in told["speed"]:
        console.print(
            f"{one['cell']}: prefill p {one['prefill']:.2f} s, observation o {one['observing']:.2f} s, decoding alone "
            f"d {one['alone']:.2f} s, its share in a batch {one['batched']:.2f} s; ceiling N(p + d)/(p + o + N·share)."
        )
    console.print(f"kvpress, mean seconds of a call: {_calls(told)}.")


def _calls(told: dict[str, Any]) -> str:
    """What a call of each press costs: a prefill of its own, and an answer."""
    found: dict[str, list[float]] = {}
    for arm in max(told["job"]["cells"].values(), key=len):
        seconds = [one["theirs"]["calls"][arm["name"]] for one in told["rounds"]]
        found.setdefault(arm["press"] or "no press", []).extend(seconds)
    return ", ".join(f"{press} {mean(seconds):.1f}" for press, seconds in found.items())
