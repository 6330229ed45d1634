"""fp8 against bf16 on a GPU left out: learned from GPUs with the same kernels, never from others unasked."""

import json
from dataclasses import replace

import numpy as np
import pytest

from kvsuite.cli import main
from kvsuite.errors import UsageError
from kvsuite.predict import kernels
from kvsuite.readers import aiconfigurator
from kvsuite.readers.aiconfigurator import Formats

pytest.importorskip("sklearn")
CELLS = [
    (b, int(2 ** (n / 2)), 32, kv, 128) for b in (1, 2, 4, 8, 16, 32, 64) for n in range(10, 29) for kv in (2, 4, 8)
]
SLOWER = 1.3
"""What a step takes at least with fp8, over bf16."""


def made_up(gpu, bandwidth, kernel="k", capability=90, noise=0.01):
    """ms: a start, and bytes over bandwidth: fp8 is slower for short contexts and nearly twice as fast at last."""
    rng = np.random.default_rng(len(gpu))
    cells = np.array(CELLS)
    batch, length, _, kv, dim = cells.T.astype(float)
    reading = 4 * batch * length * kv * dim / bandwidth * 1000
    start = 0.005
    plain, fp8 = (start * k + reading * part for k, part in ((1, 1), (SLOWER, 0.5)))
    drawn = np.exp(rng.normal(0, noise, (2, len(cells))))
    return Formats(gpu, "vllm", "1.0", kernel, bandwidth, capability, cells, plain * drawn[0], fp8 * drawn[1])


@pytest.fixture
def tables(monkeypatch):
    """Two GPUs with one kernel, and a third with another."""
    some = [made_up("h100_sxm", 3.3e12), made_up("h200_sxm", 4.8e12), made_up("l40s", 0.9e12, "other", 89)]
    monkeypatch.setattr(kernels, "formats", lambda systems, engine: some)
    return some


def test_a_gpu_with_the_same_kernel_is_predicted_and_another_kernel_is_refused(tables, tmp_path):
    rows, refused = kernels.left_out(tmp_path, "vllm")
    assert [(row.gpu, row.learned_from, row.extrapolated) for row in rows] == [
        ("h100_sxm", ("h200_sxm",), False), ("h200_sxm", ("h100_sxm",), False),
    ]  # fmt: skip
    assert refused == ["l40s: no other GPU was measured with other"]
    for row in rows:
        assert row.n == len(CELLS)
        assert row.error < 0.03
        assert row.error < row.nearest_error
        assert row.bytes_error > 0.15
        assert row.sign > 0.9
    rows, refused = kernels.left_out(tmp_path, "vllm", extrapolate=True)
    assert (rows[-1].gpu, rows[-1].extrapolated, refused) == ("l40s", True, [])


def test_gpus_of_the_same_generation_are_learned_from_where_there_are_any(tables, tmp_path):
    tables[2] = replace(tables[2], kernels="k")
    rows, _ = kernels.left_out(tmp_path, "vllm")
    assert {row.gpu: row.learned_from for row in rows} == {
        "h100_sxm": ("h200_sxm",), "h200_sxm": ("h100_sxm",), "l40s": ("h100_sxm", "h200_sxm"),
    }  # fmt: skip


def test_shuffled_ratios_cannot_be_told(tables, tmp_path):
    """Both GPUs' fp8 times are dealt anew: what is predicted is no nearer than the median is."""
    rng = np.random.default_rng(0)
    for at in (0, 1):
        ratio = tables[at].fp8 / tables[at].plain
        tables[at] = replace(tables[at], fp8=tables[at].plain * rng.permutation(ratio))
    for row, one in zip(kernels.left_out(tmp_path, "vllm")[0], tables, strict=False):
        speed = one.plain / one.fp8
        assert row.error > 0.9 * np.median(np.abs(np.median(speed) / speed - 1))


def test_tables_are_read_by_pairs_of_kernels(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("yaml")
    from pyarrow import parquet

    def row(dtype, kernel, batch, ms, isl=1):
        return {
            "kernel_source": kernel, "batch_size": batch, "isl": isl, "beam_width": 1, "num_heads": 32, "latency": ms,
            "num_key_value_heads": 8, "head_dim": 128, "attn_dtype": "bfloat16", "kv_cache_dtype": dtype, "step": 63,
        }  # fmt: skip

    nameless = [("bfloat16", 4.0, 1), ("fp8", 2.0, 1), ("fp8", 7.0, 2)]
    measured = {
        "vllm": [
            row("bfloat16", "a", 1, 4.0),
            row("fp8", "a", 1, 2.0),
            row("fp8", "b", 1, 1.0),
            row("fp8", "a", 2, 9.0),
        ],
        "trtllm": [row(dtype, "torch_flow", 1, ms, isl) for dtype, ms, isl in nameless],
    }
    for engine, rows in measured.items():
        file = tmp_path / "data" / "h100_sxm" / "attention" / engine / "1.0" / aiconfigurator.ATTENTION
        file.parent.mkdir(parents=True)
        parquet.write_table(pa.table({name: [r[name] for r in rows] for name in rows[0]}), file)
    (tmp_path / "h100_sxm.yaml").write_text("gpu:\n  mem_bw: 3\n  mem_capacity: 1\n  sm_version: 90\n")
    found = aiconfigurator.formats(tmp_path, "vllm")
    assert [(f.kernels, f.cells.tolist(), f.plain.tolist(), f.fp8.tolist()) for f in found] == [
        ("a", [[1, 64, 32, 8, 128]], [4.0], [2.0]), ("a, b", [[1, 64, 32, 8, 128]], [4.0], [1.0]),
    ]  # fmt: skip
    (alone,) = aiconfigurator.formats(tmp_path, "trtllm")
    assert alone.kernels == "torch_flow of generation 9"
    with pytest.raises(UsageError, match="unknown engine 'vlm': did you mean 'vllm'"):
        aiconfigurator.formats(tmp_path, "vlm")


def test_the_command(tables, tmp_path, capsys):
    asked = ["predict", "kernels", "--engine", "vllm", "--tables", str(tmp_path)]
    assert main([*asked, "--json"]) == 0
    assert [row["gpu"] for row in json.loads(capsys.readouterr().out)] == ["h100_sxm", "h200_sxm"]
    assert main([*asked, "--extrapolate"]) == 0
    assert "EXTRAPOLATED" in capsys.readouterr().out
