"""Two processes that share one model: the same tokens as one, one run folder, and none waits for one that is gone."""

import json
import os
import shutil
import socket
import sys

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from kvsuite.engines import ranks
from kvsuite.engines.limits import step
from kvsuite.engines.request import Request
from kvsuite.engines.timing import ENDLESS, DecodeCell
from kvsuite.engines.transformers import TransformersEngine
from kvsuite.methods import parse
from kvsuite.records import Timing, read
from suites.checks import forked
from suites.checks.test_run import SHAPE
from suites.throughput.test_throughput import LOST

PLAIN = ("--kv-backend", "reference")
"""Nothing is compiled."""
METHODS = "full,int8,h2o:budget=64"
FAILING = """
import os

from kvsuite.engines.timing import DecodeCell

if os.environ["RANK"] == "1":
    made, checked = DecodeCell.__init__, DecodeCell.check

    def make(cell, engine, method, prompt, width, *more, **options):
        if width == 4:
            raise MemoryError("this rank is full")
        made(cell, engine, method, prompt, width, *more, **options)

    def check(cell):
        checked(cell)
        if cell.worker.method.name == "int4":
            raise ValueError("only here")
        if cell.worker.method.name == "fp8":
            attend, calls = cell.worker.caches[0].attend, []

            def break_off(*asked, **how):
                calls.append(how)
                if len(calls) == 6:
                    raise ValueError("in the second block")
                return attend(*asked, **how)

            cell.worker.caches[0].attend = break_off

    DecodeCell.__init__, DecodeCell.check = make, check
"""
DYING = """
import os, signal

from kvsuite.engines.timing import DecodeCell

if os.environ["RANK"] == "1":
    checked = DecodeCell.check

    def check(cell):
        if cell.worker.method.name == "int8":
            os.kill(os.getpid(), signal.SIGKILL)
        checked(cell)

    DecodeCell.check = check
"""


def environments(count=2):
    """What torchrun tells its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    told |= {"TORCHELASTIC_RUN_ID": "none"}
    return [{k: str(v) for k, v in (told | {"RANK": rank, "LOCAL_RANK": rank}).items()} for rank in range(count)]


@pytest.fixture(scope="session")
def model(world, tmp_path_factory):
    """With an even vocabulary: transformers 5.17 splits no other."""
    folder = tmp_path_factory.mktemp("even") / "model"
    shutil.copytree(world / "model", folder)
    torch.manual_seed(0)
    LlamaForCausalLM(AutoConfig.from_pretrained(folder, vocab_size=102)).save_pretrained(folder)
    return folder


@pytest.fixture
def both(pytester, go, model):
    """A pytest in each of two ranks: their exit codes, and what each said."""

    given = ["--kv-model", str(model), "--kv-run", str(pytester.path / "left"), *PLAIN]

    def run(*arguments, told=None):
        processes, chosen = [], [*arguments[:1], *given, *arguments[1:]]
        for told_one in told or environments():
            folder = pytester.path / f"rank{told_one['RANK']}"
            folder.mkdir()
            processes.append((forked.start(go(*chosen), folder, **told_one), folder))
        found = []
        for process, folder in processes:
            process.join()
            said = [(folder / name).read_text() for name in (forked.STDOUT, forked.STDERR)]
            print(*said, sep="\n")
            found.append((process.exitcode, *said))
        return found

    return run


def answered(folder, told, file):
    """In a process of its own: the tokens of all methods, what a layer has, and how it computes."""
    os.environ.update(told)
    torch.set_num_threads(1)
    ranks.join("cpu")
    engine = TransformersEngine.load(folder)
    requests = [
        Request(f"s{n}", "The state of the Union is a matter of record. " * n, "", 12, plain=True) for n in (3, 7)
    ]
    answers = engine.generate(requests, [parse(text) for text in METHODS.split(",")], width=2)
    found = {f"{a.id} {a.method}": [a.tokens, a.error, a.nbytes] for a in answers}
    layers = [[layer.heads, layer.kv_heads] for layer in engine.layers]
    slowest = ranks.slowest({"seconds": [1.0 + ranks.rank(), 2.0 - ranks.rank()]})
    file.write_text(json.dumps([found, layers, engine.reason, slowest["seconds"]]))
    ranks.leave()


def test_two_processes_give_the_tokens_of_one(model, tmp_path):
    files = [tmp_path / f"{n}.json" for n in range(3)]
    processes = [
        forked.SERVER.Process(target=answered, args=(model, told, file))
        for told, file in zip([{}, *environments()], files, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    one, *two = [json.loads(file.read_text()) for file in files]
    assert (one[1], two[0][1]) == ([[4, 2]] * 2, [[2, 1]] * 2)
    assert one[3] == [1.0, 2.0]
    for found, _, reason, slowest in two:
        assert "packed" not in reason
        assert slowest == [2.0, 2.0]
        assert {name: a[0] for name, a in found.items()} == {name: a[0] for name, a in one[0].items()}
        assert all(len(tokens) > 1 and not error for tokens, error, _ in found.values())
    for name, (*_, nbytes) in one[0].items():
        both = sum(found[name][2] for found, *_ in two)
        assert both - nbytes == 8 * name.endswith("h2o:budget=64"), "its number of each layer, int32, is on both"


def test_torchrun_leaves_one_run_and_what_fails_on_one_rank_costs_its_cell(pytester, go, model):
    pytester.makepyfile(failing=FAILING)
    asked = ["--kv-methods", "int8,int4,fp8", "--kv-cells", "2x256,4x256", "-p", "failing"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pytest"]
    chosen = [*asked, "--kv-model", str(model), *PLAIN, "-k", "test_decode or int8"]
    result = pytester.run(*command, *go("throughput", *chosen))
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    found = read(pytester.path / "left")
    cells = {(t.method, t.phase, t.width): t for t in found.records if isinstance(t, Timing)}
    assert found.facts["expected"]["timings"] == len(cells) == len(found.records) == 9
    errors = {key: t.error for key, t in cells.items() if t.status != "ok"}
    full = {(m, "decode", 4): "out of memory: this rank is full (rank 1)" for m in ("full", "int8", "int4", "fp8")}
    assert errors == full | {
        ("int4", "decode", 2): "ValueError: only here (rank 1)",
        ("fp8", "decode", 2): "Unchecked: ValueError: in the second block (rank 1)",
    }
    engine = TransformersEngine.load(model)
    ids = engine.tokenizer("The state of the Union. " * 99)["input_ids"][:256]
    prompt = engine.prefill(Request("cell", "", "", ENDLESS), ids, [])
    for name in ("full", "int8"):
        cell, timed = DecodeCell(engine, parse(name), prompt, 2, 24), cells[name, "decode", 2]
        cell.check()
        work = step(engine.model, cell.worker)
        assert (timed.nbytes, timed.nbytes_read) == (cell.worker.nbytes, cell.worker.read_nbytes)
        assert (timed.moved, timed.operations) == (4 * work.moved, 4 * work.operations)
        assert timed.checked <= 1
        assert len(timed.seconds) == len(timed.attention_seconds) == 2
    assert found.facts["environment"]["tensor_parallel"] == 2
    assert "float32, tensor parallel 2" in (pytester.path / "left" / "report.md").read_text()
    assert sum(line.startswith("report: ") for line in result.outlines) == 1


def test_a_rank_that_dies_ends_the_other_in_a_sentence(both, pytester):
    pytester.makepyfile(dying=DYING)
    (code, out, _), (died, said, _) = both("throughput", "-p", "dying", "-k", "test_decode")
    assert (code, died, said) == (pytest.ExitCode.INTERRUPTED, -9, "")
    assert f"Exit: {LOST}: RuntimeError: " in out
    assert "go on with: torchrun --nproc-per-node 2 -m pytest" in out
    found = read(pytester.path / "left").records
    assert [(t.method, t.status) for t in found] == [("full", "ok"), ("int8", "failed")]


def test_a_shape_and_the_memory_are_shared(both, pytester):
    pytester.makepyfile(shape=SHAPE.replace("99", "100"))
    asked = [
        "--kv-model",
        "shape:tiny:layers=6",
        "--kv-cells",
        "2x256,4000x256",
        "--kv-memory",
        "0.1",
        "--kv-methods",
        "int8",
    ]
    assert [code for code, *_ in both("throughput", *asked, "-p", "shape", "-k", "decode")] == [0, 0]
    timings = read(pytester.path / "left").records
    assert [(t.method, t.status, t.scale, len(t.rest_seconds)) for t in timings if t.width == 2] == [
        ("full", "ok", 2.0, 2),
        ("int8", "ok", 2.0, 2),
    ]
    errors = [t.error for t in timings if t.width == 4000]
    assert len(errors) == 2
    assert all(error.endswith("0.05 GiB are left of a rank's share of --kv-memory 0.1") for error in errors)


@pytest.mark.parametrize(
    ("marker", "more", "count", "sentence"),
    [
        ("samples", [], 2, "torchrun's processes share one model, which is timed: choose -m throughput alone"),
        ("throughput or length", [], 2, "choose -m throughput alone, without -n"),
        ("throughput", ["-n", "2"], 2, "choose -m throughput alone, without -n"),
        ("throughput", [], 3, "3 processes cannot share the 2 kv heads of model evenly: give torchrun a"),
    ],
)
def test_what_ranks_cannot_do_is_refused_by_all_and_said_by_the_first(both, marker, more, count, sentence):
    (code, _, said), *others = both(marker, *more, told=environments(count)[:2])
    assert code == pytest.ExitCode.USAGE_ERROR
    [line] = [line for line in said.splitlines() if line.strip()]
    assert line.startswith("ERROR: ")
    assert sentence in line
    assert others == [(pytest.ExitCode.USAGE_ERROR, "", "")]
