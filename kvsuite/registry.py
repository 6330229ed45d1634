"""The parts that are found by name: methods, tasks, readers, reports. A part is built in, or another package's, or in a
file of the user's."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from kvsuite import disk
from kvsuite.errors import UsageError, unknown

_FILES: dict[Path, str] = {}
"""The user's files that were loaded, and the modules they became."""


@dataclass(frozen=True)
class Registry:
    """All parts of one kind."""

    kind: str
    """What a mistake calls it."""
    group: str
    """``kvsuite.`` and this is the group of entry points, each ``name = "module"``."""
    offers: Callable[[ModuleType], Iterable[str]]
    """The names of the parts that a user's file holds."""
    packages: tuple[str, ...] = ()
    """Where the built-in ones are: ``streaming_llm.py`` is ``streaming-llm``, and ``q8_0.py`` is ``q8_0``."""
    helpers: tuple[str, ...] = ("base",)
    """Modules there that are no parts."""

    def names(self) -> dict[str, str]:
        """Every part and its module; those of kvsuite and of other packages are not imported for it."""
        return known(self, tuple(_FILES.values()))

    def module(self, name: str) -> ModuleType:
        """The module of a part. Raises UsageError with the nearest known name."""
        names = self.names()
        if name not in names:
            raise unknown(self.kind, name, names)
        return importlib.import_module(names[name])


@cache
def known(registry: Registry, files: tuple[str, ...]) -> dict[str, str]:
    """What `Registry.names` gives while these files are loaded; kept, since entry points take milliseconds to find."""
    found = {
        re.sub(r"(?<!\d)_|_(?!\d)", "-", module.name): f"{package}.{module.name}"
        for package in registry.packages
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__)
        if module.name not in registry.helpers
    }
    outside = importlib.metadata.entry_points(group=f"kvsuite.{registry.group}")
    found |= {entry.name: entry.module for entry in outside if entry.name not in found}
    for file in files:
        for name in registry.offers(sys.modules[file]):
            if name in found:
                where = sys.modules[file].__file__
                raise UsageError(
                    f"--kv-plugin {where}: there is a {registry.kind} {name!r} already; choose another name"
                )
            found[name] = file
    return found


def classes(base: type) -> Callable[[ModuleType], Iterable[str]]:
    """What a file offers where a part is a class: the names of those that it defines."""

    def offered(module: ModuleType) -> Iterator[str]:
        for value in vars(module).values():
            own = isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
            if own and isinstance(name := getattr(value, "name", None), str):
                yield name

    return offered


def function(name: str) -> Callable[[ModuleType], Iterable[str]]:
    """What a file offers where a part is a module with this function: itself, named like the file."""
    return lambda module: [Path(str(module.__file__)).stem.replace("_", "-")] if hasattr(module, name) else []


def load(file: Path) -> None:
    """Import a file of the user's: what it defines is found from then on. Raises UsageError, naming it."""
    path = file.resolve()
    if path in _FILES:
        return
    if not disk.is_file(path) or path.suffix != ".py":
        raise UsageError(f"--kv-plugin {str(file)!r} is no Python file")
    name = f"kvsuite_plugin_{len(_FILES)}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"--kv-plugin {str(file)!r} cannot be imported: {type(error).__name__}: {error}") from error
    _FILES[path] = name


def loaded() -> list[Path]:
    """The user's files."""
    return list(_FILES)
