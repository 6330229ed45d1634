"""docs/vllm.md: every command of the page runs, here with a scripted server in vLLM's place; ``tox -e vllm`` installs
what the page installs and compares real servers."""

import configparser
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from suites.checks.test_serving import left_behind, texts, watched  # noqa: F401

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "vllm.md"
FAKE = '''
"""The command line of vLLM's server, as far as the page uses it."""
import argparse, runpy, sys
parser = argparse.ArgumentParser()
for name in ("model", "host", "port", "max-model-len"):
    parser.add_argument("--" + name, required=True)
parser.add_argument("--enforce-eager", action="store_true", required=True)
parser.add_argument("--kv-cache-dtype", default="auto")
asked = parser.parse_args()
sys.argv = ["scripted", "--port", asked.port, "--model", asked.model, "--kv-cache-dtype", asked.kv_cache_dtype]
runpy.run_module("suites.checks.scripted", run_name="__main__")
'''


def commands():
    """The page's indented lines, in order."""
    return [line.strip() for line in PAGE.read_text().splitlines() if line.startswith("    ")]


def test_what_the_page_installs_is_what_tox_installs():
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    own = tox["testenv:vllm"]
    install, uninstall, extras = (shlex.split(c, comments=True) for c in commands() if c.startswith("pip "))
    assert install[2] == own["deps"]
    assert uninstall[3:] == shlex.split(own["commands_pre"])[4:]
    assert set(re.findall(r"\w+", extras[3].partition("[")[2])) == set(re.findall(r"\w+", own["extras"]))


def test_every_other_command_of_the_page_runs(tmp_path, texts, watched):  # noqa: F811
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(FAKE)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 8192}')
    (tmp_path / "model" / "model.safetensors").touch()
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, module in (("pytest", "pytest"), ("kvsuite", "kvsuite.cli")):  # the page's commands, in a folder of ours
        where = f"-c {ROOT / 'pyproject.toml'} --rootdir {ROOT} -p no:cacheprovider --kv-model {tmp_path / 'model'} "
        where += " ".join(str(ROOT / "suites" / x / f"test_{y}.py") for x, y in FILES)
        (binaries / name).write_text(
            f'#!/bin/sh\nexec {sys.executable} -m {module} {where * (name == "pytest")} "$@"\n'
        )
        (binaries / name).chmod(0o755)
    environment = (
        os.environ
        | watched
        | {
            "PATH": f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{tmp_path}:{ROOT}",
            "KVSUITE_CACHE": str(texts),
        }
    )
    script = "\n".join(c for c in commands() if not c.startswith("pip "))
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    report = (tmp_path / "runs" / "fp8" / "report.md").read_text()
    for said in ("## verdicts", "fp8 stores", "| fp8 | length", "baseline again", "## what was served"):
        assert said in report
    assert left_behind(tmp_path) == ([], [])


FILES = (("samples", "samples"), ("length", "length"), ("throughput", "serving"))
