"""Results people already have, read into columns: one file a format, found by name.

A result is named ``FORMAT:PATH#WHICH``; WHICH chooses among several in one file (a method of a run, a metric). A plain
path is a folder that kvsuite left. A PATH may hold a ``#`` itself: the longest that is there is taken.
"""

from kvsuite.readers.base import Load, arm, documents, formats, read

__all__ = ["Load", "arm", "documents", "formats", "read"]
