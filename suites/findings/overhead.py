"""What kvsuite's own work costs beside the steps it times: ``python suites/findings/overhead.py FOLDER [OPTION …]``.

One session of pytest times decode steps with these options of pytest and kvsuite. pytest-benchmark's clock sees whole
blocks; the records have the seconds of the steps alone. Prints what is left, by cell and in all. docs/throughput.md has
the result.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from kvsuite.records import Timing, read

MOST = 0.02
"""Of a cell, what must not be exceeded."""


def main() -> None:
    """Time, print every cell, and what they come to."""
    folder, options = Path(sys.argv[1]), sys.argv[2:]
    suite, file = Path(__file__).parents[1] / "throughput", folder / "benchmarks.json"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", str(suite), "-m", "throughput", "-k", "test_decode"]
    subprocess.run(
        [*command, *options, "--kv-run", str(folder / "run"), "--benchmark-json", str(file)],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    whole = {}
    for one in json.loads(file.read_text())["benchmarks"]:
        info = one["extra_info"]
        whole[info["method"], info["bsz"], info["prompt_len"]] = one["stats"]["total"]
    timed = [r for r in read(folder / "run").records if isinstance(r, Timing) and r.status == "ok"]
    spent = {(t.method, t.width, t.length): sum(t.seconds) + sum(t.baseline_seconds) for t in timed}
    shares = {cell: 1 - spent[cell] / seconds for cell, seconds in whole.items()}
    for (method, width, length), share in shares.items():
        print(f"{method} {width} × {length}: {100 * share:.2f} %")
    total = 1 - sum(spent[cell] for cell in whole) / sum(whole.values())
    print(
        f"{100 * total:.2f} % of all, {100 * max(shares.values()):.2f} % of a cell at most ({100 * MOST:g} % allowed)"
    )


if __name__ == "__main__":
    main()
