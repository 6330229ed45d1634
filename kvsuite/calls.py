"""Tool calls that can be checked: one tool, and whether what a server returned calls it (``--kv-workload tools``)."""

from __future__ import annotations

import json
from typing import Any

ASKED = "Record this message with the tool record_message."
NAME = "record_message"
KINDS: dict[str, type] = {"summary": str, "topics": list, "year": int}
"""Its arguments, all of which are required."""
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "Records what a presidential message says.",
        "parameters": {
            "type": "object",
            "properties": {
                "summary": {"type": "string", "description": "The message in one sentence."},
                "topics": {"type": "array", "items": {"type": "string"}, "description": "What it speaks of."},
                "year": {"type": "integer", "description": "The year in which it was written."},
            },
            "required": list(KINDS),
        },
    },
}


def valid(calls: str) -> bool:
    """Whether names and arguments, one after the other as a server sent them, are one or more calls of the tool with a
    JSON object that has its arguments, each of its kind."""
    while calls.startswith(NAME):
        try:
            found, end = json.JSONDecoder().raw_decode(calls := calls[len(NAME) :].lstrip())
        except (ValueError, RecursionError):
            return False
        if not (isinstance(found, dict) and all(_is(found.get(key), kind) for key, kind in KINDS.items())):
            return False
        calls = calls[end:].lstrip()
        if not calls:
            return True
    return False


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
