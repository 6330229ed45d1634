"""Whether two arms that are the same are measured as the same: ``python suites/findings/same.py FOLDER [OPTION …]``.

Each of 20 sessions, a pytest of its own, times decode steps of `full` against `full`, with --kv-methods full
--kv-rounds 10 and these options of pytest and kvsuite. Counts in how many the 95 % interval of their ratio covers 1,
and prints the widest ends. docs/findings.md has the result.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from kvsuite.analysis.speed import speed_rows
from kvsuite.records import Timing, read

SESSIONS = 20
COVERING, ENDS = 17, (0.9, 1.1)
"""What must hold: of 20 intervals of 95 % fewer cover 1 in 1.6 % of all such series."""


def session(folder: Path, options: list[str]) -> list[Timing]:
    """One session's cells, timed unless that was done."""
    if not (folder / "run.json").is_file() or "finished" not in read(folder).facts:
        shutil.rmtree(folder, ignore_errors=True)
        suite = Path(__file__).parents[1] / "throughput"
        command = [sys.executable, "-m", "pytest", "-q", str(suite), "-m", "throughput", "-k", "test_decode and full"]
        done = [*command, "--kv-methods", "full", "--kv-rounds", "10", *options, "--kv-run", str(folder)]
        subprocess.run(done, check=True, stdout=subprocess.DEVNULL)
    return [r for r in read(folder).records if isinstance(r, Timing) and r.status == "ok"]


def main() -> None:
    """Time what is missing, print every session, and what they come to."""
    folder, options = Path(sys.argv[1]), sys.argv[2:]
    found = []
    for number in range(1, SESSIONS + 1):
        for row in speed_rows(session(folder / f"{number:02}", options)):
            ratio = row.speedup
            assert ratio is not None
            found.append(ratio)
            where = f"{row.width} × {row.length}"
            print(f"{number:2}  {where}: {ratio.mean:.3f} ({ratio.low:.3f} to {ratio.high:.3f})", flush=True)
    covering = sum(ratio.low <= 1 <= ratio.high for ratio in found)
    low, high = min(ratio.low for ratio in found), max(ratio.high for ratio in found)
    inside = sum(ENDS[0] <= ratio.low and ratio.high <= ENDS[1] for ratio in found)
    print(
        f"{covering} of {len(found)} intervals cover 1 ({COVERING} of {SESSIONS} at least); {inside} lie inside "
        f"{ENDS[0]:g} to {ENDS[1]:g}; the widest ends are {low:.3f} and {high:.3f}"
    )


if __name__ == "__main__":
    main()
