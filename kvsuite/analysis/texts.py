"""How answers read beside the baseline's: script, language, repetition, topic. Of any language; characters alone."""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np

from kvsuite.analysis.resample import Mask, Places

T = TypeVar("T")
LONG = 100
"""Characters from which an answer has a language and a topic."""
POOL, ORDERED = 2000, 15_000
"""Characters that others must have written before a text can be strange to them, and before its order can."""
END, SHORT = 600, 200
"""Bytes of an answer's end that are compressed, and fewer than which are not."""
TWICE = re.compile(r"(.{1,24})\1", re.DOTALL)
"""A piece, as long as a token may be, and at once the same again."""
RARE = 0.01
"""Of the baseline's letters, the share from which it uses a script."""
STRANGE, PROSE = 1.7, 3.0
"""A text is foreign at so many times the bits of the baseline's upper quartile, which counts as ``PROSE`` at least."""
MOULD, RANDOM = 2.0, 8.0
"""Below so many bits, answers are from one mould, beside which any free sentence is strange: only what reaches
``RANDOM`` is foreign then, and nothing can be told of an order."""
FAMILIAR, SOME = 0.2, 8
"""The share of words that the baseline's answers must have in common with those to other prompts, as a median, before a
text can lack them; and how many words it must have."""
COMMON, RARELY = 20, 0.05
"""Of the words of prose a quarter are the so many most common ones of other prose (Zipf's law); of random tokens hardly
any are. What has fewer than the second has no common words."""
LETTERS = re.compile(r"[^\W\d_]+")
BACK = 5.0
"""How many sequences weigh as much as what their endings say of the next character."""
ORDERS, WORDS = 5, 20
"""Other orders in which a text's words are put, and how many words it must have."""
SLOTS = 1 << 18
"""Sequences of characters are told apart by so many numbers."""
OTHERS, TENTH, PEERS = 200, 0.1, 7
"""Answers to other prompts that one is compared with at most; the share of them that may be as close as its own; and
how many it takes."""


def squeezed(text: str) -> float:
    """The compressed size of a text's end as a part of its size; 1 where it is too short to tell."""
    end = text.encode(errors="replace")[-END:]
    return len(zlib.compress(end)) / len(end) if len(end) >= SHORT else 1.0


def stuttered(text: str) -> float:
    """The share of a text that stands there twice in a row, piece by piece: prose comes to .05 to .1 by its double
    letters, every token twice to .95 or more. 0 where the text is too short to tell."""
    folded = " ".join(text.split())
    return sum(len(m[0]) for m in TWICE.finditer(folded)) / len(folded) if len(folded) >= LONG else 0.0


class Script:
    """Which letters the baseline uses."""

    def __init__(self, texts: Sequence[str]) -> None:
        kinds = _kinds("".join(texts))
        letters = {kind: count for kind, count in kinds.items() if kind not in ("digit", "symbol")}
        used = {kind for kind, count in letters.items() if count >= RARE * sum(letters.values())}
        self._used = used | {"digit"} if letters else None

    def strange(self, text: str) -> bool:
        """Whether most of a text is symbols or letters of other scripts. Where the baseline has numbers only, any
        letters will do."""
        seen = _kinds(text)
        odd = (n for kind, n in seen.items() if kind == "symbol" or (self._used and kind not in self._used))
        return 2 * sum(odd) > seen.total()


def _kinds(text: str) -> Counter[str]:
    """Visible characters by script; ``digit`` and ``symbol`` belong to none."""
    found: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if not character.isspace():
            found[_kind(character)] += count
    return found


@cache
def _kind(character: str) -> str:
    category = unicodedata.category(character)[0]
    if category == "N":
        return "digit"
    return unicodedata.name(character, "symbol").split()[0] if category in "LM" else "symbol"


def windows(text: str) -> list[str]:
    """A text in up to three parts of equal size, none shorter than ``LONG``: its start, its middle and its end."""
    count = min(max(len(text) // LONG, 1), 3)
    return [text[len(text) * k // count : len(text) * (k + 1) // count] for k in range(count)]


class NgramModel:
    """How surprising a text is, in bits a character, to whoever knows the baseline's answers to the other prompts: by
    three characters in a row (``most``), where these are unknown by two, by one. Prose of a model comes to 3 or 4, of
    another language to 5, random letters to 8. ``prompts``, (n,), numbers what ``texts`` are answers to: whoever knows
    an answer to a prompt is surprised by no other. ``again`` are further sane answers, in the same order."""

    def __init__(self, texts: Sequence[str], prompts: Places, again: Sequence[str] = (), most: int = 3) -> None:
        self._most, self._prompts = most, prompts.tolist()
        known: dict[int, dict[str, None]] = {prompt: {} for prompt in self._prompts}
        for answers in filter(None, (texts, again)):
            for prompt, text in zip(self._prompts, answers, strict=True):
                known[prompt][text] = None  # once, however often it was said
        self._own = {
            prompt: [np.unique(grams, return_counts=True) for grams in _grams(" ".join(said), most)]
            for prompt, said in known.items()
        }
        self._counts = [np.zeros(SLOTS) for _ in range(most)]
        self._total = 0.0
        for grams in self._own.values():
            self._add(grams, 1)
        bits = np.array([x for at, text in enumerate(texts) for x in self._surprises(at, windows(text))])
        self.known = not np.isnan(bits).all()
        """Whether there is enough of them to tell anything."""
        self.ordered = self._total >= ORDERED
        """Whether there is enough of them to tell an order."""
        usual = float(np.nanquantile(bits, 0.75)) if self.known else np.inf
        self._mould = usual < MOULD
        self._edge = RANDOM if self._mould else STRANGE * max(usual, PROSE)

    def foreign(self, texts: Sequence[str]) -> Mask:
        """(n, 3), one text a prompt: which are far more surprising than the baseline's own at their start, in their
        middle, at their end (``windows``)."""
        return _placed(texts, lambda at, text: [bits > self._edge for bits in self._surprises(at, windows(text))])

    def jumbled(self, texts: Sequence[str]) -> Mask:
        """(n,), one text a prompt: which are no less surprising than their words in another order. With four characters
        in a row, of sane answers of a 135M model it is a twentieth to a third; of words in random order five in six."""
        found = np.zeros(len(texts), np.bool_)
        for at, text in enumerate(texts):
            words, between = text.split(), " "
            if len(words) < WORDS:  # of scripts without spaces
                words, between = list("".join(words)), ""
            if len(words) >= WORDS and not self._mould:
                orders = np.random.default_rng(at).permuted([range(len(words))] * ORDERS, axis=1)
                shuffled = [between.join(words[place] for place in order) for order in orders.tolist()]
                own, *others = self._surprises(at, [between.join(words), *shuffled])
                found[at] = min(others) <= own
        return found

    def _add(self, grams: Sequence[tuple[Places, Places]], sign: int) -> None:
        for counts, (slots, times) in zip(self._counts, grams, strict=True):
            counts[slots] += sign * times
        self._total += sign * float(grams[0][1].sum())

    def _surprises(self, at: int, texts: Sequence[str]) -> list[float]:
        """Bits a character of answers to the prompt of the text at a place. NaN for a text under ``LONG`` characters
        and where the baseline's other answers have fewer than ``POOL``."""
        own = self._own[self._prompts[at]]
        self._add(own, -1)
        counts, found = self._counts, []
        for text in texts:
            grams = _grams(text, self._most)
            if len(grams[0]) < LONG or self._total < POOL:
                found.append(math.nan)
                continue
            chance = (counts[0][grams[0][self._most - 1 :]] + 0.1) / (self._total + 100)
            for k in range(1, self._most):
                before = counts[k - 1][grams[k - 1][self._most - 1 - k : -1]]
                chance = (counts[k][grams[k][self._most - 1 - k :]] + BACK * chance) / (before + BACK)
            found.append(float(-np.log2(chance).mean()))
        self._add(own, 1)
        return found


class Vocabulary:
    """Which words the baseline's answers to other prompts have: of sane prose most, of tokens drawn at random hardly
    any, though these may be pieces of words of the same language, which no three characters in a row tell. ``prompts``
    and ``again`` are as of `NgramModel`."""

    def __init__(self, texts: Sequence[str], prompts: Places, again: Sequence[str] = ()) -> None:
        self._prompts = prompts.tolist()
        self._own: dict[int, set[str]] = {prompt: set() for prompt in self._prompts}
        for answers in (texts, again):
            for prompt, text in zip(self._prompts, answers, strict=False):
                self._own[prompt].update(_words(text))
        self._counts = Counter(word for own in self._own.values() for word in own)
        shares = [share for at, text in enumerate(texts) for share in self._shares(at, text) if not math.isnan(share)]
        usual = float(np.median(shares)) if shares else 0.0
        self.known = usual >= FAMILIAR
        """Whether there is enough of them to tell anything."""
        self._edge = usual / 3 if self.known else 0.0

    def foreign(self, texts: Sequence[str]) -> Mask:
        """(n, 3), one text a prompt: which have less than a third of the share of such words that is usual, by
        ``windows``."""
        return _placed(texts, lambda at, text: [share < self._edge for share in self._shares(at, text)])

    def rare(self, texts: Sequence[str]) -> Mask:
        """(n,), one text a prompt: which have none of the words that are common in the baseline's answers to others."""
        found = np.zeros(len(texts), np.bool_)
        most = self._counts.most_common(5 * COMMON)
        for at, text in enumerate(texts):
            own, words = self._own[self._prompts[at]], _words(text)
            others = sorted(((n - (word in own), word) for word, n in most), reverse=True)
            common = {word for _, word in others[:COMMON]}
            found[at] = len(words) >= WORDS and sum(word in common for word in words) < RARELY * len(words)
        return found

    def _shares(self, at: int, text: str) -> list[float]:
        """Of the words in each window, those that answers to other prompts have; NaN where there are few."""
        own, found = self._own[self._prompts[at]], []
        for words in map(_words, windows(text)):
            known = sum(self._counts[word] > (word in own) for word in words)
            found.append(known / len(words) if len(words) >= SOME else math.nan)
        return found


def _words(text: str) -> list[str]:
    return LETTERS.findall(text.lower())


def _placed(texts: Sequence[str], told: Callable[[int, str], list[bool]]) -> Mask:
    """(n, 3): what is told of every text's windows, as `thirds`."""
    found = np.zeros((len(texts), 3), np.bool_)
    for at, text in enumerate(texts):
        found[at] = thirds(told(at, text), False)
    return found


def thirds(parts: Sequence[T], none: T) -> list[T]:
    """What is known of one to three parts of an answer, at its start, in its middle and at its end: an answer of two
    has no middle (``none``), one of one is everywhere the same."""
    return {1: [*parts] * 3, 2: [parts[0], none, parts[-1]]}.get(len(parts), [*parts])


class TfidfIndex:
    """What tells one prompt's answer from others': four characters in a row, the rarer the heavier. ``prompts``, (n,),
    numbers what the answers are about: answers about the same are not compared."""

    def __init__(self, texts: Sequence[str], prompts: Places) -> None:
        n = len(texts)
        counts = _rows(texts)
        self._weight = np.log((n + 1) / np.maximum(np.bincount(counts.indices, minlength=SLOTS), 1))
        self._own = self._unit(counts)
        self._some = np.unique(np.linspace(0, n - 1, min(n, OTHERS)).astype(np.intp))
        self._apart = prompts[:, None] != prompts[self._some]
        self._others = self._own[self._some].T.tocsr()
        near = (self._own @ self._others).toarray() * self._apart
        self._plain = near.sum(1) / np.maximum(self._apart.sum(1), 1)

    def astray(self, texts: Sequence[str]) -> Mask:
        """(n,), one text a prompt: which are no closer to the baseline's answer than to a tenth of the others, or have
        fewer than ``PEERS`` others to be told from. An answer that is like all others is no closer for it."""
        mine, plain = self._unit(_rows(texts)), self._plain[self._some]
        own = np.asarray(mine.multiply(self._own).sum(1)).ravel()
        near = (mine @ self._others).toarray()
        level = (near * self._apart).sum(1) / np.maximum((self._apart * plain).sum(1), 1e-12)
        own, near = own - level * self._plain, near - level[:, None] * plain
        closer, peers = (self._apart & (near >= own[:, None] - 1e-12)).sum(1), self._apart.sum(1)
        return np.asarray((closer >= np.maximum(np.floor(TENTH * (peers + 1)), 1)) | (peers < PEERS))

    def _unit(self, counts: Any) -> Any:
        rows = counts.copy()
        rows.data *= self._weight[rows.indices]
        size = np.sqrt(np.asarray(rows.multiply(rows).sum(1)).ravel())
        rows.data /= np.repeat(np.maximum(size, 1e-12), np.diff(rows.indptr))
        return rows


def _rows(texts: Sequence[str]) -> Any:
    """1 + log of how often each four characters occur: sparse, (texts, SLOTS)."""
    from scipy.sparse import csr_array

    found = [np.unique(_grams(text, 4)[-1], return_counts=True) for text in texts]
    ends = np.cumsum([0, *(len(slots) for slots, _ in found)])
    data = 1 + np.log(np.concatenate([times for _, times in found]))
    return csr_array((data, np.concatenate([slots for slots, _ in found]), ends), shape=(len(texts), SLOTS))


def length(text: str) -> int:
    """Characters, a run of white space being one."""
    return len(" ".join(text.split()))


def _grams(text: str, most: int) -> list[Places]:
    """Every character, every two in a row, … every ``most``, as numbers below ``SLOTS``. Case and the kind of white
    space do not matter."""
    folded = " ".join(text.lower().split()).encode("utf-32-le", "replace")
    points = np.frombuffer(folded, np.uint32).astype(np.uint64) + np.uint64(1)
    found, mixed = [], np.zeros(len(points), np.uint64)
    for k in range(most):
        mixed = (mixed[: max(len(points) - k, 0)] + points[k:]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        found.append((mixed % np.uint64(SLOTS)).astype(np.intp))
    return found
