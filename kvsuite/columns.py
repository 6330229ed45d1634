"""One arm's answers as columns, wherever they come from: what the statistics work on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvsuite.errors import UsageError

Floats = NDArray[np.float64]
Key = tuple[str, str]
"""Dataset and sample."""
SLACK = 1e-9
"""By how much rounding may carry a score over 1 or below 0."""
NAMED = 5
"""How many ids a message names."""


@dataclass(frozen=True)
class Arm:
    """Answers of one method (or of the baseline, or of a control), one entry a sample; all columns are (n,)."""

    source: str
    """How the user named it."""
    keys: list[Key]
    cluster: list[str]
    """The document or conversation a sample belongs to: samples of one cluster are not independent."""
    score: Floats
    """0 to 1; NaN where there was nothing to compare with."""
    tokens: Floats
    """Length of the answer; NaN where unknown, as in the following columns."""
    cap: Floats
    """The most tokens the answer could have."""
    capped: Floats
    """1 where the cap ended it, else 0."""
    text: list[str | None]
    files: dict[str, str] = field(default_factory=dict)
    """Dataset → the file it was read from, for messages."""
    types: dict[str, str] = field(default_factory=dict)
    """Dataset → task type, where the source says."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def dataset(self) -> list[str]:
        """The dataset of every entry."""
        return [dataset for dataset, _ in self.keys]

    def take(self, at: Sequence[int]) -> Arm:
        """The entries at these places, in this order."""
        columns = ("score", "tokens", "cap", "capped")
        places = np.asarray(at, dtype=np.intp)
        return Arm(
            source=self.source,
            keys=[self.keys[i] for i in at],
            cluster=[self.cluster[i] for i in at],
            text=[self.text[i] for i in at],
            files=self.files,
            types=self.types,
            **{name: getattr(self, name)[places] for name in columns},
        )


def stack(repeats: Sequence[Arm]) -> Arm:
    """Several answers to each prompt as one arm: they belong to the prompt's cluster."""
    if len(repeats) == 1:
        return repeats[0]
    first, columns = repeats[0], ("score", "tokens", "cap", "capped")
    return Arm(
        source=first.source,
        keys=[(d, f"{s} #{k}") for k, arm in enumerate(repeats) for d, s in arm.keys],
        cluster=[c for arm in repeats for c in arm.cluster],
        text=[t for arm in repeats for t in arm.text],
        files=first.files,
        types=first.types,
        **{name: np.concatenate([getattr(arm, name) for arm in repeats]) for name in columns},
    )


class ArmBuilder:
    """Builds an arm entry by entry and refuses what cannot be a result, by file and id."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._rows: dict[Key, tuple[Any, ...]] = {}
        self._files: dict[str, str] = {}
        self._types: dict[str, str] = {}

    def add(
        self,
        file: object,
        dataset: str,
        sample: object,
        *,
        score: Any = None,
        tokens: float | None = None,
        cap: float | None = None,
        capped: bool | None = None,
        text: str | None = None,
        cluster: str = "",
        type: str = "",
    ) -> None:
        """One answer. Raises UsageError for no id, an id that was there before and a score that is not a number from 0
        to 1."""
        if sample is None or sample == "":
            raise UsageError(f"{file}: a sample of {dataset} has the id {sample!r}, which is none")
        key = (dataset, str(sample))
        if key in self._rows:
            raise UsageError(f"{file}: sample {sample} of {dataset} is there twice (first in {self._files[dataset]})")
        if score is not None and not (
            isinstance(score, (int, float)) and not isinstance(score, bool) and -SLACK <= score <= 1 + SLACK
        ):
            raise UsageError(f"{file}: sample {sample} of {dataset} has the score {score!r}, not a number from 0 to 1")
        self._files.setdefault(dataset, str(file))
        if type:
            self._types[dataset] = type
        self._rows[key] = (cluster or f"{dataset} {sample}", text, score, tokens, cap, capped)

    def __len__(self) -> int:
        return len(self._rows)

    def arm(self) -> Arm:
        """What was gathered. Raises UsageError where that is nothing."""
        if not self._rows:
            raise UsageError(f"{self._source}: there is no answer in it")
        cluster, text, *columns = zip(*self._rows.values(), strict=True)
        score, tokens, cap, capped = (np.array(column, dtype=np.float64) for column in columns)
        return Arm(
            source=self._source,
            keys=list(self._rows),
            cluster=list(cluster),
            score=score,
            tokens=tokens,
            cap=cap,
            capped=capped,
            text=list(text),
            files=self._files,
            types=self._types,
        )


def align(arms: Sequence[Arm], allow_missing: bool = False) -> tuple[list[Arm], list[str]]:
    """The arms with the same samples in the same order, that of the first, and one sentence for all that was left out.
    Raises UsageError, naming file and id, where an arm lacks a sample of another – unless ``allow_missing``, which
    drops what is not shared by all."""
    first = arms[0]
    if all(arm.keys == first.keys for arm in arms[1:]):
        return list(arms), []
    places = [{key: at for at, key in enumerate(arm.keys)} for arm in arms]
    shared = [key for key in first.keys if all(key in place for place in places[1:])]
    everything = dict.fromkeys(key for arm in arms for key in arm.keys)
    kept = set(shared)
    lost = [key for key in everything if key not in kept]
    if lost and not allow_missing:
        raise UsageError(_missing(arms, places, lost) + "; --allow-missing compares what all have")
    if not shared:
        raise UsageError(f"{' and '.join(arm.source for arm in arms)} have no sample in common")
    aligned = [arm.take([place[key] for key in shared]) for arm, place in zip(arms, places, strict=True)]
    return aligned, _left_out(lost, everything)


def kinds(arms: Sequence[Arm]) -> dict[str, list[Arm]]:
    """Aligned arms, apart where some datasets have scores and others lengths: a run's tasks and its chats, by the names
    of their datasets; "answers" where there is one part alone. What has neither in all arms is a part of its own."""
    places: dict[str, list[int]] = {}
    for at, dataset in enumerate(arms[0].dataset):
        places.setdefault(dataset, []).append(at)
    found: dict[tuple[bool, ...], list[str]] = {}
    for dataset, mine in places.items():
        known = [all(not np.isnan(getattr(arm, name)[mine]).any() for arm in arms) for name in ("score", "tokens")]
        found.setdefault(tuple(known), []).append(dataset)
    if len(found) == 1:
        return {"answers": list(arms)}
    parts = [(", ".join(names), [at for name in names for at in places[name]]) for names in found.values()]
    return {what: [replace(arm.take(at), source=f"{arm.source} ({what})") for arm in arms] for what, at in parts}


def _missing(arms: Sequence[Arm], places: Sequence[dict[Key, int]], lost: Sequence[Key]) -> str:
    """Who lacks the first sample that not all have, and who has it."""
    dataset, sample = key = lost[0]
    owner = next(arm for arm, place in zip(arms, places, strict=True) if key in place)
    lacking = next(arm for arm, place in zip(arms, places, strict=True) if key not in place)
    more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
    if dataset not in lacking.files:
        known = ", ".join(sorted(lacking.files))
        return f"{lacking.source} has no dataset {dataset} ({owner.files[dataset]} has); it has {known}"
    where = lacking.files[dataset]
    return f"{where} has no sample {sample} of {dataset}, which {owner.files[dataset]} has{more}"


def _left_out(lost: Sequence[Key], everything: Iterable[Key]) -> list[str]:
    """What ``--allow-missing`` dropped, dataset by dataset."""
    said = []
    everything = list(everything)
    for dataset in dict.fromkeys(d for d, _ in lost):
        ids = [sample for d, sample in lost if d == dataset]
        total = sum(d == dataset for d, _ in everything)
        named = ", ".join(ids[:NAMED]) + (" …" if len(ids) > NAMED else "")
        said.append(f"left out of {dataset}: {len(ids)} of {total} samples that not all have ({named})")
    return said
