"""A run's samples and its model once more, as the run had them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvsuite import models, tasks
from kvsuite.errors import UsageError
from kvsuite.methods import Method
from kvsuite.readers.run import answers
from kvsuite.records import Run
from kvsuite.runs.here import Here
from kvsuite.runs.setting import Setting
from kvsuite.tasks import Sample, Task


def here(run: Run, given: Path | None, methods: Sequence[Method] = ()) -> Here:
    """The model that answered, one sequence at a time; ``given`` is its folder, where it is not the default. Nothing is
    loaded yet. Raises UsageError for another model."""
    was = run.facts["model"]
    if given is None and was["name"] != models.DEFAULT:
        raise UsageError(f"{run.folder} was answered by {was['name']}: say where it is, --model FOLDER")
    folder = models.located(given) if given else models.default_model()
    if models.fingerprint(folder) != was["fingerprint"]:
        raise UsageError(f"{folder} is not the model that answered {run.folder} ({was['name']})")
    s, dtype = run.facts["settings"], run.facts["environment"]["compute_dtype"]
    setting = Setting(
        folder, tuple(methods), dtype, s["device"], s["backend"], 1,
        s["compress"], s["cap"], s["temperature"], s.get("repeats", 1), s["seed"], timeout=math.inf, memory=math.inf,
    )  # fmt: skip
    return Here(setting)


def samples(
    run: Run, where: Here, wanted: Mapping[str, Collection[str]], made: Collection[str] = ()
) -> dict[Task, list[Sample]]:
    """Those of ``wanted``, ids by task, made as the run made them. ``made``: tasks without a name of their own, as they
    were given to the run (``hub:…``, ``jsonl:…``). Raises UsageError for other texts, and tasks that nobody knows."""
    settings, found = run.facts["settings"], dict[Task, list[Sample]]()
    given = {task.name: task for task in map(tasks.task, made)}

    def tokens(text: str) -> int:
        return len(where.tokenizer(text, add_special_tokens=False)["input_ids"])

    for name, ids in wanted.items():
        if name not in given and name not in tasks.names():
            said = f"say where they come from, --task hub:{name} or --task jsonl:FILE"
            raise UsageError(f"{run.folder} has samples of {name}, which is no task of kvsuite's: {said}")
        task = given.get(name) or tasks.task(name)
        if task.fingerprint() != run.facts["texts"][task.name]:
            raise UsageError(f"the texts of {task.name} are not those of {run.folder}")
        task.limit, task.cap = models.model_limit(where.setting.model), settings["cap"]
        count = settings["samples"].get(task.name, settings["samples"][""])
        every = task.samples(count, settings["length"], settings["seed"], tokens)
        found[task] = [sample for sample in every if sample.id in ids]
    return found


def texts(
    run: Run, given: Path | None, keys: Sequence[tuple[str, str]]
) -> tuple[dict[tuple[str, str], dict[str, Any]], str]:
    """What is asked and expected in these samples, by task and id, as a line of ``jsonl:FILE`` holds it – or why it
    cannot be told. Raises UsageError where the prompts that are made now are not those that were answered."""
    if "servers" in run.facts:
        return {}, f"{run.folder} was answered by servers, whose tokenizer is not known"
    hashes = {(a.task, a.sample): a.prompt_hash for a in answers(run, "samples")}
    wanted: dict[str, set[str]] = {}
    for name, sample in keys:
        wanted.setdefault(name, set()).add(sample)
    if made := wanted.keys() - set(tasks.names()):
        return (
            {},
            f"{', '.join(sorted(made))}: no task of kvsuite's, and {run.folder} does not say where they come from",
        )
    found = {}
    for task, some in samples(run, here(run, given), wanted).items():
        for one in some:
            if hashes[task.name, one.id] not in ("", one.prompt_hash):
                raise UsageError(f"sample {one.id} of {task.name} is not the one that {run.folder} holds")
            said = [*one.before, ("user", one.context + one.question)]
            said += [("assistant", one.opening)] if one.opening else []
            found[task.name, one.id] = {
                "messages": [{"role": role, "content": text} for role, text in said],
                "reference": one.reference,
                "max_new_tokens": one.max_new_tokens,
            }
    return found, ""
