"""The cpu backend under the compiler's address and undefined-behaviour sanitizers, in a program of its own."""

import subprocess
from pathlib import Path

import pytest
import torch

from kvsuite.kernels.context import LayerContext
from kvsuite.kernels.cpu import build
from kvsuite.kernels.cpu.native import macros
from kvsuite.methods import parse
from suites.checks.depth import depth

SANITIZE = ["-std=c++17", "-O1", "-g", "-w", "-ffp-contract=off", "-fsanitize=address,undefined"]


QUICK = [("full", 64, ""), ("int4", 64, "-march=native -mno-avx512f"), ("kivi:bits=4", 64, "-march=native")]
OTHERS = [
    ("full", 64, "-march=native"),
    ("int8", 64, "-march=native"),
    ("int4", 128, "-march=native"),
    ("fp8:per=token", 32, "-march=native"),
    ("int8:rotate=hadamard", 64, "-march=native"),
    ("turboquant:bits=k4v4", 64, "-march=native"),
    ("turboquant:bits=k4v4", 64, "-march=native -mno-avx512f"),
    ("turboquant:bits=k4v4", 64, ""),
    ("q8_0", 64, "-march=native"),
    ("q8_0", 64, "-march=native -mno-avx512f"),
    ("q8_0", 128, ""),
    ("q8_0:rotate=hadamard", 64, "-march=native"),
    ("nvfp4", 64, "-march=native"),
    ("nvfp4", 64, "-march=native -mno-avx512f"),
    ("nvfp4:scale=4over6", 96, ""),
    ("kivi:bits=4", 64, ""),
    ("kivi:bits=2", 64, "-march=native -mno-avx512f"),
]
"""Codec, head dimension, and for which CPU: this one, as if it had AVX2 alone, or any."""


@pytest.mark.parametrize(("text", "dim", "flags"), QUICK + depth([], OTHERS))
def test_nothing_is_read_or_written_out_of_place(tmp_path, text, dim, flags):
    try:
        command = build.executable()
    except build.BuildError as error:
        pytest.skip(str(error))
    layer = LayerContext(0, 6, 2, dim, torch.bfloat16, torch.bfloat16, torch.device("cpu"))
    defined = [f"-D{name}={value}" for name, value in macros(layer, *parse(text).codec.specs(layer)).items()]
    driver, program = Path(__file__).with_name("cpu_driver.cpp"), tmp_path / "driver"
    made = [
        *command,
        *SANITIZE,
        *flags.split(),
        *defined,
        f"-I{build.SOURCES}",
        str(driver),
        "-fno-sanitize-recover=all",
        "-o",
        str(program),
    ]
    done = subprocess.run(made, capture_output=True, text=True, timeout=300, check=False)
    if "cannot find" in done.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert done.returncode == 0, done.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-3000:]
    assert float(ran.stdout) > 100
