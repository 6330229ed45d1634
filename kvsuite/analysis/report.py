"""The report on a run: all that is shown of it, computed once. Report plugins only draw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property

from kvsuite import collector
from kvsuite.analysis import validity
from kvsuite.analysis.cost import Throughput, throughput
from kvsuite.analysis.figure import Figure, Map
from kvsuite.analysis.figures import figures
from kvsuite.analysis.gates import Gates
from kvsuite.analysis.pairs import Pair, pairs
from kvsuite.analysis.sentences import Sentence, limits, sentences
from kvsuite.analysis.shortfall import interrupted, shares, timed
from kvsuite.analysis.speed import OURS
from kvsuite.analysis.table import Cell, Note, Table
from kvsuite.analysis.tables import servers, speed
from kvsuite.analysis.tables.answers import answers
from kvsuite.analysis.tables.capacity import capacity
from kvsuite.analysis.tables.causes import causes
from kvsuite.analysis.tables.chats import chats, sweep
from kvsuite.analysis.tables.gates import gates, outcomes
from kvsuite.analysis.tables.modes import modes
from kvsuite.analysis.tables.predicted import predicted
from kvsuite.analysis.tables.types import types
from kvsuite.analysis.tables.verbosity import verbosity
from kvsuite.analysis.tables.verdicts import verdicts
from kvsuite.errors import unknown
from kvsuite.modes import PAGED, mode_of
from kvsuite.records import Answer, Record, Run, Timing

NO_GATES = Gates()


@dataclass(frozen=True)
class Report:
    """What a run shows. ``report.cell("verdicts", ("int8", "speed"), "effect").low`` is a bound of an interval."""

    run: Run
    """Where it comes from: its folder, and its facts as ``run.json`` has them."""
    tables: Sequence[Table]
    """What is missing first, then the verdicts."""
    appendix: Sequence[Table]
    """Every single figure: too long for a terminal."""
    notes: Sequence[Note]
    """To be read at the end."""
    figures: Sequence[Figure | Map] = ()
    sentences: Sequence[Sentence] = ()
    """One a method, for whoever reads nothing else."""
    limits: Sequence[str] = ()
    """What the run cannot tell."""
    throughput: Throughput | None = None
    """What a price of tokens is made from."""
    failed: bool = False
    """Whether a gate says so."""
    alarms: Sequence[str] = ()
    """Headlines that a run is to end with an error for."""

    def table(self, key: str) -> Table:
        """The table of this key. Raises UsageError where there is none."""
        known = {table.key: table for table in (*self.tables, *self.appendix)}
        if key not in known:
            raise unknown("table of the report", key, known)
        return known[key]

    def cell(self, table: str, row: str | tuple[str, ...], column: str) -> Cell:
        """The cell of these keys. Raises UsageError for keys that are not there."""
        return self.table(table).cell(row, column)

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every answer beside the baseline's to the same sample."""
        return pairs(self.run)

    @property
    def shortfall(self) -> Table | None:
        """What was to be measured and is not there; None where all is."""
        return next((table for table in self.tables if table.key == "shortfall"), None)


@collector.off()
def analyse(run: Run, held: Gates = NO_GATES, today: date | None = None) -> Report:
    """Everything that is shown of a run, and of the gates it is held against; ``today`` is when they were."""
    judged, effects = verdicts(run)
    found = outcomes(run, held, effects, today or date.today())
    tables = [*_shortfall(run), *gates(held, found), *servers.headlines(run), *judged]
    tables += [*servers.speed(run), *servers.pressure(run), *servers.calls(run), *servers.served(run)]
    tables += [*speed.phases(run), *modes(run), *capacity(run), *types(run), *answers(run), *causes(run), *chats(run)]
    tables += [*verbosity(run), *predicted(run), *speed.promises(run)]
    tables += sweep(run, {table.key: table for table in tables})
    notes = [*provenance(run.records), *([Note(f"{run.lost}.", "warning")] if run.torn else [])]
    notes += [
        Note(f"{task}: {count} {what}, to fit the model's context.")
        for task, done in run.facts.get("fitted", {}).items()
        for what, count in done.items()
    ]
    known = {table.key: table for table in tables}
    return Report(
        run,
        tables,
        speed.timings(run),
        notes,
        figures(run, known),
        sentences(run, known),
        limits(run, known),
        throughput(run),
        held.failed(found),
        [f"{o.kind} {o.arm}: {o.text}" for o in validity.outcomes(run) if o.fatal],
    )


def _shortfall(run: Run) -> list[Table]:
    """What was to be measured and is not there; nothing for a run that has all, or does not say what it was to have."""
    counts = []
    for task, arms in shares(run).items():
        there, asked = sum(s.ok + s.failed for s in arms.values()), sum(s.asked for s in arms.values())
        counts += [f"{task}: {there:,} of {asked:,} answers"] if there < asked else []
    done, asked = timed(run)
    counts += [f"speed: {done} of {asked} timed cells"] if done < asked else []
    if interrupted(run):
        title = "partial: this run was interrupted"
    elif counts:
        title = "partial: this run ended before all was measured"
    else:
        return []
    notes = [Note(f"partial · {' · '.join(counts)}.", "error")] if counts else []
    return [Table("shortfall", title, notes=notes, severity="error")]


def provenance(records: Sequence[Record]) -> list[Note]:
    """That what was scored is what was timed, or that it was not; nothing where no method was both."""
    good = [r for r in records if isinstance(r, (Answer, Timing)) and r.status == "ok" and r.cache.startswith(OURS)]
    scored = {(r.method, r.cache) for r in good if isinstance(r, Answer)}
    timed = {(r.method, r.cache) for r in good if isinstance(r, Timing) and mode_of(r.phase)[1] == PAGED}
    both = {method for method, _ in scored} & {method for method, _ in timed}
    if not both:
        return []
    apart = [f"{method} {cache}" for method, cache in sorted(scored ^ timed) if method in both]
    if apart:
        return [Note(f"NOT THE SAME CACHE SCORED AND TIMED: {', '.join(apart)}.", "error")]
    caches = sorted({cache for method, cache in scored if method in both})
    return [Note(f"Scored and timed: the same {', '.join(caches)}.")]
