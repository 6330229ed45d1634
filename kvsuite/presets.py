"""How much a run does: the defaults of every option, by preset."""

from __future__ import annotations

from typing import Any

# What decides has the samples that clear a method without an effect 4 times of 5 (``kvsuite plan``); what has them not
# can only convict. docs/statistics.md says why each is where it is.
DECIDING = (
    "kl=0.02,perplexity=0.02,reference=0.1,quality=0.05,broken=0.05,length=0.15,truncation=0.03,speed=0.05,"
    "veto=reference+broken+length+truncation"
)
SMOKE: dict[str, Any] = {
    "model": "",
    "methods": "full,jitter,jitter:seed=1,int8,fp8,kivi:bits=4,int4,kivi:bits=2,"
    "streaming-llm:budget=128,h2o:budget=128",
    "compress": "prompt",
    "batch": "8",
    "length": "512,1024",
    "cells": "",
    "modes": "",
    "tasks": "document,needle,chat",
    "samples": "48,chat=8,document=16",
    "cap": 96,
    "temperature": 1.0,
    "repeats": 1,
    "reference-temperatures": "",
    "rounds": 9,
    "timeout": 120,
    "memory": "",
    "seed": 0,
    "dtype": "auto",
    "device": "cpu",
    "backend": "auto",
    "margins": "kl=0.02,perplexity=0.02,reference=0.1,quality=0.1,broken=0.1,length=0.15,truncation=0.03,speed=0.05,"
    "veto=reference+quality+broken+length+truncation",
    "gate": [],
    "against": "",
    "undecided": "warns",
    "strict": "yes",
    "acknowledged": "",
    "run": "",
    "resume": "",
    "learn": "",
    "executor": "here",
    "ray-address": "",
    "plugin": [],
    "baseline": "",
    "variant": [],
    "profile": "",
    "serve": "alone",
    "arrivals": "closed",
    "workload": "",
    "prefix": "cold",
    "end": "natural",
    "requests": 0,
    "goodput": "",
    "startup": 600,
}
STANDARD = SMOKE | {
    "methods": SMOKE["methods"]
    + ",random:budget=256,streaming-llm:budget=256,h2o:budget=256,h2o:budget=256+kivi:bits=4",
    "batch": "1,8",
    "length": "512,1024,2048,4000",
    "tasks": "document,reference:needle,needle,multi-needle,json,summarize,chat",
    "samples": "48,needle=144,chat=40,document=24,reference:needle=64",
    "margins": DECIDING,
    "cap": 512,
    "rounds": 10,
    "timeout": 900,
}
PAPER_CELLS = ",".join(
    f"{batch}x{length}"
    for batches, lengths in (  # Section 4.1: short, by batch, long, long by batch
        ((1,), (256, 512, 1024, 2048, 3072, 4000)),
        ((2, 4, 8, 16), (1024,)),
        ((1,), (4096, 6144, 8192, 10240)),
        ((2, 4, 8, 16), (6144,)),
    )
    for batch in batches
    for length in lengths
)
PAPER = (
    SMOKE
    | {  # what of App. A.3 fits one machine; StreamingLLM 64 + 448, H2O 64 + 448, KIVI G 32 R 128, cap 1024, T 1
        "methods": "full,jitter,jitter:seed=1,kivi:bits=4,kivi:bits=2,"
        "streaming-llm:budget=512,sinks=64,h2o:heavy=64,recent=448,streaming-llm:budget=256,h2o:budget=256",
        "batch": "1,2,4,8,16",
        "length": "1024,2048,4000,6144",
        "cells": PAPER_CELLS,
        "modes": "eager,sdpa",
        "tasks": STANDARD["tasks"],
        "samples": "48,needle=144,chat=80,document=32,reference:needle=192",
        "margins": f"{DECIDING},veto=broken+length+truncation",
        "cap": 1024,
        "rounds": 12,
        "timeout": 3600,
    }
)
PRESETS = {"smoke": SMOKE, "standard": STANDARD, "paper": PAPER}
