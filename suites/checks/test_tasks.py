"""Samples are what they say, and scores what they mean."""

import pytest

from kvsuite import models
from kvsuite.errors import UsageError
from kvsuite.tasks import task

WORDS = "The Congress shall hear of the state of the Union and of {i} matters more; let it be so."


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for at, sentences in enumerate((400, 30, 300)):
        (tmp_path / f"{at}.txt").write_text(" ".join(WORDS.format(i=i) for i in range(sentences)))
    monkeypatch.setattr(models, "messages", lambda: tmp_path)


def words(text):
    return len(text.split())


def test_needles_have_their_length_and_cover_all_depths(folder):
    samples = task("needle").samples(12, [300, 1000], 0, words)
    depths = []
    for at, sample in enumerate(samples):
        wanted = [300, 1000][at % 2]
        assert wanted - 30 <= words(sample.context + sample.question) <= wanted
        assert sample.context.count(sample.reference) == 1
        depths.append(sample.context.index(sample.reference) / len(sample.context))
    assert len({s.id for s in samples}) == 12
    for low in (0, 0.25, 0.5, 0.75):
        assert 2 <= sum(low <= depth < low + 0.25 for depth in depths) <= 4


def test_the_same_seed_gives_the_same_samples(folder):
    one, again, other = (task("needle").samples(6, [300], seed, words) for seed in (0, 0, 1))
    assert one == again
    assert one != other
    assert task("needle").samples(3, [300], 0, words) == one[:3]


@pytest.mark.parametrize(
    ("answer", "score"), [("48213", 1), ("It is 48,213.", 1), ("4821", 0), ("482130", 0), ("", 0), ("no 1 48213!", 1)]
)
def test_an_answer_counts_where_it_names_the_number(folder, answer, score):
    needle = task("needle")
    sample = needle.samples(1, [300], 0, words)[0]
    assert (
        needle.score(sample, answer.replace("48213", sample.reference).replace("48,213", f"{int(sample.reference):,}"))
        == score
    )


def test_no_two_digests_are_one(folder, tmp_path):
    """A prefix cache would find the second."""
    for name in "02":
        (tmp_path / f"{name}.txt").unlink()
    samples = task("digest").samples(60, [100], 0, words)
    assert len({s.context for s in samples}) == 60
    with pytest.raises(UsageError, match="do not hold 800 different prompts of 100 tokens"):
        task("digest").samples(800, [100], 0, words)
