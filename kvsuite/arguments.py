"""What the options of several commands have in common."""

from __future__ import annotations

import argparse


def whole_numbers(text: str) -> list[int]:
    """An option's value, ``1,8``. Raises ArgumentTypeError, one sentence, unless all numbers are whole and over 0."""
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write whole numbers above 0, separated by commas")
    return numbers
