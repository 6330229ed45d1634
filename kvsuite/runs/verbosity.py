"""Is a longer answer to a chat also a worse one? The answers of a run that is there are embedded, and how close in
meaning they are to a reference answer and to the baseline's is appended to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvsuite import models, tasks
from kvsuite.analysis.verbosity import SEEN, arms, job
from kvsuite.errors import UsageError
from kvsuite.records import Answer, Run, RunFolder, Similarity
from kvsuite.tasks import after_thinking

NAME = "all-MiniLM-L6-v2"
Embedded = tuple[NDArray[np.float32], list[int]]
"""Of n texts: (n, d) vectors of length 1, and how many word pieces each text has."""
Embed = Callable[[Sequence[str]], Embedded]


class Verbosity:
    """What is to be compared in a run. Nothing is loaded before `similarities`."""

    def __init__(self, run: Run) -> None:
        """Raises UsageError where the run holds no answers to chats beside the baseline's."""
        done = {record.job for record in run.records if isinstance(record, Similarity) and not record.error}
        self.run, self.asked = run, dict[tuple[str, str], list[tuple[Answer, Answer]]]()
        """By task and sample, answers that are not compared yet, each with the baseline's last."""
        known = arms(run)
        if not any(known.values()):
            raise UsageError(f"{run.folder} holds no answers to chats beside the baseline's")
        pairs = [(a, b) for some in known.values() for arm in some for a, b in arm.apart]
        for a, b in {job(a): (a, b) for a, b in [*((b, b) for _, b in pairs), *pairs]}.values():
            if job(a) not in done:
                self.asked.setdefault((a.task, a.sample), []).append((a, b))

    def similarities(self, embed: Embed | None = None) -> Iterator[Similarity]:
        """One record an answer, sample by sample; they are appended to the run's. ``embed``: `MiniLM` if not given.
        Raises UsageError where that or the references cannot be had."""
        folder, known = RunFolder(self.run.folder), set(tasks.names())
        names = {task for task, _ in self.asked}
        references = {name: tasks.task(name).references() if name in known else {} for name in names}
        if not self.asked:
            return
        embed = embed or MiniLM()
        for (task, sample), pairs in self.asked.items():
            for found in _compared(pairs, references[task].get(sample), embed):
                folder.append(found)
                yield found


def _compared(pairs: Sequence[tuple[Answer, Answer]], reference: str | None, embed: Embed) -> Iterator[Similarity]:
    said = {job(a): after_thinking(a.text).strip() for pair in pairs for a in pair}
    texts = list(dict.fromkeys(text for text in (*said.values(), reference) if text))
    vectors, counts = embed(texts) if texts else (np.zeros((0, 1), np.float32), [])
    at = {text: place for place, text in enumerate(texts)}

    def cosine(one: str, other: str) -> float:
        return round(float(vectors[at[one]] @ vectors[at[other]]), 4) if one and other else 0.0

    for a, b in pairs:
        mine = said[job(a)]
        yield Similarity(
            a.method,
            task=a.task,
            sample=a.sample,
            repeat=a.repeat,
            embedder=NAME,
            pieces=counts[at[mine]] if mine else 0,
            reference=cosine(mine, reference) if reference else None,
            baseline=None if a is b else cosine(mine, said[job(b)]),
        )


class MiniLM:
    """all-MiniLM-L6-v2 as its model card says: the mean of the last hidden states of a text's first ``SEEN`` word
    pieces, scaled to length 1; float32, on the CPU."""

    def __init__(self) -> None:
        """Raises UsageError where it, or transformers, cannot be had."""
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UsageError(f"embedding answers needs {error.name}: pip install 'kvsuite[local]'") from error
        transformers.utils.logging.disable_progress_bar()
        folder = models.embedder()
        self._torch, self._tokenizer = torch, transformers.AutoTokenizer.from_pretrained(folder)
        self._model: Any = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def __call__(self, texts: Sequence[str]) -> Embedded:
        """See `Embedded`."""
        whole = self._tokenizer(list(texts), padding=False, truncation=False, verbose=False)["input_ids"]
        given = self._tokenizer(list(texts), padding=True, truncation=True, max_length=SEEN, return_tensors="pt")
        with self._torch.inference_mode():
            states = self._model(**given).last_hidden_state
        weight = given["attention_mask"].unsqueeze(-1).float()
        means = (states * weight).sum(1) / weight.sum(1)
        return self._torch.nn.functional.normalize(means).numpy(), [len(ids) for ids in whole]
