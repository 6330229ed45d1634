"""Garbage is called broken and noise is not: worlds of answers made of the standard library's documentation."""

import functools
import gc
import lzma
import math
import pathlib
import random
import string

import numpy as np
import pytest

from kvsuite.analysis.garbled import FEW, check
from kvsuite.analysis.texts import TfidfIndex, squeezed
from kvsuite.columns import Arm, stack
from kvsuite.errors import UsageError

CAP = 250
"""Tokens."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """statsmodels collects garbage in every correction, which takes longer than a check once torch is imported."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


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
def documentation():
    """Python 3.11.7's: a module's docstrings each, and last the language's reference. Another version's would draw
    other worlds, in which some of these checks are decided otherwise."""
    with lzma.open(
        pathlib.Path(__file__).with_name("python-3.11.7.txt.xz"), "rt", encoding="utf-8", newline="\n"
    ) as file:
        _, *texts = file.read().split("\n")  # the first says whose they are
    return texts


@functools.cache
def topics():
    """One writer a module."""
    return [Writer(text) for text in documentation()[:-1]]


@functools.cache
def elsewhere():
    """A writer on what no prompt asks for: the language's reference."""
    return Writer(documentation()[-1])


GERMAN = Writer("""Der Zug nach Hamburg fährt heute leider erst um halb neun ab, weil die Strecke gesperrt wurde. Wenn
das Wetter morgen besser wird, gehen wir mit den Kindern in den Park und essen dort Kuchen. Die Regierung beschloss
gestern, dass die Steuern für kleine Unternehmen gesenkt werden sollen. Den Schlüssel ließ ich auf dem Küchentisch
liegen und musste deshalb bei den Nachbarn klingeln. Für die Berechnung benötigen wir zunächst die Anzahl der Versuche
und die mittlere Dauer. Anschließend wird das Ergebnis durch die Summe der Gewichte geteilt. Wer die Zeitung liest,
weiß, dass die Preise für das Brot schon wieder gestiegen sind, und das ärgert viele Leute in der Stadt.""")
RUSSIAN = Writer("""Поезд в Москву отправляется сегодня вечером, и мы уже купили билеты. Если завтра будет хорошая
погода, мы пойдём с детьми в парк и будем там есть мороженое. Правительство вчера решило снизить налоги для малых
предприятий. Я оставил ключ на кухонном столе и поэтому должен был звонить соседям. Для расчёта нам сначала нужно
число попыток.""")
CHINESE = Writer(
    " ".join(
        "今天晚上的火车已经晚点了我们只好在车站等了两个小时如果明天天气好我们就带孩子们去公园玩政府昨天决定降低小企业的税收"
    )
)


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
        return CAP if self.truncated else int(min(CAP, self.rng.lognormvariate(math.log(CAP * 0.3), 0.5)))

    def noisy(self):
        """As the baseline answers once more: with other words if warm, else mostly the same, but never all."""
        answers, last = [], len(self.base) - 1
        for at, (writer, words) in enumerate(zip(self.writers, self.base, strict=True)):
            if self.warm or at == last or self.rng.random() < 0.15:
                words = writer.write(
                    self.rng, self.length(), () if self.warm else words[: self.rng.randrange(len(words))]
                )
            answers.append(words)
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
    return ["I would be glad to help you with that and will do my best to answer the question you asked me"]


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
    "salad": lambda world, at: world.rng.sample(world.base[at], len(world.base[at])),
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


def arm(answers, source="arm", keys=None, cluster=None, **columns):
    """Words as an arm; what is as long as the cap was ended by it, so are characters without end."""
    texts = [words if isinstance(words, str) or words is None else " ".join(words) for words in answers]
    size = np.array([max(len((text or "").split()), len(text or "") / 12) for text in texts])
    keys = keys or [("chat", str(at)) for at in range(len(texts))]
    known = {
        "score": np.full(len(texts), np.nan),
        "tokens": np.minimum(size, CAP),
        "cap": np.full(len(texts), float(CAP)),
    }
    known |= {"capped": (size >= CAP).astype(float), **columns}
    return Arm(source, keys, cluster or [sample for _, sample in keys], **known, text=texts)


def checked(base, variant, control=None, **columns):
    return check(*(None if answers is None else arm(answers, **columns) for answers in (base, variant, control)))


def sign(found, name):
    return next(sign for sign in found.signs if sign.name == name)


def failed(found):
    return {sign.name for sign in found.signs if sign.failed}


REGIMES = {
    "greedy": {},
    "sampled": {"warm": True},
    "greedy, all at the cap": {"truncated": True},
    "sampled, all at the cap": {"warm": True, "truncated": True},
}
EXPECTED = {
    "salad": "order",
    "one token": "repetition",
    "exclamation marks": "repetition",
    "loop": "repetition",
    "counting": "repetition",
    "empty": "empty",
    "never stops": "cap hits",
    "characters": "language",
    "letters": "language",
    "tokens": "language",
    "Russian": "language",
    "Chinese": "language",
}


class TestSane:
    @pytest.mark.parametrize("regime", REGIMES)
    def test_noise_alone_is_not_broken(self, regime):
        for seed, n in enumerate((16, 16, 24, 32)):
            world = World(f"noise {regime} {seed}", n, **REGIMES[regime])
            found = checked(world.base, world.noisy(), world.control)
            assert (found.n, found.broken, found.example) == (n, False, None), found

    @pytest.mark.parametrize("regime", ["greedy", "greedy, all at the cap"])
    def test_answers_that_part_early_but_are_sane_are_not_broken(self, regime):
        for seed, n in enumerate((16, 48)):
            world = World(f"lossy {regime} {seed}", n, **REGIMES[regime])
            variant = world.lossy()
            assert sum(a == b for a, b in zip(variant, world.base, strict=True)) == 0
            assert not checked(world.base, variant, world.control).broken
            assert not checked(world.base, variant).broken

    def test_a_small_model_may_loop_elsewhere(self):
        """Three in ten answers loop, but a lossy variant's are not the baseline's; the control's mostly are."""
        for seed in range(2):
            world = World(f"loops {seed}", 64)
            base, variant, other = (
                [looping(world, at) if world.rng.random() < 0.3 else words for at, words in enumerate(answers)]
                for answers in (world.base, world.lossy(), world.lossy())
            )
            control, noisy = (
                [b if world.rng.random() < 0.1 else a for a, b in zip(base, other, strict=True)] for _ in "ab"
            )
            found = checked(base, variant, control)
            assert sign(found, "repetition").count >= 8 > 2 * sign(found, "repetition").floor
            assert not found.broken
            for at in range(0, 64, 2):
                noisy[at] = looping(world, at)
            assert "repetition" in failed(checked(base, noisy, control))

    def test_a_rare_oddity_in_many_answers_is_not_broken(self):
        base = [f"{at:05}" for at in range(400)]
        found = checked(base, ["" if at % 20 == 0 else a for at, a in enumerate(base)], [*base[:-1], "1"])
        assert sign(found, "empty").count == 20
        assert sign(found, "empty").adjusted < 1e-4
        assert not found.broken

    def test_prompts_on_one_document_may_have_alike_answers(self):
        """An answer is as close to the baseline's other answers on its document as to its own."""
        rng = random.Random("documents")
        base, variant, cluster = [], [], []
        for number, writer in enumerate(topics()[:8]):
            text = writer.write(rng, 100)
            for _ in range(6):
                base.append([*text, *writer.write(rng, 20)])
                variant.append([*text, *writer.write(rng, 20)])
                cluster.append(str(number))
        control = [*base[:-1], base[-1][:-1]]
        found = checked(base, variant, control, cluster=cluster)
        assert (sign(found, "agreement").n, sign(found, "agreement").count) == (48, 0)

    def test_an_answer_that_is_like_all_others_draws_no_topics_away(self):
        """What the variant says more often than the baseline, two of the baseline's answers consist of."""
        rng = random.Random("hubs")
        words = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(400)]
        common, own = words[:40], [words[40 + 20 * at : 60 + 20 * at] for at in range(16)]
        base = [
            " ".join([*rng.sample(common, 38 if at < 2 else 8), *own[at][: 4 if at < 2 else 20]]) for at in range(16)
        ]
        variant = [" ".join([*rng.sample(common, 30), *own[at][:5]]) for at in range(16)]
        assert TfidfIndex(base, np.arange(16)).astray(variant).sum() <= 2


class TestBroken:
    @pytest.mark.parametrize("kind", GARBAGE)
    def test_all_of_16(self, kind):
        """Of 32 where only their order is wrong: half of sane answers are too short to show that theirs is right."""
        for seed, regime in enumerate(("greedy", "sampled")):
            world = World(f"all {kind} {seed}", 32 if EXPECTED.get(kind) == "order" else 16, **REGIMES[regime])
            variant = world.broken(kind)
            self.is_broken(world, variant, kind)

    @pytest.mark.parametrize("kind", GARBAGE)
    def test_a_part_of_64(self, kind):
        """A third; of what is garbage only beside the prompt or by its order, two thirds, as sane answers come near."""
        world = World(f"part {kind}", 64, warm=len(kind) % 2 == 0)
        told = EXPECTED.get(kind, "agreement")
        self.is_broken(world, world.broken(kind, 2 / 3 if told in ("agreement", "order") else 1 / 3), kind)

    def is_broken(self, world, variant, kind):
        found = checked(world.base, variant, world.control)
        assert found.broken
        assert EXPECTED.get(kind, "agreement") in failed(found), found.signs
        assert found.example.sign in failed(found)
        at = int(found.example.sample[1])
        assert found.example.baseline == " ".join(world.base[at])
        assert found.example.variant == " ".join(variant[at]) != found.example.baseline
        assert found.state == "failed"

    def test_without_a_control_only_if_it_is_overwhelming(self):
        world = World("alone", 64)
        for kind in ("unrelated", "characters", "empty", "loop", "never stops"):
            found = checked(world.base, world.broken(kind))
            assert found.broken, kind
            assert {sign.floor for sign in found.signs} == {None}
        for kind in ("unrelated", "never stops"):
            assert not checked(world.base, world.broken(kind, 1 / 3)).broken

    def test_an_identical_control_is_none(self):
        world = World("identical", 32)
        variant = world.broken("never stops", 0.5)
        alone, identical = checked(world.base, variant), checked(world.base, variant, world.base)
        assert identical.signs == alone.signs
        assert not identical.broken
        assert checked(world.base, variant, world.control).broken

    def test_in_one_of_two_datasets(self):
        """The numbers do not hide it, nor do they count for agreement."""
        world, rng = World("two", 24), random.Random(2)
        numbers = [str(rng.randrange(10_000, 99_999)) for _ in range(24)]
        keys = [(name, str(at)) for name in ("chat", "needle") for at in range(24)]
        cluster = [" ".join(key) for key in keys]
        arms = (x + numbers for x in (world.base, world.broken("unrelated", 0.7), world.control))
        found = checked(*arms, keys=keys, cluster=cluster)
        assert failed(found) == {"agreement"}
        assert sign(found, "agreement").n <= 24
        assert found.example.sample[0] == "chat"

    def test_in_the_language_of_another_dataset(self):
        world, rng = World("languages", 24), random.Random(3)
        base = [["".join(CHINESE.write(rng, 150))] for _ in range(24)] + world.base
        variant = [writer.write(rng, 60) for writer in world.writers] + world.base
        keys = [(name, str(at)) for name in ("Chinese", "English") for at in range(24)]
        found = checked(base, variant, base[:24] + world.control, keys=keys, cluster=[" ".join(key) for key in keys])
        assert "language" in failed(found)
        assert found.example.sample[0] == "Chinese"


class TestShort:
    def number(self, rng):
        return str(rng.randrange(10_000, 100_000))

    def arms(self, n):
        rng = random.Random("numbers")
        base = [self.number(rng) for _ in range(n)]
        return rng, base, [self.number(rng) if rng.random() < 0.1 else answer for answer in base]

    @pytest.mark.parametrize("n", [16, 64])
    def test_another_number_is_a_matter_of_quality(self, n):
        rng, base, control = self.arms(n)
        for variant in (
            [self.number(rng) for _ in range(n)],
            [f"The secret number is {self.number(rng)}." for _ in range(n)],
            ["I could not find a number in the text that you gave me, sorry. What are you looking for?"] * n,
        ):
            assert not checked(base, variant, control).broken
            assert not checked(base, variant).broken

    def test_prose_and_garbage_up_to_the_cap_are_broken(self):
        rng, base, control = self.arms(16)
        marks = string.punctuation + "§°"
        for variant in (
            [" ".join(elsewhere().write(rng, CAP)) for _ in base],
            ["".join(rng.choices(marks, k=12 * CAP)) for _ in base],
            ["".join(rng.choices(string.ascii_letters, k=12 * CAP)) for _ in base],
        ):
            assert "cap hits" in failed(checked(base, variant, control))
        signs = ["".join(rng.choices(marks, k=5)) for _ in base]
        assert failed(checked(base, signs, control)) == {"language"}

    @pytest.mark.parametrize("n", [16, 64])
    def test_sentences_of_one_mould_have_no_topic(self, n):
        def told():
            city = rng.choice(("Amsterdam", "Berlin", "Cairo", "Edinburgh"))
            return (
                f"Based on the document that you provided above, the secret number which is associated with the city "
                f"of {city}, as mentioned in the passage in question, is {self.number(rng)}. Is there anything else?"
            )

        rng = random.Random("mould")
        base, variant = ([told() for _ in range(n)] for _ in range(2))
        control = [told(), *base[1:]]
        assert not checked(base, variant, control).broken
        declined = (
            "The passage in question does not say a word about this, so I am afraid that I cannot help you there."
        )
        assert not checked(base, [declined] * n, control).broken
        garbage = [" ".join(drawn(string.ascii_lowercase)(World(at, 1), 0)) for at in range(n)]
        assert "language" in failed(checked(base, garbage, control))


class TestCounting:
    def test_the_p_is_exact_and_one_sided(self):
        """16 empty answers against none, and against 3 of the control's in other places."""
        base = ["48213", *("1" * 5 for _ in range(15))]
        found = checked(base, [""] * 16, [*base[:-1], "7"])
        assert sign(found, "empty").p == pytest.approx(2**-16)
        assert sign(found, "empty").adjusted == pytest.approx(2**-16)
        found = checked(base, [""] * 8 + base[8:], base[:13] + [""] * 3)
        assert sign(found, "empty").p == pytest.approx((1 + 11 + 55 + 165) / 2**11)
        assert (sign(found, "empty").count, sign(found, "empty").floor) == (8, 3)

    def test_what_the_baseline_shows_itself_is_not_counted(self):
        base = [""] * 10 + ["48213"] * 10
        found = checked(base, [""] * 20, [*base[:-1], "7"])
        assert (sign(found, "empty").n, sign(found, "empty").count, sign(found, "empty").back) == (10, 10, 0)
        found = checked(base, base[::-1], [*base[:-1], "7"])
        assert (sign(found, "empty").count, sign(found, "empty").back) == (10, 10)
        assert not found.broken
        base = [""] * 4 + ["48213"] * 12
        found = checked(base, ["48213"] * 8 + [""] * 8, [*base[:-1], "7"])
        assert (sign(found, "empty").count, sign(found, "empty").back, sign(found, "empty").floor) == (8, 4, 0)
        assert sign(found, "empty").p == pytest.approx(794 / 2**12)
        assert not found.broken

    def test_signs_are_corrected_together(self):
        world = World("holm", 16)
        found = checked(world.base, world.broken("characters"), world.control)
        p = {name: sign(found, name).p for name in ("language", "order", "agreement")}
        assert min(sign(found, name).adjusted for name in p) == pytest.approx(3 * min(p.values()))

    def test_answers_to_one_prompt_count_once(self):
        """24 answers to 8 prompts are no more than 8."""
        world = World("repeats", 8)
        base, variant, control = (
            stack([arm(answers) for answers in three])
            for three in ([world.base] * 3, [world.broken("empty", 7 / 8)] * 3, [world.control] * 3)
        )
        found = check(base, variant, control)
        assert (found.n, sign(found, "empty").count) == (24, 21)
        assert sign(found, "empty").p == pytest.approx(2**-7)

    def test_cap_hits_are_half_as_long_again(self):
        columns = {"capped": np.zeros(16), "tokens": np.full(16, 250.0)}
        base, ended = arm(["48213"] * 16, **columns), {"capped": np.ones(16), "tokens": np.full(16, 400.0)}
        control = arm(["48213"] * 15 + ["1"], **columns)
        assert failed(check(base, arm(["48213"] * 16, **ended), control)) == {"cap hits"}
        near = arm(["48213"] * 16, **columns | {"tokens": np.full(16, 300.0)})
        assert not check(near, arm(["48213"] * 16, **ended), control).broken
        unknown = arm(["48213"] * 16, **ended | {"capped": np.full(16, np.nan)})
        assert sign(check(base, unknown, control), "cap hits").n == 0

    def test_too_few_are_broken_only_if_all_are_hopeless(self):
        world = World("few answers", FEW - 1)
        for kind in ("characters", "empty", "loop", "Russian", "exclamation marks"):
            found = checked(world.base, world.broken(kind), world.control)
            assert found.broken, kind
            assert (found.state, found.told < found.needed) == ("failed", True)
            assert not failed(found)
            assert found.example.sign in ("empty", "repetition", "language")
            assert not checked(world.base, world.broken(kind, 6 / 7), world.control).broken
        for kind in ("unrelated", "never stops"):
            assert not checked(world.base, world.broken(kind), world.control).broken
        assert not checked(world.base, [""] * 7, ["", *world.base[1:]]).broken

    def test_what_cannot_be_checked_is_refused(self):
        base = arm(["one", "two"])
        with pytest.raises(UsageError, match="twice cannot be checked: it does not answer the same"):
            check(arm(["one"], source="base"), arm(["one", "two"], source="twice"), None)
        with pytest.raises(
            UsageError, match=r"mute cannot be checked for garbage: the text of the answers was not kept"
        ):
            check(base, arm([None, None], source="mute"), None)
        assert check(base, arm([None, "two"]), None).n == 1

    def test_a_topic_is_found_in_any_script(self):
        rng = random.Random("Chinese")
        letters = [chr(0x4E00 + k) for k in range(3000)]
        words = [["".join(rng.choices(letters, k=2)) for _ in range(30)] for _ in range(16)]
        base, same = (["".join(rng.choices(own, k=100)) for own in words] for _ in range(2))
        found = TfidfIndex(base, np.arange(16))
        assert not found.astray(same).any()
        assert found.astray(same[1:] + same[:1]).sum() >= 14

    def test_a_loop_that_counts_is_squeezed_and_prose_is_not(self):
        world = World("squeezed", 16)
        assert max(squeezed(" ".join(counting(world, at))) for at in range(16)) < 0.25
        assert min(squeezed(" ".join(words)) for words in world.base if len(words) > 100) > 0.35
        assert squeezed("no " * 60) == 1
