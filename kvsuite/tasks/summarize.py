"""summarize: a paper of computational linguistics, cut to length, and one sentence on its problem, method or result."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvsuite import models, scorers
from kvsuite.errors import UsageError
from kvsuite.tasks.base import Sample, Task
from kvsuite.tasks.messages import first_sentences

ASPECTS = {
    "challenge": "the problem that it addresses",
    "approach": "the approach that it takes",
    "outcome": "the results that it reports",
}
"""Of which ACLSum has a summary each, and what is asked for."""
QUESTION = "\n\nSummarize the paper above in one sentence: {aspect}. Answer with that sentence only."
FIRST = 2016
"""From this year on, papers of the ACL are licensed under CC BY."""


class Summarize(Task):
    """Papers of ACLSum (Takeshita et al. 2024) from 2016 on: title, abstract and body up to the length. Scores ROUGE-L
    against what a human wrote of the aspect asked for; answers about other papers share words with it, too."""

    name = "summarize"
    type = "summarization"

    def fetch(self) -> list[Path]:
        folder = models.papers()
        texts = [file for file in (folder / "paper_jsons").glob("*.json") if year(file.stem) >= FIRST]
        return sorted([*folder.glob("*.jsonl"), *texts])

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        files = self.fetch()
        rows = [
            json.loads(line)
            for file in files
            if file.suffix == ".jsonl"
            for line in file.read_text(encoding="utf-8").splitlines()
        ]
        summaries = {row["id"]: row["summary"] for row in rows}
        papers = [file for file in files if file.stem in summaries]
        random.Random(f"summarize {seed}").shuffle(papers)
        found: list[Sample] = []
        aspects = list(ASPECTS)
        for turn in range(len(aspects)):  # a second aspect of a paper only where there are too few papers
            for at, paper in enumerate(papers):
                if len(found) == count:
                    return found
                length, aspect = lengths[len(found) % len(lengths)], aspects[(at + turn) % len(aspects)]
                question = QUESTION.format(aspect=ASPECTS[aspect])
                taken = first_sentences(_text(paper), length - tokens(question), tokens)
                if taken:
                    name = f"summarize-l{length}-{paper.stem}-{aspect}"
                    reference = summaries[paper.stem][aspect]
                    found.append(Sample(name, " ".join(taken), question, reference, 96, cluster=paper.stem))
        if len(found) == count:
            return found
        raise UsageError(f"the papers of ACLSum do not make {count} samples of {max(lengths)} tokens")

    def score(self, sample: Sample, answer: str) -> float:
        return scorers.rouge_l(answer, sample.reference)


def year(paper: str) -> int:
    """When the ACL published a paper of that id in its Anthology: ``2020.acl-main.443``, ``P18-1001``."""
    if found := re.match(r"\d{4}(?=\.)", paper):
        return int(found[0])
    short = int(paper[1:3])
    return short + (1900 if short > 60 else 2000)


def _text(paper: Path) -> str:
    found: dict[str, Any] = json.loads(paper.read_text(encoding="utf-8"))
    return "\n".join([found["title"] + ".", found["abstract"], *(p["text"] for p in found["pdf_parse"]["body_text"])])
