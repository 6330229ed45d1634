"""What was measured: one record a line, written at once, in a folder that says where it comes from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, NoReturn

import msgspec
from msgspec import Meta

from kvsuite import collector, disk
from kvsuite.environment import scrub
from kvsuite.errors import UsageError, printable
from kvsuite.margins import Margins
from kvsuite.typed import Shape, amiss, finite

SCHEMA = 1
"""Version of the record lines; a reader refuses others."""
MOST = 10**18
"""Of any figure: bytes a second, operations, seconds."""
Count = Annotated[int, Meta(ge=0, le=MOST)]
Rows = Annotated[int, Meta(ge=1, le=MOST)]
Amount = Annotated[float, Meta(ge=0, le=MOST)]
Positive = Annotated[float, Meta(ge=1e-12, le=MOST)]
Signed = Annotated[float, Meta(ge=-MOST, le=MOST)]


class Job(NamedTuple):
    """One unit of work, which one record is the result of. What all jobs of a run share (model, seed, settings) is in
    its ``run.json``."""

    evaluation: str
    """samples, length, divergence or throughput."""
    arm: str
    task: str
    """Of a timed cell its phase."""
    item: str
    """A sample's id; of a timed cell its batch and length; of an agreement the other side."""
    repeat: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """One measured fact. ``status`` "failed" carries the reason in ``error`` and no figures to be believed."""

    kind: ClassVar[str]

    method: str
    status: Literal["ok", "failed"] = "ok"
    error: str = ""
    cache: str = ""
    """The class that stored and attended, with its module: what is scored must be what is timed."""
    path: str = ""
    """Codec, and the backend that stored and attended: ``kivi/reference``. Earlier versions called that one unfused."""
    refusal: str = ""
    """Why another backend was not taken."""
    artifact: str = ""
    """The hash of what the codec had learned of the model before."""
    width: Rows = 1
    """Rows of the matrix products it was decoded in, idle ones included."""

    @property
    def job(self) -> Job | None:
        """What it is the result of; None where it is no job's alone, such as what a server said of a leg."""
        return None


@dataclass(frozen=True, slots=True)
class Answer(Record):
    """One answer of one method to one sample. Seconds are wall time."""

    kind: ClassVar[str] = "answer"

    evaluation: str = "samples"
    task: str = ""
    type: str = ""
    """qa, summarization, few-shot, synthetic, code or chat."""
    sample: str = ""
    cluster: str = ""
    """The document the sample was made of, where several can be made of one."""
    prompt: str = ""
    """The end of the user's message; earlier runs did not record it."""
    prompt_hash: str = ""
    """Of all its messages, see `kvsuite.tasks.Sample`; empty in earlier runs and where there is no task."""
    chance: Amount = 0.0
    """What guessing scores on this sample; earlier runs did not record it."""
    repeat: Count = 0
    score: Amount | None = None
    """0 to 1; None where the task has no reference."""
    tokens: list[Count] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    """stop, or length where the cap ended it."""
    cap: Count = 0
    prompt_tokens: Count = 0
    context_tokens: Count = 0
    prefill_seconds: Amount = 0.0
    shared_seconds: Amount = 0.0
    """Its part that is every arm's alike: the prefill of a sample is run once. Earlier versions did not record it."""
    decode_seconds: Amount = 0.0
    """The steps it took part in: what its reader waited."""
    decode_share: Amount = 0.0
    """Its part of those, each step divided by its sequences: adds up over a method's answers."""
    nbytes: Count = 0
    """Held after the prompt, all layers."""
    nbytes_end: Count = 0
    """Held when the answer ended, and what K and V of all its tokens would take uncompressed."""
    dense_end: Count = 0
    read_end: Count = 0
    """Bytes that the last step read: less than held where a reader chooses pages."""
    fragmentation: Amount = 0.0
    """The share of the slots in use at the end that held no token, mean over layers."""
    kept: Count = 0
    margins: list[Amount] = field(default_factory=list)
    """Gap between the two highest logits at every token."""

    @property
    def job(self) -> Job | None:
        """One sample, answered by one arm."""
        return Job(self.evaluation, self.method, self.task, self.sample, self.repeat)

    @property
    def length(self) -> int:
        """Tokens of the answer."""
        return len(self.tokens)

    @property
    def output_key(self) -> object:
        """Compared to tell whether two answers are identical."""
        return self.tokens

    @property
    def seconds(self) -> float:
        """What the answer took of the machine."""
        return self.prefill_seconds + self.decode_share


@dataclass(frozen=True, slots=True)
class Served(Answer):
    """One answer of a server, and how it came. Its token ids are not known; seconds count from the sending."""

    kind: ClassVar[str] = "served"

    cell: str = ""
    """What was timed: arrivals and tokens of the prompts. Empty for an answer to a task."""
    block: Count = 0
    """All arms take the same requests in a block, each in two of its legs (A B B A)."""
    leg: Count = 0
    """In the order of time."""
    test: Count = 0
    """Which load test of a leg's search for goodput it belongs to."""
    reasoning: str = ""
    calls: str = ""
    """Names and arguments of the tools it called."""
    count: Count = 0
    """Tokens, reasoning and calls included."""
    counted: str = ""
    """Who counted them: the server's usage, a tokenizer, or one for each chunk."""
    usage_tokens: Count | None = None
    """What the server's usage said, where the tokenizer did not find it so."""
    cached_tokens: Count | None = None
    """Of the prompt, those found in the server's prefix cache."""
    start: Signed = 0.0
    """When it was sent, on the client's clock."""
    ttft: Amount = 0.0
    """0 where nothing came before the end."""
    gaps: list[Amount] = field(default_factory=list)
    """Between chunks."""
    e2e: Amount = 0.0
    retries: Count = 0

    @property
    def job(self) -> Job | None:
        """None: a server's legs are measured as a whole."""
        return None

    @property
    def length(self) -> int:
        """Tokens of the answer."""
        return self.count

    @property
    def output_key(self) -> object:
        """Compared to tell whether two answers are identical."""
        return self.reasoning, self.text, self.calls

    @property
    def seconds(self) -> float:
        """What its reader waited."""
        return self.e2e

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None where there is one token at most, and where all came in one piece."""
        return (self.e2e - self.ttft) / (self.count - 1) if self.count > 1 and self.gaps else None


@dataclass(frozen=True, slots=True)
class Forced(Answer):
    """One arm's next-token distributions on a document's own continuation, which was fed to it token by token
    behind the document. Its answer is one token, of no use."""

    kind: ClassVar[str] = "forced"

    evaluation: str = "divergence"
    kl: list[Signed] = field(default_factory=list)
    """KL of the baseline's distribution against this arm's at each position, nats."""
    flips: list[Count] = field(default_factory=list)
    """1 where the most likely token is another than the baseline's."""
    logs: list[Signed] = field(default_factory=list)
    """Log probability of the token that follows, nats."""


@dataclass(frozen=True, slots=True)
class Loss(Record):
    """What a method's cache lacked of the uncompressed one when it answered a sample (``kvsuite why``). Shares are
    means over layers and kv heads, of attention over query heads."""

    kind: ClassVar[str] = "loss"

    task: str = ""
    sample: str = ""
    repeat: Count = 0
    kept: Amount = 0.0
    """Of the prompt's tokens, the share that was held when the answer began."""
    span: str = ""
    """The sentence of the context in which the reference stands; empty where it stands nowhere, or several times."""
    span_tokens: Count = 0
    span_kept: Amount | None = None
    """Of the span's tokens, the share that was held then."""
    span_gone: Amount | None = None
    """The share of heads that held none of them."""
    layers: list[Amount] = field(default_factory=list)
    """``span_kept`` layer by layer."""
    positions: Count = 0
    """Tokens of the baseline's answer, spread evenly, at which attention was looked at."""
    attention: Amount | None = None
    """The share of the uncompressed cache's attention there that goes to tokens which the method's no longer held, mean
    over these positions. The method's cache was fed the baseline's answer."""
    parting: Amount | None = None
    """The same at the token at which the answers part; None where they do not, or where that was decided by the
    uncompressed prefill."""
    k_error: Amount | None = None
    """Of the prompt's tokens that were held then: √(Σ(K̂ - K)² / ΣK²), K̂ as attention reads it."""
    v_error: Amount | None = None
    span_k_error: Amount | None = None
    """Of the span's tokens alone."""
    span_v_error: Amount | None = None

    @property
    def job(self) -> Job | None:
        """One arm's answer to one sample, looked into."""
        return Job("why", self.method, self.task, self.sample, self.repeat)


@dataclass(frozen=True, slots=True)
class Similarity(Record):
    """How close an answer to a chat is in meaning to others (``kvsuite verbosity``): cosines of embeddings, -1 to 1. An
    empty answer has no meaning, and a cosine of 0 with any."""

    kind: ClassVar[str] = "similarity"

    task: str = ""
    sample: str = ""
    repeat: Count = 0
    embedder: str = ""
    """The model that embedded."""
    pieces: Count = 0
    """Word pieces of the answer; the embedder may have seen the first of them alone."""
    reference: Signed | None = None
    """With the task's reference answer; None where it has none to this sample."""
    baseline: Signed | None = None
    """With the baseline's last answer; None for that answer itself."""

    @property
    def job(self) -> Job | None:
        """One arm's answer to one chat, compared."""
        return Job("verbosity", self.method, self.task, self.sample, self.repeat)


@dataclass(frozen=True, slots=True)
class Predicted(Record):
    """What a predictor, or a routing policy, is worth on what it had not seen, beside those that know less."""

    kind: ClassVar[str] = "predicted"

    tool: str = ""
    """throughput, length, type of task or router."""
    what: str = ""
    """What was predicted, and what was left out while learning."""
    measure: str = ""
    """An error or loss, of which less is better, or a share of right answers."""
    unit: str = ""
    n: Count = 0
    value: Signed = 0.0
    low: Signed | None = None
    high: Signed | None = None
    """The ends of the 95 % interval, where it has one."""
    nulls: dict[str, Signed] = field(default_factory=dict)
    """The same measure of others, by name."""
    better: bool | None = None
    """Whether it surely does better than they do; None where nothing was compared."""

    @property
    def job(self) -> Job | None:
        """One figure of one tool."""
        return Job("tools", self.method, self.tool, f"{self.what}, {self.measure}")


@dataclass(frozen=True, slots=True)
class Probe(Record):
    """What a server said of itself around one leg: on ``/metrics``, in its log, in its own words."""

    kind: ClassVar[str] = "probe"

    leg: Count = 0
    block: Count = 0
    profile: str = ""
    command: str = ""
    """What started it, or its address."""
    facts: dict[str, Any] = field(default_factory=dict)
    """kv_dtype, kv_tokens, kv_bytes, prefix_caching …: what it runs with."""
    counters: dict[str, Amount] = field(default_factory=dict)
    """What happened during the leg: preemptions, prefix hits …"""


@dataclass(frozen=True, slots=True)
class Scored(Record):
    """How likely the uncompressed baseline's server finds what an arm answered: it was given the answer as a prompt."""

    kind: ClassVar[str] = "scored"

    task: str = ""
    sample: str = ""
    logs: list[Signed] = field(default_factory=list)
    """Log-probability of every token of the answer, nats, at temperature 1."""


@dataclass(frozen=True, slots=True)
class Agreement(Record):
    """On how many of ``n`` samples a method gave the very tokens of ``other``."""

    kind: ClassVar[str] = "agreement"

    other: str = ""
    task: str = ""
    n: Count = 0
    same: Count = 0

    @property
    def job(self) -> Job | None:
        """All samples of a task, answered twice."""
        return Job("samples", self.method, self.task, self.other)


@dataclass(frozen=True, slots=True)
class Timing(Record):
    """One cell of the speed evaluation: paired rounds of the baseline and of a method whose output was checked."""

    kind: ClassVar[str] = "timing"

    phase: Literal[
        "prefill", "decode", "shared prefill", "width", "eager", "sdpa", "flash-attn", "eager prefill", "sdpa prefill",
        "flash-attn prefill",
    ] = "decode"  # fmt: skip
    """Then the core's promises: many methods against one prefill, a wide step against a narrow one. The last are steps
    and prefills with transformers' attention of that name, both sides alike: see `kvsuite.modes`."""
    length: Count = 0
    """Tokens of context per sequence at the first round."""
    tokens: Count = 0
    """Tokens a round yields, all sequences. A round is a block of A B B A, with two turns of either side; earlier runs
    timed A B."""
    seconds: list[Positive] = field(default_factory=list)
    baseline_seconds: list[Positive] = field(default_factory=list)
    """Of the same rounds."""
    nbytes: Count = 0
    """Held by all sequences, all layers."""
    nbytes_read: Count = 0
    """Read by one step of all sequences."""
    allocated: Count = 0
    """Bytes that the caches have reserved on the device: what is held, and free pages and slots. Earlier runs did not
    record it."""
    peak: Count | None = None
    """The most memory that the device had given out while the cell was made, filled and checked, above what it had
    before: for a prefill that is activations, K and V in full precision, observations and the caches. None where the
    system does not tell."""
    checked: Amount | None = None
    """How far its attention was from the reference over what it holds, in units of the tolerance; None: not checked."""
    rest_seconds: list[Positive] = field(default_factory=list)
    """Of the same rounds with no layer at all, where the model has fewer layers than the one it stands for."""
    scale: Positive = 1.0
    """Layers of the model it stands for over layers that ran."""
    moved: Count = 0
    """Bytes that a round must read from memory at least: weights, and what is held. Earlier runs did not record it."""
    operations: Count = 0
    """Multiplications and additions of a round, those of products of matrices."""
    bandwidth: Amount = 0.0
    """Bytes a second that this machine read, measured before the run's first cell."""
    rate: Amount = 0.0
    """Operations a second of a large product in the compute dtype, then."""
    attention_seconds: list[Amount] = field(default_factory=list)
    baseline_attention_seconds: list[Amount] = field(default_factory=list)
    """What the caches took of either side's rounds: storing new tokens and attending, all layers. Empty on a GPU, which
    works while the clock reads."""

    @property
    def job(self) -> Job | None:
        """One cell."""
        return Job("throughput", self.method, self.phase, cell_name(self.width, self.length))


OUT_OF_MEMORY = "out of memory"
"""What the error of a timed cell begins with whose size did not fit."""


def cell_name(width: int, length: int) -> str:
    """A timed cell among those of its phase."""
    return f"b{width} l{length}"


KINDS: dict[str, type[Record]] = {
    kind.kind: kind for kind in (Answer, Served, Forced, Loss, Similarity, Predicted, Probe, Scored, Agreement, Timing)
}


def encode(record: Record) -> str:
    """One JSON line. Raises ValueError for a number that is not finite: measure again or record a failure."""
    line = {"schema": SCHEMA, "kind": record.kind, **dataclasses.asdict(record)}
    return json.dumps(line, allow_nan=False, ensure_ascii=False)


class Unfit(UsageError):
    """A figure that a record cannot have, and its field's name; empty where several do not belong together."""

    def __init__(self, said: str, name: str = "") -> None:
        super().__init__(said)
        self.name = name


def decode(line: str | bytes) -> Record:
    """The record of one line. Raises UsageError for another schema or kind and for a value of the wrong type,
    ValueError for what is no JSON object."""
    found = _parsed(line)
    if not isinstance(found, dict):
        raise ValueError("this line is no record")
    if found.pop("schema", None) != SCHEMA:
        raise UsageError(f"this record is of another schema than {SCHEMA}")
    name = found.pop("kind", "")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise UsageError("this record is of a kind this version does not know")
    if "method" not in found:
        raise UsageError("this record has no method")
    if not found.keys() <= FIELDS[kind.kind]:
        name = next(name for name in found if name not in FIELDS[kind.kind])
        raise UsageError(f"this record has a field {name!r}, which this version does not know")
    try:
        record = msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        name = next(iter(re.findall(r"`\$\.(\w+)", str(error))[-1:]), "")
        raise Unfit(f"{name} cannot be {repr(found.get(name))[:40]}", name) from error
    if said := _unpaired(record):
        raise Unfit(said)
    return record


_JSON = msgspec.json.Decoder()


def _parsed(line: str | bytes) -> Any:
    try:
        return _JSON.decode(line)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):  # no JSON, lone surrogates, or beyond a float
        found = disk.parsed(line if isinstance(line, str) else line.decode(), finite=True)
        if not finite(found):
            raise UsageError("this record has a number beyond what a float can hold") from None
        return found


FIELDS = {name: {field.name for field in dataclasses.fields(kind)} for name, kind in KINDS.items()}
"""By kind, the names of its fields."""


def _unpaired(record: Record) -> str:
    """Which figures of a timed cell do not belong together; empty where all do."""
    if not isinstance(record, Timing) or record.status != "ok":
        return ""
    rounds = len(record.seconds)
    for name in ("baseline_seconds", "rest_seconds", "attention_seconds", "baseline_attention_seconds"):
        other = len(getattr(record, name))
        if other != rounds and (other or name == "baseline_seconds"):
            return f"{name} are of {other} rounds, seconds of {rounds}"
    return "tokens are 0, of rounds that took time" if rounds and not record.tokens else ""


class RunFolder:
    """Where a run leaves what it measured: ``run.json`` and ``records.jsonl``. Each pytest-xdist worker appends to a
    file of its own, ``records-gw0.jsonl``, until the controller joins them."""

    def __init__(self, folder: Path, worker: str = "") -> None:
        self.folder = folder
        self._file = folder / (f"records-{worker}.jsonl" if worker else "records.jsonl")

    def describe(self, facts: dict[str, Any]) -> None:
        """Write ``run.json``: what, where, versions, seeds, hardware. A later call replaces it. Raises UsageError where
        that cannot be done, as all here do."""
        facts = facts | {key: scrub(facts[key]) for key in ("command", "servers") if key in facts}
        text = json.dumps({"schema": SCHEMA, **facts}, indent=2, ensure_ascii=False, allow_nan=False)
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            disk.write(self.folder / "run.json", text + "\n")

    def amend(self, facts: dict[str, Any]) -> None:
        """Add facts to ``run.json``, where there is one. The records that they are about are on disk before."""
        file = self.folder / "run.json"
        if file.is_file():
            self.keep()
            self.describe({**disk.parsed(disk.text(file)), **facts})

    def append(self, record: Record) -> None:
        """Write one record and flush it. A figure that is not finite, or that none can be, makes it a failed record,
        which is kept."""
        record, wrong = _published(record), list[str]()
        try:
            line = encode(record)
        except ValueError:
            record = failed(record, "a figure is not finite")
            line = encode(record)
        while (said := _amiss(line)) and len(wrong) < len(FIELDS[record.kind]):
            wrong.append(said.name)
            record = failed(record, record.error if wrong[1:] else str(said), wrong)
            line = encode(record)
        data = line.encode(errors="backslashreplace")  # of a lone surrogate: its escape in JSON
        if len(data) > disk.LONGEST:  # which nobody could read
            why = f"its record has {len(data):,} bytes, and {disk.LONGEST:,} are read"
            data = encode(failed(record, why, _longest(record))).encode(errors="backslashreplace")
        self._write([data])

    def join(self) -> None:
        """Append the workers' files to ``records.jsonl`` and remove them. Who was killed in between has appended some
        of their lines: these are not appended twice."""
        parts = sorted(self.folder.glob("records-*.jsonl"))
        if not parts:
            return
        if links := [part for part in parts if part.is_symlink()]:
            raise UsageError(f"{str(links[0])!r} is a link, and no worker's file")
        known = {line for _, line in disk.lines(self._file)} if self._file.is_file() else set[bytes]()
        for part in parts:
            self._write([line for _, line in disk.lines(part) if line not in known])
        self.keep()
        for part in parts:
            part.unlink()

    def keep(self) -> None:
        """Have all records survive the end of the machine. Appended ones the system writes in its own time: who loses
        power answers the last ones again."""
        with self._writing():
            for file in self.folder.glob("records*.jsonl"):
                with disk.append(file) as opened:
                    os.fsync(opened.fileno())
            disk.sync(self.folder)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(f"{str(self.folder)!r} cannot be written: {error.strerror or error}") from error

    def _write(self, lines: Iterable[bytes]) -> None:
        """Append lines; a line that was cut off before them ends where it was cut."""
        with self._writing():
            self._append(lines)

    def _append(self, lines: Iterable[bytes]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with disk.append(self._file) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            for line in lines:
                file.write(line + b"\n")


def _longest(record: Record) -> list[str]:
    """The fields that make a record long."""
    values = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    return [name for name, value in values.items() if isinstance(value, (str, list, dict)) and len(value) > 10_000]


def _amiss(line: str) -> Unfit | None:
    try:
        decode(line)
    except Unfit as error:
        return error
    return None


def _published(record: Record) -> Record:
    """Without the folders and names of whoever ran it. What a model said stays as it is."""
    known = ("error", "command", "facts") if isinstance(record, Probe) else ("error",)
    said = {name: scrub(getattr(record, name)) for name in known}
    return dataclasses.replace(record, **{**said, "error": printable(said["error"])})


def failed(record: Record, error: str, wrong: Collection[str] = ()) -> Record:
    """The same cell as a failure, without figures that are not finite and those that are ``wrong``."""
    broken: dict[str, Any] = {}
    for f in dataclasses.fields(record):
        if not finite(getattr(record, f.name)) or f.name in wrong:
            made = f.default_factory
            broken[f.name] = f.default if made is dataclasses.MISSING else made()
    return dataclasses.replace(record, status="failed", error=error, **broken)


class Facts(dict[str, Any]):
    """What ``run.json`` says. To ask for what it does not say is a UsageError: who publishes a run may have changed
    it."""

    def __init__(self, file: Path, found: dict[str, Any], where: str = "") -> None:
        self.file, self.where = file, where
        super().__init__({k: Facts(file, v, f"{where}{k}.") if isinstance(v, dict) else v for k, v in found.items()})

    def __missing__(self, key: str) -> NoReturn:
        raise UsageError(f"{str(self.file)!r} has no {self.where}{key}")


@dataclass(frozen=True, eq=False)
class Run:
    """A run as it was left; itself alone is equal to it, so that what is found out about it can be kept."""

    folder: Path
    facts: dict[str, Any]
    records: list[Record]
    torn: int = 0
    """Lines that cannot be read: cut off while being written, or damaged since."""

    @property
    def lost(self) -> str:
        """What is said of these."""
        lines, were = ("line", "was") if self.torn == 1 else ("lines", "were")
        return f"{self.torn} record {lines} {were} cut off while being written, or damaged, and left out"

    @property
    def baseline(self) -> str:
        """The arm that all others are held against."""
        return str(self.facts.get("baseline", "full"))

    @property
    def sampled(self) -> bool:
        """Whether servers sampled answers to chats, the A/A arm with seeds of its own."""
        return "servers" in self.facts and self.facts["settings"]["temperature"] > 0

    def is_control(self, method: str) -> bool:
        """Whether an arm differs from the baseline by noise alone."""
        controls = self.facts.get("controls")
        return is_control(method) if controls is None else method in controls


def is_control(method: str) -> bool:
    """Whether a method in process differs from the baseline by noise alone."""
    return method.startswith("jitter")


REFERENCE = "full:temperature="
"""What an arm's name begins with that is the uncompressed cache at another temperature than the run's: a known effect
on length to hold methods against. It is no method and no control: nothing judges or ranks it."""


def is_reference(arm: str) -> bool:
    """Whether an arm is the uncompressed cache at another temperature."""
    return arm.startswith(REFERENCE)


@collector.off()
def read(folder: Path) -> Run:
    """A run folder, workers' files included: arm by arm in the order the run names them, each in the order of time.
    A line that was cut off costs itself alone, and a failed job that was done again its first record. Raises UsageError
    for a folder that is none and for a record of another version."""
    try:
        _is_file(folder / "run.json")
        facts = disk.parsed(disk.text(folder / "run.json"), finite=True)
        if said := amiss(facts, FACTS, whole=False):
            raise UsageError(said)
    except ValueError as error:  # a UsageError is one
        raise UsageError(f"{str(folder)!r} is not a run folder: {error}") from error
    lines = list(_decoded(folder))
    records = [record for record in lines if record is not None]
    order = {method: at for at, method in enumerate(facts.get("methods", ()))}
    by_arm = sorted(_once(records), key=lambda record: order.get(record.method, len(order)))
    return Run(folder, Facts(folder / "run.json", facts), by_arm, torn=len(lines) - len(records))


@collector.off()
def results(folder: Path, jobs: Collection[Job]) -> list[Record]:
    """The records of some jobs in a run folder, in the order of time; others are not held. Raises as `read`."""
    return _once([record for record in _decoded(folder) if record is not None and record.job in jobs])


def _decoded(folder: Path) -> Iterator[Record | None]:
    """All records; None for a line that was cut off."""
    for file, at, line in _lines(folder):
        try:
            yield decode(line)
        except UsageError as error:
            raise UsageError(f"{file} line {at}: {error}") from error
        except ValueError:  # cut off: the beginning of a line is never JSON
            yield None


def _is_file(file: Path) -> bool:
    """Whether there is such a file. Raises UsageError for what is none: a pipe would be waited for."""
    if disk.is_there(file) and not file.is_file():
        raise UsageError(f"{str(file)!r} is no file")
    return disk.is_file(file)


def _lines(folder: Path) -> Iterator[tuple[Path, int, bytes]]:
    """The lines of a folder's files. Those of a worker that the controller had begun to join are there once."""
    joined, *parts = folder / "records.jsonl", *sorted(folder.glob("records-*.jsonl"))
    known = set[bytes]()
    for file in (joined, *parts):
        for at, line in disk.lines(file) if _is_file(file) else ():
            if file == joined or line not in known:
                yield file, at, line
            if file == joined and parts:
                known.add(line)


FACTS: Shape = {
    "started": str,
    "command": list[str],
    "preset": str,
    "methods": list[str],
    "texts": dict[str, str],
    "settings": {
        "batch": list[int], "length": list[int], "tasks": list[str], "samples": int | dict[str, int], "cap": int,
        "temperature": float, "seed": int, "dtype?": str, "device?": str, "backend?": str, "compress?": str,
        "end?": str, "repeats?": int, "cells?": list[str], "goodput?": list[float] | None, "arrivals?": str,
        "prefix?": str, "serve?": str, "requests?": int, "workload?": str,
    },
    "environment": {
        "kvsuite": str, "git": ({"commit": str, "dirty": bool},), "python": str, "packages": dict[str, str],
        "platform": str, "cpu": str, "cores": int, "gpu": str | None, "threads": int | None, "compute_dtype?": str,
        "kv_dtype?": str, "dtype_reason?": str, "tensor_parallel?": int,
    },
    "model": {"name": str, "fingerprint?": str},
    "finished?": str | None,
    "resumed?": str,
    "baseline?": str,
    "controls?": list[str],
    "plugins?": dict[str, Any],
    "margins?": {"veto?": list[str], **{f"{name}?": float for name in Margins.names()}},
    "servers?": dict[str, str],
    "cells?": list[str],
    "expected?": {"samples?": dict[str, int], "timings?": int},
    "fitted?": dict[str, Any],
}  # fmt: skip
"""What ``run.json`` says that its readers rely on."""


def whole(folder: Path) -> Run:
    """`told`, of a run that says all that a report shows. Raises UsageError where it does not, too."""
    run = told(folder)
    if said := amiss(run.facts, FACTS, whole=True):
        raise UsageError(f"{str(folder / 'run.json')!r} is not whole: {said}")
    return run


def told(folder: Path) -> Run:
    """`read` for a command, which tells of lines that cannot be read on standard error."""
    run = read(folder)
    if run.torn:
        print(f"{folder}: {run.lost}", file=sys.stderr)
    return run


def _once(records: list[Record]) -> list[Record]:
    """Without the failures of jobs that were done again."""
    lost = {record.job for record in records if record.status != "ok"}
    again = {record.job: at for at, record in enumerate(records) if record.job in lost} if lost else {}
    return [r for at, r in enumerate(records) if r.status == "ok" or r.job is None or again[r.job] == at]


LATER = {"end": "natural", "repeats": 1}
"""Settings that earlier runs do not have, and what they did."""


def refusal(one: Run, other: Run) -> str:
    """Why two runs cannot be compared, in a sentence; empty if they can: same model, same texts, same settings."""
    for key, what in (("model", "models"), ("texts", "texts"), ("settings", "settings")):
        a, b = one.facts.get(key), other.facts.get(key)
        if key == "settings":
            a, b = ({**LATER, **x} if isinstance(x, dict) else x for x in (a, b))
        if a != b:
            parts = _differing(a, b)
            return f"{one.folder} and {other.folder} are of different {what} ({parts}) and cannot be compared"
    return ""


def changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Why a run cannot go on, in a sentence; empty if it can: the same model, texts, settings, versions and machine.
    Tasks may be added, with their texts. What ``now`` does not say is not compared."""
    for key in ("model", "texts", "plugins", "settings", "environment"):
        a, b = before.get(key), now.get(key)
        if key == "settings" and a and b and set(a["tasks"]) <= set(b["tasks"]):
            a = a | {"tasks": b["tasks"]}
        if key == "texts" and a and b:
            a = {name: b.get(name) for name in b.keys() - a.keys()} | a
        if isinstance(a, dict) and isinstance(b, dict) and key == "environment":
            a = {name: a.get(name) for name in b}
        if b is not None and a != b:
            what = "machine or its versions" if key == "environment" else key
            return f"its {what} differed ({_differing(a, b)})"
    return ""


def _differing(a: Any, b: Any) -> str:
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return f"{a!r} and {b!r}"
    keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    return ", ".join(f"{key}: {_differing(a.get(key), b.get(key))}" for key in keys)
