"""What longer answers do: to requests end to end, by what they are longer, and along a method's settings."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence

from kvsuite.analysis.length import Beside, beside, loops
from kvsuite.analysis.requests import QUANTILES, Requests, of_arms, paces
from kvsuite.analysis.table import Cell, Column, Note, Row, Table, infos
from kvsuite.analysis.tables.shared import setting
from kvsuite.readers.run import by_task
from kvsuite.records import Run

SENTENCE = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])|\n+")


def chats(run: Run) -> list[Table]:
    """Of every task of chats: the seconds of its requests, where speed was measured, and why answers are longer."""
    if "servers" in run.facts:  # whose requests are timed themselves
        return []
    width, speed = paces(run)
    found = []
    for task, known in by_task(run, "length").items():
        arms = beside(known, run.baseline)
        found += [*_requests(task, of_arms(arms, speed, run.baseline), width, run), *_longer(task, arms)]
    return found


def _requests(task: str, known: Mapping[str, Requests], width: int, run: Run) -> list[Table]:
    rows = []
    for name, r in known.items():
        cells = {"mean": Cell.estimated(r.mean), "slower": Cell(r.slower, of=r.pairs)}
        rows.append(Row((name,), cells | {quantile: Cell(x) for quantile, x in r.quantiles.items()}))
    if not rows:
        return []
    columns = [Column("mean", "mean", "×"), Column("mean", "95 %", "×", "ends")]
    columns += [Column(name, name, "×") for name in QUANTILES] + [Column("slower", "slower")]
    said = (
        f"Seconds of a request: the prefill of its prompt and a step for every further token, at this run's measured "
        f"speed at batch {width}, interpolated between the timed lengths and beyond them that of the nearest; as a "
        f"multiple of {run.baseline}'s. 95 %: of the lengths; that of the speed is in the table of decode. Slower: "
        f"requests that take longer than {run.baseline}'s; of a control's, as many as noise makes."
    )
    title = f"{task}, end to end · batch {width} · {setting(run)}"
    return [Table(f"requests:{task}", title, ("method",), columns, rows, [Note(said)])]


def why(text: str, base: str, capped: bool) -> str:
    """What makes an answer longer, the first that holds: loop, cap, sentences (it ends, with more of them) or other."""
    if loops(text):
        return "loop"
    return "cap" if capped else "sentences" if sentences(text) > sentences(base) else "other"


def sentences(text: str) -> int:
    """Sentences, lines of a list and headings included."""
    return sum(bool(piece.strip()) for piece in SENTENCE.split(text))


def _longer(task: str, arms: Sequence[Beside]) -> list[Table]:
    rows = []
    for arm in arms:
        found = [(a, b) for a, b in arm.apart if 2 * a.length >= 3 * b.length and a.length > b.length]
        causes = [why(a.text, b.text, a.finish == "length") for a, b in found]
        if arm.apart and (arm.control or arm.apart is not arms[0].apart):
            cells = {cause: Cell(causes.count(cause)) for cause in ("loop", "cap", "sentences", "other")}
            added = [sentences(a.text) - sentences(b.text) for a, b in found]
            cells["added"] = Cell(statistics.median(added)) if added else Cell()
            rows.append(Row((arm.name,), cells | {"longer": Cell(len(found), of=len(arm.apart))}))
    if not any(row.cells["longer"].value for row in rows):
        return []
    columns = [Column("longer", "1.5×"), Column("loop", "loops"), Column("cap", "at cap")]
    columns += [Column("sentences", "more sentences"), Column("other", "other"), Column("added", "sentences added")]
    said = (
        "1.5×: answers at least that much longer, of all. Each counts once: it ends in a loop; else the cap ended it; "
        "else it ended with more sentences; other: with longer ones. Sentences added: the median."
    )
    return [Table(f"longer:{task}", f"{task}, why longer", ("method",), columns, rows, infos([said]))]


def family(method: str) -> str:
    """A method without its settings: ``h2o:budget=256+kivi:bits=4`` is of h2o+kivi."""
    return "+".join(part.partition(":")[0] for part in method.split("+"))


def sweep(run: Run, tables: Mapping[str, Table]) -> list[Table]:
    """Methods that were run at several settings, by bytes held: what each does to length and score."""
    if "decision" not in tables:
        return []
    held = {row.key[0]: row.cells.get("held", Cell()) for row in tables["decision"].rows}
    families: dict[str, list[str]] = {}
    for method, cell in held.items():
        if isinstance(cell.value, float) and not run.is_control(method) and method != run.baseline:
            families.setdefault(family(method), []).append(method)
    costs = {row.key[0]: row.cells["cost"] for key, t in tables.items() if key.startswith("length:") for row in t.rows}
    scores = {
        row.key[0]: row.cells["effect"]
        for row in (tables["verdicts"].rows if "verdicts" in tables else ())
        if row.key[-1] == "quality"
    }
    rows = []
    for name, members in families.items():
        for method in sorted(members, key=lambda m: -float(held[m].value or 0)) if len(members) > 1 else ():
            cells = {"held": Cell(held[method].value), "cost": costs.get(method, Cell())}
            rows.append(Row((name, method), cells | {"score": scores.get(method, Cell())}))
    if not rows:
        return []
    columns = [Column("held", "bytes", "×"), Column("cost", "length", "×"), Column("cost", "95 %", "×", "ends")]
    columns += [Column("score", "score", "points"), Column("score", "95 %", "points", "ends")]
    said = (
        f"Methods at several settings, by bytes held; length and score against {run.baseline}'s as in their own tables."
    )
    return [Table("sweep", "by compression", ("family", "method"), columns, rows, infos([said]))]
