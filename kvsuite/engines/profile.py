"""What is known of a kind of server: one TOML file each in ``profiles/``, or the user's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvsuite import disk
from kvsuite.errors import UsageError, unknown

FOLDER = Path(__file__).parent / "profiles"


@dataclass(frozen=True)
class Profile:
    """One kind of server. ``vllm.toml`` explains every field."""

    name: str
    command: str = ""
    metrics: str = ""
    ready: str = "/v1/models"
    salt: str = ""
    reset: str = ""
    ids: str = ""
    scores: str = ""
    uncompressed: tuple[str, ...] = ()
    """Values of ``kv_dtype`` that are the model's own numbers."""
    default: str = ""
    """What ``kv_dtype`` is where the server says nothing of it."""
    example: str = ""
    facts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    features: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    counters: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> Profile:
        """From a file. Raises UsageError, naming it, for what is no profile."""
        try:
            table = disk.toml(file)
        except (OSError, ValueError) as error:
            raise UsageError(f"the profile {file} cannot be read: {error}") from error
        known = set(cls.__dataclass_fields__) - {"name"}
        for key, value in table.items():
            if key not in known:
                raise unknown(f"key in the profile {file}", key, known)
            _check(file, key, value, KINDS.get(key, str))
        for name, metric in table.get("counters", {}).items():
            _check(file, name, metric, str)
        for key in ("command", "metrics"):
            _pattern(file, str(table.get(key, "")))
        found = {k: v for k, v in table.items() if k not in SOURCED}
        found |= {part: {k: _sources(file, k, v) for k, v in table.get(part, {}).items()} for part in SOURCED}
        found["uncompressed"] = tuple(str(x).lower() for x in table.get("uncompressed", ()))
        return cls(file.stem, **found)

    def compressed(self, facts: Mapping[str, Any]) -> bool | None:
        """Whether a server with these facts stores K and V in fewer bits than the model's own; None: it does not
        say."""
        if "compressed" in facts:  # an engine in this process knows
            return bool(facts["compressed"])
        stored = str(facts.get("kv_dtype", self.default)).lower()  # 0 is LMDeploy's word for none
        return stored not in self.uncompressed if stored and self.uncompressed else None


SOURCED = ("facts", "features")
KINDS: dict[str, type] = {"uncompressed": list, "facts": dict, "features": dict, "counters": dict}
WORDS: dict[type, str] = {str: "text", list: "list", dict: "table"}
SOURCE = re.compile(r"(metric) ([^\s{]+)(?:\{(\w+)\})?|(get) (/\S*) (\S+)|(log) (.+)", re.DOTALL)
NONE = Profile("unknown server")
"""What is known of a server that no profile fits: that it speaks OpenAI's API."""


def profiles() -> dict[str, Profile]:
    """All that come with kvsuite, by name."""
    return {file.stem: Profile.load(file) for file in sorted(FOLDER.glob("*.toml"))}


def choose(name: str, command: str = "", metrics: str = "") -> Profile:
    """The profile called ``name`` (or the file of that path), else the one that fits a command or the text of
    ``/metrics``; `NONE` where none does. Raises UsageError for an unknown name."""
    if name.endswith(".toml"):
        return Profile.load(Path(name))
    found = profiles()
    if name:
        if name not in found:
            raise unknown("server profile", name, found)
        return found[name]
    fits = (p for p in found.values() if _fits(p.command, command) or _fits(p.metrics, metrics))
    return next(fits, NONE)


def _fits(pattern: str, text: str) -> bool:
    return bool(pattern and text and re.search(pattern, text))


def _sources(file: Path, name: str, given: Any) -> tuple[str, ...]:
    sources = given if isinstance(given, list) else [given]
    for source in sources:
        if not isinstance(source, str) or not SOURCE.fullmatch(source):
            raise UsageError(
                f"{file}: {name}: {source!r} is no source; write 'metric NAME{{LABEL}}', 'get PATH KEY' or 'log REGEX'"
            )
        if source.startswith("log "):
            _pattern(file, source[4:])
    return tuple(sources)


def _check(file: Path, key: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise UsageError(f"{file}: {key} is {value!r}, but it has to be a {WORDS[kind]}")


def _pattern(file: Path, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{file}: {pattern!r} is no regular expression: {error}") from error
