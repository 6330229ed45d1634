"""``kvsuite …``: the commands beside pytest."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from kvsuite.errors import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 2 after one sentence about bad input."""
    parser = argparse.ArgumentParser(prog="kvsuite", description="Is a KV-cache compression method worth deploying?")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser("methods", help="list the parts of methods: selectors, budgets, codecs")
    listing.add_argument("--json", action="store_true", help="a list of {name, kind, stores, source}")
    commands.add_parser("fetch", help="download and convert the default model and its text")
    asked = parser.parse_args(argv)
    try:
        if asked.command == "methods":
            _methods(asked.json)
        else:
            _fetch()
    except UsageError as error:
        print(f"kvsuite: {error}", file=sys.stderr)
        return 2
    return 0


def _methods(as_json: bool) -> None:
    from kvsuite.methods import catalogue

    rows = [{"name": p.name, "kind": p.kind, "stores": p.stores, "source": p.source} for p in catalogue()]
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "kind", "what is stored", "source", title="A method is selector + budget + codec", box=None)
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)


def _fetch() -> None:
    from kvsuite import models

    for what, folder in (("model", models.default_model()), ("text", models.messages())):
        print(f"{what}: {folder}")


if __name__ == "__main__":
    sys.exit(main())
