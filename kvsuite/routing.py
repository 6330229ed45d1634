"""``kvsuite route …``: where requests go in a fleet of plain and compressed servers."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsuite.errors import UsageError

if TYPE_CHECKING:
    from kvsuite.predict.laws import Law
    from kvsuite.predict.router import Setup
    from kvsuite.records import Run


def add(commands: Any) -> None:
    """Declare these commands among argparse's subparsers."""
    kinds = commands.add_parser("route", help="requests among plain and compressed servers: what routing is worth")
    kinds = kinds.add_subparsers(required=True, metavar="WHAT")
    _simulate_options(kinds.add_parser("simulate", help="a fleet under every policy, request by request"))
    _serve_options(kinds.add_parser("serve", help="a proxy in front of OpenAI-compatible servers"))


def _simulate_options(parser: argparse.ArgumentParser) -> None:
    times = "a run folder with timed cells, or .csv (model,method,bsz,prompt_len,stage,thr)"
    parser.add_argument("source", nargs="?", type=Path, metavar="TIMES", help=f"{times}; else stated laws of an A6000")
    chats = "a run folder whose chats give prompts and answers their lengths; else those of TIMES, or stated ones"
    parser.add_argument("--lengths", type=Path, metavar="RUN", help=chats)
    parser.add_argument("--model", help="of the .csv, where it has several")
    parser.add_argument("--method", help="what the compressed servers run; else the first")
    parser.add_argument("--servers", default="1+3", metavar="PLAIN+COMPRESSED", help="the mixed fleet (default: 1+3)")
    parser.add_argument("--arrivals", default="poisson:10", help="poisson:10, constant:10, bursts:8@0.5 or trace")
    parser.add_argument("--workload", type=Path, metavar="FILE", help="the trace, as pytest's --kv-workload")
    parser.add_argument("--requests", type=int, default=1000, metavar="N")
    parser.add_argument("--seeds", type=int, default=30, metavar="N")
    parser.add_argument("--batch", type=int, default=256, metavar="N", help="sequences that a server runs at once")
    parser.add_argument(
        "--memory", type=float, default=60_000, metavar="TOKENS", help="of uncompressed cache, a server"
    )
    parser.add_argument(
        "--share", type=float, metavar="X", help="bytes of a compressed token over an uncompressed one's"
    )
    parser.add_argument("--budget", type=float, metavar="TOKENS", help="the most that the method stores of a sequence")
    parser.add_argument("--longer", type=float, default=1.0, metavar="X", help="stated lengths: compressed over plain")
    parser.add_argument("--error", type=float, default=0.3, metavar="SD", help="of predicted lengths, of the logarithm")
    parser.add_argument("--fragile", type=float, default=0.25, metavar="X", help="share of requests of fragile types")
    parser.add_argument("--ttft", type=float, default=0.5, metavar="S", help="objective: seconds to the first token")
    parser.add_argument("--itl", type=float, default=0.05, metavar="S", help="objective: seconds a token after it")
    parser.add_argument("--json", action="store_true", help="figures for a program")
    parser.set_defaults(run=_simulate)


def _serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plain", action="append", required=True, metavar="URL", help="a server with the plain cache")
    parser.add_argument("--compressed", action="append", default=[], metavar="URL", help="one with a compressed cache")
    parser.add_argument("--policy", default="mixed, least loaded", help="as simulated; one that needs no lengths")
    parser.add_argument("--times", type=Path, metavar="TIMES", help="as of route simulate: what by throughput goes by")
    parser.add_argument("--model", help="of the .csv, where it has several")
    parser.add_argument("--method", help="what the compressed servers run; else the first of TIMES")
    fragile = "a type of task that stays on plain servers, named by the header x-kvsuite-type"
    parser.add_argument("--fragile", action="append", default=[], metavar="TYPE", help=fragile)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8900)
    parser.set_defaults(run=_serve, source=None, share=None, budget=None)


def _serve(asked: argparse.Namespace) -> None:
    from kvsuite.predict import proxy

    asked.source = asked.times
    chosen = replace(proxy.policy(asked.policy), careful=bool(asked.fragile))
    try:
        import httpx
        import uvicorn
    except ImportError as error:
        raise UsageError(f"the proxy needs {error.name}: pip install 'kvsuite[proxy]'") from error
    plain, compressed = _pair(asked, _known(asked)[0])
    backends = [proxy.Backend(url.rstrip("/"), plain) for url in asked.plain]
    backends += [proxy.Backend(url.rstrip("/"), compressed) for url in asked.compressed]
    client = httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None), trust_env=False)
    app = proxy.Proxy(backends, chosen, client, asked.fragile)
    print(f"http://{asked.host}:{asked.port}/v1 · {chosen.name} · {len(backends)} servers", flush=True)
    uvicorn.run(app, host=asked.host, port=asked.port, log_level="warning", lifespan="off")


def _simulate(asked: argparse.Namespace) -> None:
    from kvsuite.predict import routed
    from kvsuite.predict.router import outcomes
    from kvsuite.report import terminal

    setup = _setup(asked)
    rows = outcomes(setup, asked.seeds)
    if asked.json:
        print(json.dumps(routed.as_json(setup, rows), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        terminal.show(routed.tables(setup, rows, asked.seeds))


def _setup(asked: argparse.Namespace) -> Setup:
    """Raises UsageError before anything is simulated."""
    from kvsuite import records, workloads
    from kvsuite.predict.fleet import simulator
    from kvsuite.predict.router import Chats, Setup, Stated

    simulator()
    plain, compressed = _servers(asked.servers)
    _positive(asked, "requests", "seeds", "batch", "memory", "longer", "ttft", "itl", "share", "budget")
    if not (0 <= asked.fragile <= 1 and asked.error >= 0):
        raise UsageError("--fragile is a share from 0 to 1, and --error a spread of at least 0")
    arrivals = workloads.Arrivals.parse(asked.arrivals)
    if arrivals.kind == "closed":
        raise UsageError("--arrivals closed: a router is asked at times that do not wait for answers")
    if (arrivals.kind == "trace") != bool(asked.workload):
        raise UsageError("--arrivals trace and --workload FILE go together")
    times = workloads.schedule(workloads.read(asked.workload), arrivals) if asked.workload else None
    known, run = _known(asked)
    pair = _pair(asked, known)
    said = records.told(asked.lengths) if asked.lengths else run
    texts = Chats.of(said, [law.method for law in pair]) if said else Stated(factor=asked.longer)
    return Setup(
        pair, texts, arrivals, sorted(times) if times else None, plain, compressed, asked.requests, asked.batch,
        asked.memory, asked.error, asked.fragile, asked.ttft, asked.itl,
    )  # fmt: skip


def _known(asked: argparse.Namespace) -> tuple[dict[str, Law], Run | None]:
    """The laws of the times that were named, and the run that has them."""
    from kvsuite import records
    from kvsuite.predict import cells, laws

    if not asked.source:
        return laws.STATED, None
    run = records.told(asked.source) if asked.source.is_dir() else None
    return laws.fitted([c for c in cells.read(asked.source) if asked.model in (None, c.model)], run), run


def _pair(asked: argparse.Namespace, known: dict[str, Law]) -> tuple[Law, Law]:
    from kvsuite.predict.laws import law

    plain, *others = known.values()
    if not others:
        raise UsageError(f"only {plain.method} was timed both prefilling and decoding: there is nothing to mix it with")
    found = law(known, asked.method) if asked.method else others[0]
    if found is plain:
        raise UsageError(f"--method {asked.method} is the uncompressed cache")
    given = {name: getattr(asked, name) for name in ("share", "budget") if getattr(asked, name) is not None}
    return plain, replace(found, **given)


def _servers(text: str) -> tuple[int, int]:
    parts = [int(part) if part.strip().isdecimal() else 0 for part in text.split("+")]
    if len(parts) != 2 or min(parts) < 1:
        raise UsageError(f"--servers {text!r}: write how many are plain and how many compressed, 1+3")
    return parts[0], parts[1]


def _positive(asked: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(asked, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name} must be over 0, not {value:g}")
