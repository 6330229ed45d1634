"""Make an environment for kvpress, whose transformers is older than ours, once: ``python install.py FOLDER``."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

WANTED = "kvpress==0.5.5"
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def install(folder: Path) -> Path:
    """The interpreter of an environment with kvpress and the torch that kvsuite is tested with."""
    python, done = folder / "bin" / "python", folder / "installed.txt"
    wish = f"{WANTED}\n{CONSTRAINTS.read_text()}"
    if not done.is_file() or done.read_text() != wish:
        venv.create(folder, with_pip=True, clear=True)
        torch = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
        command = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS), torch, WANTED]
        subprocess.run(command, check=True)
        done.write_text(wish)
    return python


if __name__ == "__main__":
    print(install(Path(sys.argv[1])))
