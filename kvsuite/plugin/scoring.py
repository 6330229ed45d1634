"""How likely the uncompressed baseline finds what every arm answered: one more sign of garbage, where servers
return token ids and the baseline's says how likely a prompt's tokens are. A variant is never asked about itself: what
it reads as a prompt need not have been in its cache."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvsuite.engines.request import Reply
from kvsuite.engines.server import Server
from kvsuite.errors import UsageError
from kvsuite.plugin.servers import BASELINE
from kvsuite.records import Scored

BUDGET = 120.0
"""Seconds that all of it may take: vLLM reads some 140 tokens a second so on two cores of a CPU."""


class Scoring:
    """Answers as token ids, until they are scored."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], dict[str, Reply]] = {}

    def hear(self, arm: str, task: str, reply: Reply) -> None:
        """Keep an answer to a task's sample, if its tokens are known."""
        if reply.ids and not reply.error:
            self._said.setdefault((task, reply.id), {})[arm] = reply

    @property
    def asked(self) -> list[tuple[str, str]]:
        """Tasks and samples that the baseline and another arm answered, those first of whose tokens most are the
        answer's."""
        both = [key for key, arms in self._said.items() if len(arms) > 1 and self._prompt(key)]
        return sorted(both, key=lambda key: len(self._prompt(key)) / len(self._said[key][BASELINE].ids))

    def _prompt(self, key: tuple[str, str]) -> list[int]:
        base = self._said[key].get(BASELINE)
        return base.prompt_ids if base else []

    async def score(self, baseline: Server, record: Callable[[Scored], None]) -> None:
        """One record an answer, all arms of a sample before the next one, as long as the budget lasts; what several
        arms answered to the letter is read once. An answer that has none ends it: a server that cannot say it once
        cannot say it at all."""
        end = time.monotonic() + BUDGET
        for task, sample in self.asked:
            if time.monotonic() > end:
                return
            known: dict[tuple[int, ...], list[float]] = {}
            for arm, reply in self._said[task, sample].items():
                ids = tuple(reply.ids)
                try:
                    if ids not in known:
                        known[ids] = await baseline.likelihoods(self._prompt((task, sample)), ids)
                except (UsageError, OSError) as error:
                    record(Scored(arm, "failed", str(error), task=task, sample=sample))
                    return
                record(Scored(arm, task=task, sample=sample, logs=[round(x, 4) for x in known[ids]]))
