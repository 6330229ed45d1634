"""What a user sees while a pass of minutes runs. Silent where nobody is looking."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvsuite.plugin.plan import Plan, duration


class Progress:
    """A line with what is done, tokens per second and the time left of the run; it disappears when the pass ends."""

    def __init__(self, quiet: bool = False) -> None:
        # pytest captures file descriptor 1 while a test runs: keep our own copy of the terminal
        self._terminal = None if quiet or not sys.stdout.isatty() else os.fdopen(os.dup(1), "w")
        self.plan: Plan | None = None
        """What the whole run is expected to take, where that is known."""

    @contextmanager
    def over(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A pass of ``total`` answers or rounds; call what it yields with the tokens of each as it is done."""
        if self._terminal is None:
            yield lambda tokens: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        console = Console(file=self._terminal, force_terminal=True)
        speed, left = TextColumn("{task.fields[speed]:,.0f} tok/s"), TextColumn("{task.fields[left]}")
        last = TimeRemainingColumn() if self.plan is None else left
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), speed, last)
        console.print()
        with Bars(*columns, console=console, transient=True) as bars:
            bar, start = bars.add_task(what, total=total, speed=0.0, left=self._left(0)), time.perf_counter()
            ended = made = 0

            def done(tokens: int) -> None:
                nonlocal ended, made
                ended, made = ended + 1, made + tokens
                bars.update(bar, advance=1, speed=made / (time.perf_counter() - start), left=self._left(ended / total))

            yield done

    def _left(self, share: float) -> str:
        return "" if self.plan is None else f"run: {duration(self.plan.left(share))} left"
