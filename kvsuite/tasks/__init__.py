"""Tasks: where samples come from and how an answer is scored. One file each, found by name."""

from kvsuite.tasks.base import FRAME, Sample, Task, after_thinking, made, names, scored, task

__all__ = ["FRAME", "Sample", "Task", "after_thinking", "made", "names", "scored", "task"]
