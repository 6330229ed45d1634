"""kernels.json as tables a person reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

Cells = list[tuple[str, dict[str, Any]]]
COMPRESSED = ("int8", "int4", "fp8", "fp8 per token", "kivi-4", "kivi-2")
RATIOS = {"full": 0.95, "int4": 3.2, "kivi-4": 2.6, "kivi-2": 3.0, "fp8": 1.75, "fp8 per token": 1.75, "int8": 1.75}


def render(data: dict[str, Any]) -> str:
    """The report."""
    parts = []
    if data["tiny"]:
        parts.append("**These times mean nothing**: tiny shapes in Triton's interpreter, to see that the script runs.")
    parts += ["# Kernels on a GPU", machine(data), "## Targets", targets(data)]
    for title, note, table in TABLES:
        parts += [f"## {title}", note, table(data) or "Not measured."]
    return "\n\n".join(part for part in [*parts, "## Cells without a result", rest(data)] if part) + "\n"


def summary(data: dict[str, Any]) -> str:
    """What a terminal is told at the end."""
    states = Counter(cell["state"] for cell in data["cells"].values())
    count = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
    return f"{targets(data)}\n\n{count} of {len(data['plan'])} cells"


def cells(data: dict[str, Any], section: str) -> Cells:
    """Names and results of a section, of those that have one."""
    every = data["cells"].values()
    return [(c["name"], c["result"]) for c in every if c["section"] == section and c["state"] == "done"]


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """Markdown, or nothing where there are no rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    names = head.split("|")
    ruler = "|---" + "|---:" * (len(names) - 1) + "|"
    return "\n".join(["| " + " | ".join(names) + " |", ruler, *lines]) if lines else ""


def figure(x: float | None, form: str = ".3g") -> str:
    return "–" if x is None else format(x, form)


def us(found: dict[str, Any] | None) -> str:
    """A time: median and quartiles."""
    if found is None:
        return "–"
    middle, (low, high) = found["median"], found["quartiles"]
    return f"{middle:.1f} ({low:.1f}–{high:.1f})"


def times(found: dict[str, Any] | None) -> str:
    return "–" if found is None else f"{found['median']:.2f}×"


def percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.0f} %"


def machine(data: dict[str, Any]) -> str:
    """Where it was measured."""
    found, env = dict(data["machine"]), data["environment"]
    found |= {name: env["packages"].get(name, "–") for name in ("torch", "triton", "transformers")}
    git = env.get("git")
    found["commit"] = "unknown" if git is None else git["commit"][:12] + (" with changes" if git["dirty"] else "")
    copied = cells(data, "copy")
    if copied:
        found["copy bandwidth, read + written"] = f"{copied[0][1]['GB/s']:.0f} GB/s"
    return "\n".join(f"* {name}: {figure(x, '.4g') if isinstance(x, float) else x}" for name, x in found.items())


def large(data: dict[str, Any], name: str) -> Cells:
    """Decode results of a format at batch 32 × 8k and above, by shape."""
    found = [(full.rsplit(", ", 1), result) for full, result in cells(data, "decode")]
    sized = [(where, tuple(map(int, where.split(" × "))), result) for (other, where), result in found if other == name]
    return [(where, result) for where, (batch, tokens), result in sized if batch >= 32 and tokens >= 8000]


def targets(data: dict[str, Any]) -> str:
    """Each target, the worst that was measured, and the verdict."""

    def at_least(what: str, least: float, found: list[tuple[str, float | None]], allowed: str = "") -> list[str]:
        known = [(x, where) for where, x in found if x is not None]
        worst = min(known, default=None)
        return verdict(what, f"≥ {least:g}", allowed, worst, known, worst is not None and worst[0] >= least)

    def verdict(what: str, wanted: str, allowed: str, worst: Any, known: list[Any], met: bool) -> list[str]:
        if worst is None or data["tiny"]:
            return [what, wanted, allowed, "–", "", "not measured"]
        every = ", ".join(f"{where}: {x:.2f}" for x, where in known)
        return [what, wanted, allowed, f"{worst[0]:.2f}", every, "met" if met else "**missed**"]

    rows = []
    for name, least in RATIOS.items():
        found = [(where, r["ratio"]["median"] if "ratio" in r else None) for where, r in large(data, name)]
        allowed = ", ".join(f"{r['allowed']:.2f}" for _, r in large(data, name)[:1] if "allowed" in r)
        rows.append(at_least(f"{name}: speed against the fastest library's bf16", least, found, allowed))
    for name in ("full", *COMPRESSED):
        found = [(where, r["share"]) for where, r in large(data, name)]
        rows.append(at_least(f"{name}: share of copy bandwidth", 0.8 if name == "full" else 0.7, found))
    mass = [(r["over full"]["median"], where) for where, r in large(data, "full + mass")]
    worst = max(mass, default=None)
    rows.append(verdict("full with mass: time over full", "≤ 1.1", "", worst, mass, bool(mass) and worst[0] <= 1.1))
    h2o = [(where, r["ratio"]["median"] if "ratio" in r else None) for where, r in cells(data, "h2o")]
    rows.append(at_least("h2o at 10 %: speed against the fastest library's bf16", 5.0, h2o))
    uneven = [(r["per token"]["median"], name) for name, r in cells(data, "ragged")]
    worst = max(uneven, key=lambda x: abs(x[0] - 1), default=None)
    met = worst is not None and abs(worst[0] - 1) <= 0.1
    rows.append(verdict("ragged heads: time per kept token over equal lengths'", "0.9 – 1.1", "", worst, uneven, met))
    return table("target|wanted|bytes allow|worst|measured|verdict", rows)


def decoding(data: dict[str, Any]) -> str:
    return table(
        "format, batch × tokens|µs|MB held|GB/s|of copy|fastest library|its µs|faster than it|bytes allow|over full",
        (
            [name, us(r["us"]), f"{r['bytes'] / 1e6:.1f}", figure(r["GB/s"], ".0f"), percent(r["share"]),
             r.get("library", "–"), us(r.get("library us")), times(r.get("ratio")), figure(r.get("allowed")),
             times(r.get("over full"))]
            for name, r in cells(data, "decode")
        ),
    )  # fmt: skip


def libraries(data: dict[str, Any]) -> str:
    rows = []
    for name, r in cells(data, "libraries"):
        rows += [[f"{library}, {name}", us(found), "fastest" if library == r.get("fastest") else ""]
                 for library, found in r["times"].items()]  # fmt: skip
        rows += [[f"{library}, {name}", "–", why.replace("|", "/")] for library, why in r["absent"].items()]
    return table("library, batch × tokens|µs|", rows)


def selecting(data: dict[str, Any]) -> str:
    rows = [
        [f"h2o, {name}, {r['kept']} kept", us(r["us"]), us(r.get("library us")), times(r.get("ratio")), "–"]
        for name, r in cells(data, "h2o")
    ]
    rows += [
        [f"ragged {name}, {r['kept']} kept", us(r["us"]), us(r["equal us"]), "–", times(r["per token"])]
        for name, r in cells(data, "ragged")
    ]
    return table("case|µs|beside it, µs|faster than the library|per kept token, over equal lengths", rows)


def storing(data: dict[str, Any]) -> str:
    rows = [[f"append {name}", us(r["us"]), us(r.get("flush us")), f"{r['mean us']:.1f}", "–", "–"]
            for name, r in cells(data, "append")]  # fmt: skip
    rows += [[f"fill {name}", us(r["us"]), "–", "–", f"{r['GB/s']:.0f}", percent(r["share"])]
             for name, r in cells(data, "fill")]  # fmt: skip
    return table("case|µs|flush µs|mean µs per step|GB/s|of copy", rows)


def masses(data: dict[str, Any]) -> str:
    rows = ([name, us(r["us"]), us(r["library us"]), times(r["over"])] for name, r in cells(data, "prefill mass"))
    return table("tokens|µs|SDPA, µs|mass over SDPA", rows)


def stepping(data: dict[str, Any]) -> str:
    equal = dict(cells(data, "graph"))
    return table(
        "method|eager µs|StepGraph µs|replay alone µs|GB held|layers|replays are the steps",
        (
            [name, us(r["eager us"]), us(r["us"]), us(r["replay us"]), f"{r['bytes'] / 1e9:.2f}", str(r["layers"]),
             "yes" if name in equal else "not shown"]
            for name, r in cells(data, "step")
        ),
    )  # fmt: skip


def sweeping(data: dict[str, Any]) -> str:
    found = [(name, r) for name, r in cells(data, "sweep") if "over" in r]
    found.sort(key=lambda x: (x[1]["format"], x[1]["over"]["median"]))
    return table("format: change|µs|over the settings in use", ([n, us(r["us"]), times(r["over"])] for n, r in found))


def rest(data: dict[str, Any]) -> str:
    """Cells that failed, were skipped, or were not reached."""
    lines = [
        f"* {key}: {cell['state']}, {cell['message']}"
        for key, cell in data["cells"].items()
        if cell["state"] != "done" and "time budget" not in cell["message"]
    ]
    late = [
        key for key in data["plan"] if "time budget" in data["cells"].get(key, {"message": "time budget"})["message"]
    ]
    if late:
        lines.append(f"* **Not measured for lack of time** ({len(late)}): {'; '.join(late)}")
    return "\n".join(lines) or "None."


TABLES: list[tuple[str, str, Callable[[dict[str, Any]], str]]] = [
    (
        "Decode attention",
        "Medians and quartiles over replays of a CUDA graph that goes through several independent input sets, more than"
        " four times the L2 cache; ours and the library's take turns, and ratios are medians of pairs. Bytes are what"
        " must be read and written: codes, scales, zeros, residual, page table, query and output.",
        decoding,
    ),
    ("Libraries", "bfloat16, contiguous K and V. Those that are absent, with the reason.", libraries),
    (
        "Selection",
        "One layer's step at a 10 % budget (append, attention with mass, victim), and ragged heads.",
        selecting,
    ),
    ("Writing", "Append: one token per row of one layer. Fill: a prompt, K and V, read and written.", storing),
    ("Attention mass of a prompt", "", masses),
    ("A whole decoding step", "Wall-clock, the host's counting included; the replay alone by events.", stepping),
    ("Settings of the attention kernel", "One changed at a time.", sweeping),
]
