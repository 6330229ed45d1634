"""Garbage is called broken and noise is not: worlds of answers made of the standard library's documentation."""

import functools
import math
import pathlib
import pydoc_data.topics
import random
import re
import string
import sysconfig

import numpy as np
import pytest

from kvsuite.analysis.garbled import FEW, check
from kvsuite.analysis.texts import Speech, Topics
from kvsuite.columns import Arm, stack
from kvsuite.errors import UsageError

CAP = 400
"""Tokens."""


class Writer:
    """Writes about what a text is about: a chain of its words, two before each, now and then one."""

    def __init__(self, text):
        self.words = text.split()
        self.after = {}
        for at in range(len(self.words) - 2):
            one, two, three = self.words[at : at + 3]
            self.after.setdefault((one, two), []).append(three)
            self.after.setdefault(two, []).append(three)

    def write(self, rng, n, start=()):
        words = list(start)
        while len(words) < n:
            known = self.after.get(tuple(words[-2:])) if rng.random() < 0.8 else None
            known = known or (self.after.get(words[-1]) if words else None)
            words.append(rng.choice(known or self.words))
        return words[:n]


@functools.cache
def topics():
    """One writer a module of the standard library."""
    found = {}
    for file in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        docstrings = "\n".join(re.findall(r'"""(.*?)"""', file.read_text(errors="replace"), re.DOTALL))
        if len(docstrings.split()) > 400:
            found[file.stem] = Writer(docstrings)
    return list(found.values())


@functools.cache
def elsewhere():
    """A writer on what no prompt asks for: the language's reference."""
    return Writer("\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())))


GERMAN = Writer("""Der Zug nach Hamburg fährt heute leider erst um halb neun ab, weil die Strecke gesperrt ist. Wenn das
Wetter morgen besser wird, gehen wir mit den Kindern in den Park und essen dort ein Eis. Die Regierung hat gestern
beschlossen, dass die Steuern für kleine Unternehmen gesenkt werden sollen. Ich habe den Schlüssel auf dem Küchentisch
liegen lassen und musste deshalb bei den Nachbarn klingeln. Für die Berechnung benötigen wir zunächst die Anzahl der
Versuche und die mittlere Dauer. Anschließend wird das Ergebnis durch die Summe der Gewichte geteilt. Wer die Zeitung
liest, weiß, dass die Preise für das Brot schon wieder gestiegen sind, und das ärgert viele Leute in der Stadt.""")
RUSSIAN = Writer("""Поезд в Москву отправляется сегодня вечером, и мы уже купили билеты. Если завтра будет хорошая погода,
мы пойдём с детьми в парк и будем там есть мороженое. Правительство вчера решило снизить налоги для малых предприятий. Я
оставил ключ на кухонном столе и поэтому должен был звонить соседям. Для расчёта нам сначала нужно число попыток.""")
CHINESE = Writer(" ".join("今天晚上的火车已经晚点了我们只好在车站等了两个小时如果明天天气好我们就带孩子们去公园玩政府昨天决定降低小企业的税收"))


class World:
    """Prompts with the baseline's answers and the control's."""

    def __init__(self, seed, n, *, warm=False, truncated=False):
        self.rng = random.Random(seed)
        self.writers = self.rng.sample(topics(), n)
        self.warm, self.truncated = warm, truncated
        self.base = [writer.write(self.rng, self.length()) for writer in self.writers]
        self.control = self.noisy()

    def length(self):
        """Words."""
        return int(min(CAP, self.rng.lognormvariate(math.log(CAP * 0.3), 0.5))) if not self.truncated else CAP

    def noisy(self):
        """As the baseline answers once more: with other words if warm, else mostly the same."""
        answers = []
        for writer, words in zip(self.writers, self.base, strict=True):
            shared = 0 if self.warm else self.rng.randrange(len(words)) if self.rng.random() < 0.15 else None
            parted = words if shared is None else writer.write(self.rng, self.length(), words[:shared])
            answers.append(parted)
        return answers

    def lossy(self):
        """Sane, but every answer parts after a few words, and is rather long or short."""
        return [
            writer.write(self.rng, max(20, min(CAP, int(self.length() * self.rng.lognormvariate(0.2, 0.4)))), words[:5])
            for writer, words in zip(self.writers, self.base, strict=True)
        ]

    def broken(self, kind, share=1.0):
        """Garbage in a share of the answers, noise in the others."""
        answers = self.noisy()
        for at in self.rng.sample(range(len(answers)), round(share * len(answers))):
            answers[at] = GARBAGE[kind](self, at)
        return answers


def constant(world, at):
    return "I would be glad to help you with that and will do my best to answer the question you asked me".split()


def looping(world, at):
    sane = world.base[at][: max(10, len(world.base[at]) // 3)]
    piece = world.writers[at].write(world.rng, world.rng.randrange(3, 25))
    return (sane + piece * CAP)[:CAP]


def counting(world, at):
    """A loop that is never quite the same."""
    sane = world.base[at][: max(10, len(world.base[at]) // 3)]
    piece = world.writers[at].write(world.rng, world.rng.randrange(3, 10))
    return (sane + [word for k in range(CAP) for word in (f"{k}.", *piece)])[:CAP]


def tokens(world, at):
    """Pieces of words of many scripts, as if the logits were noise."""
    pieces = [w[a : a + 4] for k in range(300) for w in [world.rng.choice(elsewhere().words)] for a in (0, 2)]
    pieces += GERMAN.words[:40] + RUSSIAN.words[:60] + CHINESE.words[:40]
    return ["".join(world.rng.choices(pieces, k=3)) for _ in range(world.length() // 2 + 10)]


def drawn(characters):
    def text(world, at):
        return "".join(world.rng.choices(characters + " " * (len(characters) // 6), k=6 * world.length() + 60)).split()

    return text


GARBAGE = {
    "words": lambda world, at: world.rng.choices(elsewhere().words, k=world.length()),
    "tokens": tokens,
    "characters": drawn(string.ascii_letters + string.digits + string.punctuation),
    "letters": drawn(string.ascii_lowercase),
    "unrelated": lambda world, at: elsewhere().write(world.rng, world.length()),
    "other prompts": lambda world, at: world.base[at - 1],
    "same sentence": constant,
    "German": lambda world, at: GERMAN.write(world.rng, world.length()),
    "Russian": lambda world, at: RUSSIAN.write(world.rng, world.length()),
    "Chinese": lambda world, at: ["".join(CHINESE.write(world.rng, world.length()))],
    "one token": lambda world, at: ["the"] * CAP,
    "exclamation marks": lambda world, at: ["!" * CAP],
    "loop": looping,
    "counting": counting,
    "empty": lambda world, at: [],
    "never stops": lambda world, at: world.writers[at].write(world.rng, CAP, world.base[at]),
}


def arm(answers, source="arm", cap=CAP, keys=None, cluster=None, **columns):
    """Words as an arm; what is as long as the cap was ended by it, so are characters without end."""
    texts = [words if isinstance(words, str) or words is None else " ".join(words) for words in answers]
    size = np.array([max(len((text or "").split()), len(text or "") / 12) for text in texts])
    keys = keys or [("chat", str(at)) for at in range(len(texts))]
    n = len(texts)
    known = {"score": np.full(n, np.nan), "tokens": np.minimum(size, cap), "cap": np.full(n, float(cap))}
    known |= {"capped": (size >= cap).astype(float), "seconds": np.ones(n), **columns}
    return Arm(source, keys, cluster or [sample for _, sample in keys], **known, text=texts)
