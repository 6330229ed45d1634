"""Resampling whole clusters within datasets, and flipping signs: one pass serves every method and every figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Places = NDArray[np.intp]
DRAWS = 10_000
FEWEST, WEIGHTS = 2_000, 200_000_000
"""Over 20,000 samples fewer draws are made: draws × samples is at most this, but for the fewest, which tell a spread to
1.6 %."""
CHUNK = 2_000_000
"""Weights held at once: draws × samples of a dataset. Time does not depend on it, memory does."""
Mask = NDArray[np.bool_]
Rule = Literal["mean", "median"]


@dataclass(frozen=True)
class Design:
    """Which samples are drawn together, and from where: clusters (documents, conversations) within strata
    (datasets)."""

    datasets: list[Places]
    """The samples of each dataset."""
    strata: list[Places]
    """The same, but datasets with documents in common are one stratum, and so are those of one document: what has no
    spread of its own is drawn with others."""
    clusters: list[Places]
    """For each sample of a stratum its cluster there, 0 … count - 1."""
    counts: list[int]
    """Clusters of each stratum."""
    alike: list[list[Places]]
    """For each stratum the places within it of every dataset."""

    @property
    def df(self) -> int:
        """Clusters less strata: the degrees of freedom of a standard error."""
        return sum(self.counts) - len(self.counts)

    @property
    def independent(self) -> bool:
        """Whether every sample is a cluster of its own."""
        return all(len(at) == count for at, count in zip(self.strata, self.counts, strict=True))

    @classmethod
    def of(cls, datasets: Sequence[str], clusters: Sequence[str]) -> Design:
        """Of one dataset and one cluster name a sample; a name that two datasets share is one document."""
        of_dataset, of_cluster = _codes(datasets), _codes(clusters)
        stratum = _strata(of_dataset, of_cluster)[of_dataset]
        strata = [np.flatnonzero(stratum == code) for code in np.unique(stratum)]
        within = [np.unique(of_cluster[at], return_inverse=True)[1] for at in strata]
        counts = [int(codes.max()) + 1 for codes in within]
        whole = [np.flatnonzero(of_dataset == code) for code in range(int(of_dataset.max()) + 1)]
        alike = [[np.flatnonzero(of_dataset[at] == code) for code in np.unique(of_dataset[at])] for at in strata]
        return cls(whole, strata, within, counts, alike)

    @classmethod
    def alone(cls, n: int) -> Design:
        """Of ``n`` independent samples of one dataset."""
        return cls.of([""] * n, [str(i) for i in range(n)])

    def per_cluster(self, columns: Floats) -> Floats:
        """Column sums of every cluster, (clusters, m), from (n, m)."""
        found = []
        for at, clusters, count in zip(self.strata, self.clusters, self.counts, strict=True):
            sums = np.zeros((count, columns.shape[1]))
            np.add.at(sums, clusters, columns[at])
            found.append(sums)
        return np.concatenate(found)


def _strata(of_dataset: Places, of_cluster: Places) -> Places:
    """The stratum of every dataset, (datasets,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    sizes = (int(of_dataset.max()) + 1, int(of_cluster.max()) + 1)
    met = coo_array((np.ones(len(of_dataset)), (of_dataset, of_cluster)), shape=sizes).tocsr()
    stratum = connected_components(met @ met.T, directed=False)[1].astype(np.intp)
    counts = np.array([len(np.unique(of_cluster[stratum[of_dataset] == s])) for s in range(int(stratum.max()) + 1)])
    lone = counts == 1
    if lone.sum() == 1 and len(counts) > 1:  # it joins the smallest of the others
        lone[np.argmin(np.where(lone, counts.max() + 1, counts))] = True
    return np.where(lone[stratum], -1, stratum)


def _codes(names: Sequence[str]) -> Places:
    known: dict[str, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names], dtype=np.intp)


ROUNDING = 1e-12
"""By how much the mean of equal scores may come out above them."""


def eligible(design: Design, base: Floats, rule: Rule = "mean") -> Mask:
    """(n,): whose baseline score is over 0 and at least the mean (or median) of its dataset."""
    found = np.zeros(len(base), dtype=np.bool_)
    for at in design.datasets:
        level = base[at].mean() - ROUNDING if rule == "mean" else np.median(base[at])
        found[at] = (base[at] >= level) & (base[at] > 0)
    return found


@dataclass(frozen=True)
class Drawn:
    """What the draws gave: sums over all samples, (draws, columns), and over those that were eligible in each draw."""

    sums: Floats
    eligible: Floats
    """(draws, conditional columns)"""


def bootstrap(
    design: Design,
    columns: Floats,
    base: Floats | None = None,
    conditional: Floats | None = None,
    rule: Rule = "mean",
    draws: int = DRAWS,
    seed: int = 0,
) -> Drawn:
    """Weighted column sums of ``draws`` resamples, of fewer over many samples. ``columns`` is (n, m); a sample counts
    for ``conditional``, (n, k), where its ``base`` is over 0 and at least the mean (or median) of its dataset *in that
    draw*.

    One cluster fewer than a dataset has is drawn, each weighted n / (n - 1), so the variance of a mean is unbiased
    (Rao and Wu 1988, Resampling inference with complex survey data).
    """
    draws = min(draws, max(FEWEST, WEIGHTS // max(len(columns), 1)))
    conditional = np.empty((len(columns), 0)) if conditional is None else conditional
    sums, among = np.zeros((draws, columns.shape[1])), np.zeros((draws, conditional.shape[1]))
    parts = zip(design.strata, design.clusters, design.counts, design.alike, strict=True)
    for number, (at, clusters, count, alike) in enumerate(parts):
        mine, some = np.ascontiguousarray(columns[at]), np.ascontiguousarray(conditional[at])
        for rows, weights in _weights(count, len(at), draws, np.random.default_rng([seed, number])):
            spread = weights if len(at) == count else weights[:, clusters]
            scale = count / max(count - 1, 1)
            sums[rows] += scale * (spread @ mine)
            if base is None or not some.shape[1]:
                continue
            for here in alike:
                level, drawn = base[at][here], spread if len(alike) == 1 else spread[:, here]
                allowed = (level >= _threshold(drawn, level, rule)[:, None]) & (level > 0)
                among[rows] += scale * (np.where(allowed, drawn, 0.0) @ some[here])
    return Drawn(sums, among)


def _weights(count: int, samples: int, draws: int, rng: np.random.Generator) -> Iterator[tuple[slice, Floats]]:
    """How often each of ``count`` clusters is drawn, in chunks of (draws, count)."""
    step = max(1, min(draws, CHUNK // samples))
    size = max(count - 1, 1)
    for start in range(0, draws, step):
        rows = slice(start, min(start + step, draws))
        many = rows.stop - rows.start
        drawn = rng.integers(0, count, size=(many, size))
        drawn += np.arange(many)[:, None] * count
        yield rows, np.bincount(drawn.ravel(), minlength=many * count).reshape(many, count).astype(np.float64)


def _threshold(weights: Floats, level: Floats, rule: Rule) -> Floats:
    """The weighted mean or median of ``level``, (n,), in each draw, (draws,)."""
    total = np.maximum(weights.sum(1), np.nextafter(0, 1))  # a dataset may be drawn not at all
    if rule == "mean":
        return np.asarray(weights @ level / total - ROUNDING)
    order = np.argsort(level, kind="stable")
    below, ordered = weights[:, order].cumsum(1), level[order]
    lower = ordered[(below >= total[:, None] / 2).argmax(1)]
    upper = ordered[(below > total[:, None] / 2).argmax(1)]
    return np.asarray((lower + upper) / 2)


EXACT = 13
"""Clusters up to which all 2ⁿ signs are tried."""


def sign_flip(design: Design, columns: Floats, draws: int = DRAWS, seed: int = 0) -> Floats:
    """Two-sided p of each column's mean being 0, (m,), for ``columns`` (n, m) of differences whose signs are
    exchangeable under the null: flips whole clusters, all 2ⁿ ways where that is few, else ``draws`` random ones (never
    p = 0)."""
    totals = design.per_cluster(columns)
    seen = np.abs(totals.sum(0))
    scale = 1 - 1e-9  # sums of the same numbers in another order differ by rounding
    n, exact = len(totals), len(totals) <= EXACT
    flips = 2**n if exact else draws
    step = max(1, min(flips, CHUNK // n))
    rng, reached = np.random.default_rng([seed, n]), np.zeros(columns.shape[1])
    for start in range(0, flips, step):
        many = min(step, flips - start)
        if exact:
            bits = ((np.arange(start, start + many)[:, None] >> np.arange(n)) & 1).astype(np.uint8)
        else:
            drawn = np.frombuffer(rng.bytes(many * -(-n // 8)), dtype=np.uint8).reshape(many, -1)
            bits = np.unpackbits(drawn, axis=1, count=n)
        reached += (np.abs(2.0 * (bits.astype(np.float64) @ totals) - totals.sum(0)) >= scale * seen).sum(0)
    return np.asarray(reached / flips if exact else (1 + reached) / (1 + flips))
