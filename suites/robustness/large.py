"""Large input: ``python -m suites.robustness.large [BYTES]`` gives a line of 1 GB (or of so many bytes), a row of 10⁶
columns, an object of 10⁶ keys and 10⁶ nested ones to all places that read files or servers (`targets`), each in a
process of its own. Each ends well or in one of our own errors, within `SECONDS` of one core and with `GB` beside the
input."""

from __future__ import annotations

import io
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from kvsuite.engines.stream import LARGEST
from suites.robustness.targets import OURS, Target, targets

BYTES, MANY = 1 << 30, 10**6
SECONDS, GB = 30.0, 4.0
SPLIT = 1 << 16
"""Bytes of a piece of a stream."""
TEXTS = {"methods", "options", "margins", "gates", "arrivals", "names of results", "answers that are scored"}
"""Places that a user types into, and one whose input is cut before."""


def inputs(most: int = BYTES, many: int = MANY) -> dict[str, bytes]:
    """All of them by name."""
    columns = b",".join(b"c%d" % at for at in range(many))
    return {
        "line": b'{"a": "%s"}\n' % (b"x" * most),
        "columns": columns + b"\n" + b",".join([b"1"] * many) + b"\n",
        "keys": b"{%s}\n" % b", ".join(b'"k%d": 0' % at for at in range(many)),
        "nested": b'{"a": ' * many,
    }


def tried(target: Target, content: bytes) -> tuple[str, float, float]:
    """What became of it, seconds of one core, and GB beside the input. A process that died, or was ended after twice
    the time, has no figures."""
    context = get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_read, args=(target, content, theirs))
    process.start()
    theirs.close()
    found: tuple[str, float, float] = f"did not end within {2 * SECONDS:g} s", 0.0, 0.0
    try:
        if ours.poll(2 * SECONDS):
            found = ours.recv()
        process.kill()
        process.join()
    except EOFError:
        process.join()
        found = f"ended with {process.exitcode}", 0.0, 0.0
    return found


def _read(target: Target, content: bytes, to: Connection) -> None:
    given = _given(target.name, content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin, said = time.process_time(), "taken"
    with tempfile.TemporaryDirectory() as name:
        try:
            target.read(given, Path(name))
        except OURS:
            said = "refused"
        except BaseException as error:
            said = f"let through {type(error).__name__}: {str(error)[:200]}"
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    to.send((said, time.process_time() - begin, held * 1024 / 1e9))


def _given(name: str, content: bytes) -> object:
    """The input as this place would get it, where its first bytes decide whether the rest is looked at."""
    if name == "events":
        return [content[at : at + SPLIT] for at in range(0, len(content), SPLIT)]
    if name == "pages of a server":  # read by every profile; the client refuses longer ones
        return content[:LARGEST]
    if name == "HTTP":
        return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: " + content
    if name == "GGUF":
        return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(content)) + content
    if name in ("safetensors", "KVzap weights"):
        return struct.pack("<Q", len(content)) + content
    if name == "rows in a zip":
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("b.jsonl", content)
        return packed.getvalue()
    return content


def main(argv: Sequence[str]) -> int:
    """Try all; 1 where one let something through or took too much."""
    warnings.simplefilter("ignore")
    wrong, places, longest, most = 0, 0, 0.0, 0.0
    given = inputs(int(argv[0]) if argv else BYTES)
    for target in targets():
        if target.name in TEXTS:
            continue
        places += 1
        for name, content in given.items():
            said, seconds, gb = tried(target, content)
            bad = said not in ("taken", "refused") or seconds > SECONDS or gb > GB
            wrong, longest, most = wrong + bad, max(longest, seconds), max(most, gb)
            print(
                f"{'WRONG ' * bad}{target.name}, {name}: {said}, {seconds:.1f} s of one core, {gb:.2f} GB", flush=True
            )
    print(f"{len(given)} inputs at {places} places, {wrong} wrong; at most {longest:.1f} s and {most:.2f} GB")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
