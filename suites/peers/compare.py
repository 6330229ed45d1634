"""kvsuite beside kvpress: the same model, prompts and methods, timed in turn. docs/peers.md explains it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import arms
import shown
from tokenizers import Tokenizer

from kvsuite import models
from kvsuite.environment import describe

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--kvpress", default=os.environ.get("KVSUITE_KVPRESS"), metavar="PYTHON", help="its interpreter"
    )
    parser.add_argument("--samples", type=int, default=2, help="contexts of each cell")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side, in turn: A B B A")
    parser.add_argument("--tokens", type=int, default=2000, help="length of a context, about")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--arms", default="8,24", help="how many arms each cell has")
    parser.add_argument("--width", type=int, help="kvsuite's rows per method; as many as contexts unless given")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="auto: the faster one")
    parser.add_argument("--only", choices=("time", "parity"), help="one half of it")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "peers.json")
    chosen = parser.parse_args()
    if not chosen.kvpress:
        parser.error("name the interpreter of an environment with kvpress: --kvpress or KVSUITE_KVPRESS (install.py)")
    return chosen


def job(chosen: argparse.Namespace) -> dict[str, Any]:
    """What both sides are asked."""
    model = models.default_model()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))

    def tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    prompts = arms.prompts(chosen.samples, chosen.tokens, tokens)
    sizes = [int(size) for size in chosen.arms.split(",")]
    return {
        "model": str(model),
        "prompts": prompts,
        "warm": arms.short(prompts[0]),
        "new": chosen.new,
        "width": chosen.width or chosen.samples,
        "cells": {f"{size} arms": arms.arms(size, chosen.tokens) for size in sizes},
        "dtype": chosen.dtype,
    }


class Sides:
    """Both sides' processes, one at a time; files carry the job there and the result back."""

    def __init__(self, kvpress: str, folder: Path) -> None:
        self.python, self.folder = {"ours": sys.executable, "theirs": kvpress}, folder

    def run(self, side: str, wish: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        asked, told = self.folder / "job.json", self.folder / f"{side}.json"
        asked.write_text(json.dumps(wish))
        paths = {"PYTHONPATH": str(ROOT)} if side == "ours" else {}
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | paths | quiet
        command = [self.python[side], "-W", "ignore", str(HERE / f"{side}.py"), str(asked), str(told)]
        if code := subprocess.run(command, env=environment, check=False).returncode:
            raise SystemExit(f"{side}.py ended with code {code}; what it said stands above")
        result: dict[str, Any] = json.loads(told.read_text())
        cells = ", ".join(f"{cell} {seconds:.1f} s" for cell, seconds in result.get("cells", {}).items())
        what = f"{wish['mode']} {cells}".strip()
        print(f"{side}: {what} (process {time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
        return result


def timed(sides: Sides, wish: dict[str, Any], rounds: int) -> list[dict[str, dict[str, Any]]]:
    """One result of each side per round; a side keeps the dtype of its first."""
    found: list[dict[str, dict[str, Any]]] = []
    for number in range(rounds):
        order = ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours")
        dtype = {side: found[0][side]["dtype"] if found else wish["dtype"] for side in order}
        found.append({side: sides.run(side, {**wish, "mode": "time", "dtype": dtype[side]}) for side in order})
    return found


def main() -> int:
    chosen = options()
    wish = job(chosen)
    asked = {k: v for k, v in wish.items() if k not in ("prompts", "warm", "model")}
    told: dict[str, Any] = {"environment": describe(), "job": asked}
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(chosen.kvpress, Path(folder))
        if chosen.only != "time":
            both = {side: sides.run(side, {**wish, "mode": "parity"}) for side in ("ours", "theirs")}
            told["parity"] = shown.parity(both, Path(folder), min(wish["cells"].values(), key=len))
        if chosen.only != "parity":
            told["rounds"] = timed(sides, wish, chosen.rounds)
            told["speed"] = shown.speed(told["rounds"], wish["cells"], len(wish["prompts"]))
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(told, indent=1))
    shown.draw(told)
    return int(any(line["holds"] is False for line in told.get("parity", [])))


if __name__ == "__main__":
    sys.exit(main())
