"""Times the kernels on a GPU beside the libraries there: ``python kernels/session.py --out DIR [--minutes 6]``.

Writes DIR/kernels.json (every number) and DIR/kernels.md after each cell, so a crash or a time-out loses nothing. A
cell that fails is recorded, and the others go on. ``--tiny`` runs every cell in Triton's interpreter: its times mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

if "--tiny" in sys.argv:  # triton asks for it when it is imported
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import session_report
import torch
from session_cells import Bench, Cell
from session_device import Cuda, StandIn
from session_inputs import Skip

from kvsuite import environment


class Session:
    """Runs cells one after the other and writes down what became of each."""

    def __init__(self, bench: Bench, out: Path, deadline: float, data: dict[str, Any]) -> None:
        self.bench, self.out, self.deadline, self.data = bench, out, deadline, data
        copied = data["cells"].get("copy: device to device", {}).get("result", {})
        bench.copied = copied.get("GB/s")

    def run(self, cells: list[Cell]) -> None:
        """All cells that have no record yet."""
        done = self.data["cells"]
        keys = self.data["plan"] = [f"{cell.section}: {cell.name}" for cell in cells]
        for cell, key in zip(cells, keys, strict=True):
            if key in done:
                continue
            done[key] = record = self.attempt(cell)
            self.flush()
            print(f"{record['state']:8}{record['seconds']:6.1f} s  {key}  {record['message']}", flush=True)
            if record["state"] == "failed" and self.bench.device.dead():
                self.restart()
            self.bench.device.clean()

    def attempt(self, cell: Cell) -> dict[str, Any]:
        """A cell's record: what it found, or why it found nothing."""
        start, state, message, result = time.time(), "done", "", {}
        torch.manual_seed(0)
        try:
            if start > self.deadline:
                raise Skip("the time budget was spent")
            result = cell.run()
        except Skip as reason:
            state, message = "skipped", str(reason)
        except torch.OutOfMemoryError as error:
            state, message = "skipped", f"does not fit: {str(error).splitlines()[0]}"
        except Exception as error:
            traceback.print_exc()
            state, message = "failed", f"{type(error).__name__}: {error}"[:600]
        seconds = time.time() - start
        return {"section": cell.section, "name": cell.name, "state": state, "message": message, "seconds": seconds,
                "result": result}  # fmt: skip

    def flush(self) -> None:
        """Everything so far, to both files."""
        new = self.out / "kernels.json.new"
        new.write_text(json.dumps(self.data, indent=1))
        new.replace(self.out / "kernels.json")
        try:
            text = session_report.render(self.data)
        except Exception:  # a table is no reason to stop measuring
            text = f"kernels.json could not be made into a report.\n\n```\n{traceback.format_exc()}```\n"
        (self.out / "kernels.md").write_text(text)

    def restart(self) -> None:
        """Go on in a new process: nothing runs on this one's GPU any more."""
        print("the GPU's context is lost: going on in a new process", flush=True)
        minutes = str(max(0.0, self.deadline - time.time()) / 60)
        os.closerange(3, 4096)  # the GPU's files: with them its memory is given back
        os.execv(sys.executable, [sys.executable, *sys.argv, "--minutes", minutes, "--resume"])


def main(arguments: list[str] | None = None) -> int:
    """The session; 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU, in Triton's interpreter")
    parser.add_argument("--minutes", type=float, default=6.0, help="no cell is begun after this many")
    parser.add_argument("--only", help="sections, separated by commas (copy is always measured)")
    parser.add_argument("--resume", action="store_true", help="go on with what DIR/kernels.json lacks")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    device = StandIn() if given.tiny else Cuda()
    data: dict[str, Any] = {"cells": {}}
    if given.resume:
        data = json.loads((given.out / "kernels.json").read_text())
        data["cells"] = {key: cell for key, cell in data["cells"].items() if "time budget" not in cell["message"]}
    data |= {"tiny": given.tiny, "machine": device.describe(), "environment": environment.describe()}
    bench = Bench(device, given.tiny)
    session = Session(bench, given.out, time.time() + 60 * given.minutes, data)
    wanted = None if given.only is None else {"copy", *given.only.split(",")}
    with torch.inference_mode():
        session.run([cell for cell in bench.plan() if wanted is None or cell.section in wanted])
    print(session_report.summary(data))
    return int(any(cell["state"] == "failed" for cell in data["cells"].values()))


if __name__ == "__main__":
    sys.exit(main())
