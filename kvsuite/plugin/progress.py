"""What a user sees while a pass of minutes runs. Silent where nobody is looking."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """A line with what is done, tokens per second and the time left; it disappears when the pass ends."""

    def __init__(self, quiet: bool = False) -> None:
        # pytest captures file descriptor 1 while a test runs: keep our own copy of the terminal
        self._terminal = None if quiet or not sys.stdout.isatty() else os.fdopen(os.dup(1), "w")

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
        speed = TextColumn("{task.fields[speed]:,.0f} tok/s")
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), speed, TimeRemainingColumn())
        console.print()
        with Bars(*columns, console=console, transient=True) as bars:
            bar, start, made = bars.add_task(what, total=total, speed=0.0), time.perf_counter(), 0

            def done(tokens: int) -> None:
                nonlocal made
                made += tokens
                bars.update(bar, advance=1, speed=made / (time.perf_counter() - start))

            yield done
