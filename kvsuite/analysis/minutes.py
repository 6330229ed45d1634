"""How long evaluations in process take, from a machine's speeds and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Speeds:
    """Of a machine and a model, with the uncompressed cache. Seconds."""

    token: float
    """Of prefilling one token."""
    step: float
    """Of a decoding step of one row."""
    row: float
    """That every further row adds to a step."""

    def steps(self, tokens: float, rows: int) -> float:
        """Decoding ``tokens`` tokens, ``rows`` at a time."""
        return tokens / rows * (self.step + self.row * (rows - 1))

    def answering(self, load: Load, answers: int, rows: int) -> float:
        """``answers`` of all arms to a task, ``rows`` decoded together. A prefill and what is done to it for the arms
        takes half as long again."""
        return load.samples * self.token * load.prompt * 1.5 + self.steps(answers * load.answer, min(answers, rows))

    def timing_decode(self, width: int, rounds: int) -> float:
        """A timed cell: a warm-up and rounds of eight steps, and its check."""
        return (8 * (rounds + 1) + 6) * self.steps(width, width)

    def timing_prefill(self, length: int, rounds: int) -> float:
        """A timed prefill: a quarter of the rounds, of four prefills each."""
        return (4 * max(2, rounds // 4) + 2) * self.token * length


@dataclass(frozen=True)
class Load:
    """What a task asks of the model: samples, and the mean tokens of a prompt and, at most, of an answer."""

    samples: int
    prompt: float
    answer: float
