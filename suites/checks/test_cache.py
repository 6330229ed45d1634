"""The cache folder, whatever becomes of downloads, of what is in it, and of those who fill it."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from kvsuite import disk, models
from kvsuite.errors import UsageError
from kvsuite.models import Package

needs_locks = pytest.mark.skipif(disk.fcntl is None, reason="this system has no locks of files")


def wheel(folder, content="text"):
    """A wheel of the package, and its SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo("small/data/a.txt"), content)
    return file, hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A package, where ``fetched`` copies its wheel from, and how often."""
    _, sha = wheel(tmp_path / "index")
    package, asked = Package("small", "1.0", sha, "MIT", "small/data/"), []

    def run(command, **_):
        asked.append(command)
        cached = tmp_path / ("index" if "--no-cache-dir" in command else "pip")
        source = cached if cached.is_dir() else tmp_path / "index"
        target = Path(command[command.index("--dest") + 1])
        target.mkdir()
        shutil.copy(source / "small-1.0-py3-none-any.whl", target)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(models.subprocess, "run", run)
    monkeypatch.setattr(models, "_known", set())
    monkeypatch.setenv("KVSUITE_CACHE", str(tmp_path / "cache"))

    def make(source, target):
        shutil.copytree(source / "small/data", target)

    return lambda: models._once("small", package, make), asked


def test_it_is_fetched_once_and_its_sums_are_those_of_sha256sum(small):
    get, asked = small
    assert get() == get()
    assert len(asked) == 1
    assert (get() / "a.txt").read_text() == "text"
    assert (get() / "SHA256SUMS").read_text() == f"{hashlib.sha256(b'text').hexdigest()}  a.txt\n"


def test_a_wrong_download_is_told_and_fetched_again_past_pips_cache(small, tmp_path, capsys):
    get, asked = small
    _, other = wheel(tmp_path / "pip", "damaged")
    assert (get() / "a.txt").read_text() == "text"
    assert ["--no-cache-dir" in command for command in asked] == [False, True]
    assert f"has sha256 {other}, not the expected" in capsys.readouterr().err


def test_what_is_wrong_twice_is_refused(small, tmp_path):
    get, _ = small
    wheel(tmp_path / "index", "another")
    with pytest.raises(UsageError, match=r"the wheel of small==1\.0 has sha256 \w+, not the expected \w+$"):
        get()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("how", ["changed", "shorter", "gone", "no sums", "other bytes"])
def test_a_damaged_cache_is_told_and_made_again(small, monkeypatch, capsys, how):
    get, asked = small
    file = get() / "a.txt"
    if how == "gone":
        file.unlink()
    elif how in ("no sums", "other bytes"):
        (get() / "SHA256SUMS").write_bytes(b"\xff\n" if how == "other bytes" else b"")
    else:
        file.write_text("tex" if how == "shorter" else "tent")
    monkeypatch.setattr(models, "_known", set())  # another process
    assert (get() / "a.txt").read_text() == "text"
    assert len(asked) == 2
    assert f"{get()} is damaged and made again" in capsys.readouterr().err
    assert sorted(found.name for found in get().iterdir()) == ["SHA256SUMS", "a.txt"]
    assert [found.name for found in get().parent.iterdir()] == ["small-1.0"]


def test_files_that_others_leave_there_do_no_harm(small, monkeypatch):
    get, asked = small
    (get() / "b.txt").write_text("b")
    monkeypatch.setattr(models, "_known", set())  # another process
    assert sorted(found.name for found in get().iterdir()) == ["SHA256SUMS", "a.txt", "b.txt"]
    assert len(asked) == 1


def test_a_folder_without_sums_is_believed(small, tmp_path):
    get, asked = small
    (tmp_path / "cache/small-1.0").mkdir(parents=True)
    assert get() == tmp_path / "cache/small-1.0"
    assert not asked


@needs_locks
def test_what_a_killed_process_has_left_is_removed(small, tmp_path):
    get, _ = small
    left = tmp_path / "cache/.making-killed"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    get()
    assert [found.name for found in (tmp_path / "cache").iterdir()] == ["small-1.0"]


@needs_locks
def test_what_another_process_is_making_is_waited_for(small, tmp_path, capsys):
    get, asked = small
    (tmp_path / "cache").mkdir()
    with disk.making(tmp_path / "cache") as theirs:
        mine = threading.Thread(target=get)
        mine.start()
        while "waiting for another process" not in capsys.readouterr().err:
            pass
        assert theirs.is_dir()
        shutil.copytree(tmp_path / "index", tmp_path / "cache/small-1.0")
    mine.join()
    assert not asked, "the other one was faster"


@needs_locks
def test_a_lock_ends_with_its_process(tmp_path):
    code = "import os,sys,pathlib; from kvsuite import disk\nwith disk.making(pathlib.Path(sys.argv[1])): os._exit(9)"
    assert subprocess.call([sys.executable, "-c", code, str(tmp_path)]) == 9
    assert len(list(tmp_path.iterdir())) == 1
    with disk.making(tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_it_is_one_sentence(small, monkeypatch):
    get, _ = small

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models.shutil, "copytree", full)
    with pytest.raises(UsageError, match=r"small-1\.0' cannot be made: No space left on device$"):
        get()


def test_a_device_is_written_to_and_not_replaced(tmp_path, capfd):
    disk.write(Path("/dev/null"), "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    disk.write(Path("/dev/stdout"), "héllo")
    assert capfd.readouterr().out == "héllo"
    assert not list(Path("/dev").glob("*.tmp"))
    os.mkfifo(tmp_path / "pipe")
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    found = []
    reader.start()
    disk.write(tmp_path / "pipe", "through")
    reader.join()
    assert found == ["through"]
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]


def written(folder):
    """All that is in a folder, and what it holds."""
    return {file: os.readlink(file) if file.is_symlink() else file.read_bytes() for file in folder.rglob("*")
            if file.is_symlink() or file.is_file()}  # fmt: skip


OUTSIDE = ("../../../../../out", "../../out", "/out", "//out", "..\\..\\out", "link/out", "a/../../../out")


def test_an_archive_is_unpacked_into_the_cache_alone(small, tmp_path, monkeypatch):
    """Names that lead elsewhere, and a link to where they do. The sum of the package is that of this archive."""
    _, asked = small
    file = tmp_path / "index/small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        link = zipfile.ZipInfo("small/data/link")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(tmp_path / "home"))
        for name in OUTSIDE[:5] + OUTSIDE[6:]:
            archive.writestr(f"small/data/{name}", "x")
            archive.writestr(f"{name}/small/data/b", "x")
    (tmp_path / "home").mkdir()
    before = written(tmp_path)
    package = Package("small", "1.0", hashlib.sha256(file.read_bytes()).hexdigest(), "MIT", "small/data/")
    found = models._once("small", package, lambda source, target: shutil.copytree(source / "small/data", target))
    assert {file: what for file, what in written(tmp_path).items() if tmp_path / "cache" not in file.parents} == before
    assert not any(file.is_symlink() for file in found.rglob("*"))
    assert [file.name for file in tmp_path.joinpath("cache").iterdir()] == [found.name]
    assert len(asked) == 1
    assert not Path("/out").exists()


def gguf(file):
    """A tiny Llama whose names lead elsewhere."""
    import gguf

    out, evil = gguf.GGUFWriter(file, "llama"), "../../../../out"
    for add in (out.add_name, out.add_basename, out.add_author, out.add_chat_template):
        add(evil)
    out.add_string("general.source.url", "/out")
    out.add_block_count(1), out.add_context_length(64), out.add_embedding_length(32), out.add_feed_forward_length(32)
    out.add_head_count(2), out.add_head_count_kv(2), out.add_layer_norm_rms_eps(1e-5), out.add_vocab_size(4)
    out.add_rope_dimension_count(16), out.add_tokenizer_model("gpt2")
    out.add_token_list(["a", "b", "ab", evil]), out.add_token_merges(["a b"]), out.add_token_types([1, 1, 3, 3])
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    matrices = {f"blk.0.{name}.weight": (32, 32) for name in names} | {"token_embd.weight": (4, 32), evil: (4, 32)}
    vectors = dict.fromkeys(["blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"], (32,))
    for name, shape in (matrices | vectors).items():
        out.add_tensor(name, np.ones(shape, np.float32))
    out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file()
    out.close()


def test_a_gguf_file_is_converted_into_the_cache_alone(tmp_path):
    pytest.importorskip("gguf")
    import torch
    import transformers

    (tmp_path / "source").mkdir()
    gguf(tmp_path / "source/a.gguf")
    before = written(tmp_path)
    models._from_gguf(tmp_path / "source/a.gguf", tmp_path / "cache/made", transformers, torch.float32)
    assert (tmp_path / "cache/made/model.safetensors").is_file()
    assert {f: what for f, what in written(tmp_path).items() if tmp_path / "cache" not in f.parents} == before
    assert not any(file.is_symlink() for file in (tmp_path / "cache").rglob("*"))
    assert not Path("/out").exists()


CODE = """
from pathlib import Path
Path(__file__).parents[1].joinpath("out").write_text("x")
class Evil: ...
"""


def test_a_model_folder_is_read_and_nothing_is_written(world, tmp_path, monkeypatch):
    """It brings code, and names of files that lie elsewhere."""
    from kvsuite.engines.transformers import TransformersEngine

    evil, auto = "../../../../out", {"AutoConfig": "code.Evil", "AutoModelForCausalLM": "code.Evil"}
    folder = shutil.copytree(world / "model", tmp_path / "model")
    (folder / "code.py").write_text(CODE)
    (folder / "link").symlink_to(tmp_path / "home")
    for name, more in {
        "config.json": {"auto_map": auto, "_name_or_path": evil, "quantization_config": None},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["code.Evil", "code.Evil"]}, "tokenizer_file": evil,
                                  "vocab_file": "/out", "name_or_path": evil, "cache_dir": evil},
        "generation_config.json": {"_from_model_config": evil, "cache_dir": evil},
    }.items():  # fmt: skip
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | more))
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KVSUITE_CACHE", str(tmp_path / "cache"))
    before = written(tmp_path)
    models.check_whole(folder)
    models.model_limit(folder)
    models.fingerprint(folder)
    TransformersEngine.load(folder)
    assert written(tmp_path) == before
    assert not Path("/out").exists()
