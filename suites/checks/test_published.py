"""What a run leaves can be published: it names neither who ran it nor where."""

import io
import json
import platform
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvsuite.analysis.report import analyse
from kvsuite.environment import scrub
from kvsuite.records import Answer, Probe, RunFolder, Timing, read
from kvsuite.report import html, terminal
from kvsuite.report.markdown import render
from suites.checks.depth import by_night, only_nightly
from suites.findings import budgets_page

REPORTS = Path(__file__).parents[2] / "reports"
MACHINES = ("vm",)
"""Names of the machines that made the published runs."""


@pytest.fixture(autouse=True)
def alice(tmp_path, monkeypatch):
    """Alice at gpu17, who works in ~/lab and keeps her models elsewhere."""
    for name, value in {"HOME": "/home/alice", "USER": "alice", "LOGNAME": "alice"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("KVSUITE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(platform, "node", lambda: "gpu17.corp.example")
    monkeypatch.setattr(Path, "cwd", lambda: Path("/home/alice/lab"))


@pytest.mark.parametrize(
    ("said", "published"),
    [
        ("/home/alice/.cache/kvsuite/smollm2-0.1.2/a.gguf", "~/.cache/kvsuite/smollm2-0.1.2/a.gguf"),
        ("log: /home/alice/lab/runs/a.log)", "log: ./runs/a.log)"),
        ("in /home/alice/lab: no", "in .: no"),
        ("/home/alice/labyrinth/x, /home/alice.", "~/labyrinth/x, ~."),
        ("--model=/home/alice/m:/home/bob/n /root", "--model=~/m:~/n ~"),
        ("file:///home/alice/x '/Users/carol/y'", "file://~/x '~/y'"),
        ("/scratch/alice/m /tmp/pytest-of-alice/0", "/scratch/{user}/m /tmp/pytest-of-{user}/0"),
        ("/malice/x alice-in-text", "/malice/x alice-in-text"),
        ("alice@gpu18:/x root@db.corp carol@v1", "{user}@{host}:/x {user}@{host} carol@v1"),
        ("gpu17:12:12 [0] NCCL on gpu17.corp.example", "{host}:12:12 [0] NCCL on {host}"),
        ("gpu170 mygpu17 gpu17-a", "gpu170 mygpu17 gpu17-a"),
        ("http://u:p@llm.corp.example:8000/v1", "http://{host}:8000/v1"),
        ("http://127.0.0.1:8000 http://localhost/ http://[::1]:1", "http://127.0.0.1:8000 http://localhost/ http://[::1]:1"),
        ("tcp://10.0.0.5:29500 10.0.0.5:80 --host 10.0.0.5", "tcp://{host}:29500 {host}:80 --host {host}"),
        ("--host 0.0.0.0 nvidia-curand 10.3.5.147", "--host 0.0.0.0 nvidia-curand 10.3.5.147"),
        ("HF_TOKEN=hf_1 v --api-key sk-2 --max-tokens 3", "HF_TOKEN={secret} v --api-key {secret} --max-tokens 3"),
        ("vllm serve {model} --port {port} --tokenizer t", "vllm serve {model} --port {port} --tokenizer t"),
        ("--kv-arrivals=bursts:4@2.5 meta-llama/L@main", "--kv-arrivals=bursts:4@2.5 meta-llama/L@main"),
        ("/usr/lib/python3/site.py", "/usr/lib/python3/site.py"),
    ],
)  # fmt: skip
def test_who_and_where_are_not_told(said, published):
    assert scrub(said) == published
    assert scrub({"a": [said, 1, None]}) == {"a": [published, 1, None]}
    assert scrub(published) == published


@pytest.mark.parametrize("name", ["KVSUITE_CACHE", "XDG_CACHE_HOME"])
def test_a_cache_elsewhere_is_not_told(name, monkeypatch):
    monkeypatch.setenv(name, "/data/a/kvsuite" if name == "KVSUITE_CACHE" else "/data/a")
    assert scrub("--model /data/a/kvsuite/x") == "--model ~/.cache/kvsuite/x"


def test_a_container_without_a_home_keeps_its_paths(monkeypatch):
    for name, value in {"HOME": "/", "USER": "root", "LOGNAME": "", "KVSUITE_CACHE": "/c/k"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "cwd", lambda: Path("/"))
    monkeypatch.setattr(platform, "node", lambda: "localhost")
    assert scrub("/root/x /a /c/k/y localhost root cause") == "~/x /a ~/.cache/kvsuite/y localhost root cause"


ENVIRONMENT = {
    "packages": {}, "git": None, "threads": 1, "gpu": None, "dtype": "x", "cpu": "c", "cores": 1, "python": "3",
    "kvsuite": "0",
}  # fmt: skip
FACTS = {
    "model": {"name": "m"}, "started": "now", "preset": "smoke", "environment": ENVIRONMENT,
    "settings": {"length": [1], "compress": "prompt", "temperature": 0},
}  # fmt: skip


def test_no_file_of_a_run_tells_who_and_where(tmp_path):
    run, told = RunFolder(tmp_path), "/home/alice/lab/x on gpu17 by alice@gpu17"
    run.describe({**FACTS, "command": ["-m", "a b", told], "servers": {"baseline": told}})
    run.append(Answer("m", status="failed", error=told, task="t"))
    run.append(Timing("m", status="failed", error=told))
    run.append(Probe("baseline", command=told, facts={"path": [told], "features": {"model": told}}))
    run.append(Probe("baseline", status="failed", error=f"ended:\n{told}"))
    run.append(Answer("m", sample="s", text="The path /home/alice of gpu17"))
    found = read(tmp_path)
    texts = [f.read_text() for f in sorted(tmp_path.iterdir())] + [render(analyse(found))]
    for word in ("alice", "gpu17"):
        assert [text.count(word) for text in texts] == [1, 0, 0], "what the model said"
    assert "./x on {host} by {user}@{host}" in found.facts["command"]


def test_a_report_shows_the_command_as_it_can_be_run_again(tmp_path):
    words = ["-m", "samples or length", "--kv-baseline", "vllm serve --port {port}"]
    RunFolder(tmp_path).describe({**FACTS, "command": words})
    RunFolder(tmp_path).append(Answer("m"))
    shown = re.search("`pytest (.*?)`", render(analyse(read(tmp_path))))[1]
    assert shlex.split(shown) == words


@pytest.mark.parametrize(
    "file", by_night(sorted(REPORTS.rglob("report.md"))), ids=lambda file: str(file.parent.relative_to(REPORTS))
)
def test_a_published_report_is_what_its_run_shows(file):
    assert file.read_text() == render(analyse(read(file.parent)))


@pytest.mark.parametrize(
    "file", sorted(REPORTS.rglob("report.html")), ids=lambda file: str(file.parent.relative_to(REPORTS))
)
def test_a_published_page_is_what_its_run_shows(file):
    """But for what is packed: that depends on zlib."""
    pages = file.read_text(), html.render([analyse(read(file.parent))])
    assert PACKED.sub("", pages[0]) == PACKED.sub("", pages[1])
    assert len(pages[0].encode()) < 500_000


@only_nightly
@pytest.mark.parametrize("name", ["budgets.md", "budgets-drift.svg", "budgets-score.svg"])
def test_the_page_of_budgets_is_what_its_runs_show(name):
    assert (budgets_page.DOCS / name).read_text() == budgets_page.drawn()[name]


PACKED = re.compile(r"(?<=>)[\w+/=]{200,}(?=</script>)")
"""Records in a page."""


def told(value):
    """Whether a record's value can say something: numbers and lists of them cannot."""
    return bool(value) and isinstance(value[0] if isinstance(value, list) else value, (str, dict, list))


def published():
    """Every file under reports/, and of records every text once that is not a model's own words."""
    for file in sorted(f for f in REPORTS.rglob("*") if f.is_file()):
        text = PACKED.sub("", file.read_text())
        if file.suffix == ".jsonl":
            words, records = {"text", "reasoning", "calls"}, map(json.loads, filter(None, text.split("\n")))
            said = {json.dumps({key: x}) for r in records for key, x in r.items() if key not in words and told(x)}
            text = "\n".join(sorted(said))
        yield file, text.replace('xmlns="http://www.w3.org/2000/svg"', "")


def test_published_reports_tell_neither_who_nor_where():
    files = dict(published())
    assert len(files) > 8
    assert {file.suffix for file in files} <= {".html", ".md", ".json", ".jsonl", ".svg"}, (
        "a server's log is not cleaned"
    )
    for file, text in files.items():
        assert not re.search(r"(?<![\w.-])/(root|home|Users|tmp|work|mnt|data|scratch)\b", text), file
        assert not re.search(rf"(?<![\w.-])({'|'.join(MACHINES)})(?![\w-])", text), file
        assert scrub(text) == text, file


@pytest.mark.parametrize("width", [80, 160])
def test_the_default_run_ends_in_a_few_lines(width):
    drawn = io.StringIO()
    reporter = SimpleNamespace(
        verbosity=0, _tw=SimpleNamespace(_file=drawn, fullwidth=width), write_line=lambda line: drawn.write(line + "\n")
    )
    terminal.pytest_kv_report(analyse(read(REPORTS / "cpu" / "smoke")), reporter)
    lines = drawn.getvalue().strip().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("Scored and timed"))
    assert at <= 12, "the verdict and its table"
    assert lines[0].startswith("int8, fp8, kivi:bits=4: no damage found")
    assert lines[-1].endswith("report.html (all tables: -v)")
    assert max(map(len, lines)) <= width
