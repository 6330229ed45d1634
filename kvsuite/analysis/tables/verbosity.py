"""``kvsuite verbosity``: how close in meaning answers to chats are to a reference and to the baseline's."""

from __future__ import annotations

from kvsuite.analysis.table import Cell, Column, Note, Row, Table, errors, infos
from kvsuite.analysis.verbosity import SEEN, Verbosity
from kvsuite.analysis.verbosity import verbosity as measured
from kvsuite.records import Run, Similarity

EXPLAINED = (
    "Cosines of all-MiniLM-L6-v2's embeddings, each answer beside {base}'s last to the same prompt. To reference: the "
    "similarity to the task's reference answer, less that of {base}'s answer. To {base}: the similarity to its answer; "
    "beyond noise: less that of the control's answers to the same prompts. 1.5×: answers at least that much longer, "
    "and the same figures of those. 95 %: of prompts, not adjusted. A cosine tells whether two texts are about the "
    "same things, hardly whether a sum is right."
)
PAPER = (
    "Verbose: the paper's rule, no closer to the reference and no shorter than {base}'s answer, of the answers that "
    "are not {base}'s to the letter, which would all be verbose. Noise makes some, too: read it beside the control's. "
    "The paper counts among 200 requests that were chosen for longer answers, so that their ratio of lengths is above "
    "1 whatever a method does; here all are counted."
)


def verbosity(run: Run) -> list[Table]:
    """One table a task of chats; nothing where no similarities were measured."""
    failed = {(r.task, f"{r.method}: {r.error}") for r in run.records if isinstance(r, Similarity) and r.status != "ok"}
    return [
        _table(task, rows, run.baseline, [error for at, error in sorted(failed) if at == task])
        for task, rows in measured(run).items()
    ]


def _table(task: str, rows: list[Verbosity], base: str, failed: list[str]) -> Table:
    columns = [Column("n", "n"), Column("change", "to reference"), Column("change", "95 %", shows="ends")]
    columns += [Column("baseline", f"to {base}"), Column("baseline", "95 %", shows="ends")]
    columns += [Column("beyond", "beyond noise"), Column("beyond", "95 %", shows="ends")]
    columns += [
        Column("longer", "1.5×"),
        Column("longer change", "1.5× to reference"),
        Column("longer change", "95 %", shows="ends"),
    ]
    columns += [Column("longer baseline", f"1.5× to {base}"), Column("verbose", "verbose")]
    said = infos([text.format(base=base) for text in (EXPLAINED, PAPER)])
    if most := max(row.referenced for row in rows):
        pairs = max(row.pairs for row in rows)
        said.append(Note(f"Of {pairs} answers of a method {most} are to prompts that have a reference answer."))
    else:
        said.append(Note("None of these prompts has a reference answer."))
    if cut := sum(row.cut for row in rows):
        said.append(Note(f"Of {cut} answers the embedder saw the first {SEEN} word pieces alone."))
    if not any(row.control for row in rows):
        said.append(Note("No floor measured: there is no control, so nobody knows what noise alone does.", "warning"))
    title = f"{task} · are longer answers worse?"
    return Table(f"verbosity:{task}", title, ("method",), columns, [_row(row) for row in rows], said + errors(failed))


def _row(row: Verbosity) -> Row:
    cells = {
        "n": Cell(row.pairs),
        "change": Cell.estimated(row.change),
        "baseline": Cell.estimated(row.baseline),
        "beyond": Cell.estimated(row.beyond),
        "longer": Cell(row.longer, of=row.pairs),
        "longer change": Cell.estimated(row.longer_change),
        "longer baseline": Cell.estimated(row.longer_baseline),
        "verbose": Cell(row.verbose, of=row.differing) if row.differing else Cell(),
    }
    return Row((row.name,), cells)
