"""The options of a comparison of servers: what serves, what is asked, and when."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from kvsuite import disk
from kvsuite.engines import profile
from kvsuite.engines.server import Spec
from kvsuite.errors import UsageError
from kvsuite.workloads import Arrivals

BASELINE = "baseline"
AGAIN = "baseline again"
"""The A/A arm: the baseline asked the same in another order. What it shows is noise."""
Ours = Literal["", "multi-turn", "pressure", "tools"]
"""Workloads made of our texts. multi-turn: conversations about them. pressure: all requests at once, and each with few
others. tools: each is to be recorded by a call of a tool."""
CHOICES = {"serve": ("alone", "together"), "prefix": ("cold", "warm"), "end": ("natural", "forced")}


@dataclass(frozen=True)
class Servers:
    """Arms of a comparison of servers, and what they are asked."""

    baseline: Spec
    variants: Mapping[str, Spec]
    profile: str
    together: bool
    arrivals: Arrivals | None
    """None: a closed loop at every ``--kv-batch``."""
    workload: Path | None
    ours: Ours
    """What is done with our texts; empty where they are summarised."""
    warm: bool
    forced: bool
    """Whether timed answers go on to their caps, whatever the model says."""
    requests: int
    goodput: tuple[float, float] | None
    """Targets for the p95 of TTFT and ITL, seconds."""
    startup: float

    @property
    def specs(self) -> dict[str, Spec]:
        """Every arm's, the A/A arm's included, in the order in which they serve."""
        return {BASELINE: self.baseline, AGAIN: self.baseline, **self.variants}

    def settings(self) -> dict[str, Any]:
        """What two runs must share to be compared, as JSON."""
        return {
            "serve": "together" if self.together else "alone",
            "arrivals": "closed" if self.arrivals is None else str(self.arrivals),
            "workload": self.workload.name if self.workload else self.ours,
            "prefix": "warm" if self.warm else "cold",
            "end": "forced" if self.forced else "natural",
            "requests": self.requests,
            "goodput": self.goodput,
        }


def check(raw: Mapping[str, Any], number: Any) -> Servers | None:
    """The servers that options ask for, ``variant`` being a list of texts; None where they ask for none.
    ``number(key, value)`` reads a number. Raises UsageError."""
    given = raw["variant"]
    if not raw["baseline"]:
        if given:
            raise UsageError("--kv-variant needs --kv-baseline: what serves the uncompressed model")
        return None
    variants: dict[str, Spec] = {}
    for text in given:
        name, equals, spec = str(text).partition("=")
        name = name.strip()
        if not equals or not spec.strip() or not re.fullmatch(r"[\w.+-]+", name):
            raise UsageError(f"--kv-variant {str(text)!r}: write NAME=SPEC, such as fp8=http://127.0.0.1:8001")
        if name in (BASELINE, AGAIN) or name in variants:
            raise UsageError(f"--kv-variant {name}: this name is taken")
        variants[name] = Spec.parse(spec)
    if raw["profile"]:
        profile.choose(str(raw["profile"]))
    ours: Ours = next((name for name in get_args(Ours) if name == raw["workload"]), "")
    workload = Path(str(raw["workload"])) if raw["workload"] and not ours else None
    if workload is not None and not disk.is_file(workload):
        raise UsageError(f"--kv-workload {str(workload)!r} does not exist")
    if str(raw["arrivals"]).strip() == "trace" and (workload is None or workload.suffix != ".jsonl"):
        raise UsageError("--kv-arrivals trace needs a trace: --kv-workload FILE.jsonl")
    if workload is not None and workload.suffix == ".jsonl" and int(number("requests", raw["requests"])):
        raise UsageError("--kv-requests chooses from ShareGPT or our texts; a trace is asked as it stands")
    closed = str(raw["arrivals"]).strip() == "closed"
    if ours == "pressure" and not closed:
        raise UsageError("--kv-workload pressure asks all its requests at once: it takes no --kv-arrivals")
    return Servers(
        baseline=Spec.parse(str(raw["baseline"])),
        variants=variants,
        profile=str(raw["profile"]),
        together=raw["serve"] == "together",
        arrivals=None if closed else Arrivals.parse(str(raw["arrivals"])),
        workload=workload,
        ours=ours,
        warm=raw["prefix"] == "warm",
        forced=raw["end"] == "forced",
        requests=int(number("requests", raw["requests"])),
        goodput=_targets(str(raw["goodput"]), number),
        startup=number("startup", raw["startup"]),
    )


def _targets(text: str, number: Any) -> tuple[float, float] | None:
    if not text:
        return None
    parts = dict(part.partition("=")[::2] for part in text.split(","))
    if parts.keys() != {"ttft", "itl"}:
        raise UsageError(f"--kv-goodput {text!r}: write both targets in seconds, ttft=2,itl=0.2")
    found = number("goodput", parts["ttft"]), number("goodput", parts["itl"])
    if not min(found) > 0:
        raise UsageError(f"--kv-goodput {text!r}: targets are over 0 seconds")
    return found
