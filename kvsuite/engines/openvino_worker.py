"""The process in which OpenVINO GenAI runs: one thread adds requests, steps, and stamps tokens as they come."""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import queue
import random
import re
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvsuite.engines.keeper import LINUX, PR_SET_PDEATHSIG
from kvsuite.engines.openvino_model import Model
from kvsuite.engines.request import Ask, Reply

EXTRA = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos")
"""Fields of a request's body that GenAI knows by the same name."""


def serve(model: str, options: Mapping[str, str], asks: Any, replies: Any) -> None:
    """Answer until the parent is gone. ``replies`` gets ("ready", facts) or ("failed", reason), then triples: a
    request's number, its reply, and facts that are new; None and a reason when a step failed."""
    parent = _bind()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    try:
        worker = Worker(Model(Path(model), options))
    except Exception as error:
        replies.send(("failed", _said(error)))
        os._exit(1)
    try:
        replies.send(("ready", worker.model.facts))
        while os.getppid() == parent:
            _round(worker, asks, replies)
    except Exception as error:
        with contextlib.suppress(OSError):  # the parent is gone
            replies.send((None, f"a step failed: {_said(error)}", {}))
    os._exit(0)  # OpenVINO's destructors print hundreds of lines after an error, and its memory goes anyway


def _bind() -> int:
    """Have Linux kill this process when its parent ends, and return the parent's id; ends at once where it is gone.

    Nothing here could look for it while OpenVINO compiles or hangs: it may hold Python's lock all along. The signal
    comes when the *thread* ends that started this process. In kvsuite that is the main one, or one of the event loop's
    executor (`asyncio.to_thread`), which lives until the loop closes; a thread made just to start an engine takes the
    engine along. Elsewhere only the rounds notice.
    """
    if LINUX:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    expected = multiprocessing.parent_process()
    if expected is None or os.getppid() != expected.pid:  # it ended before: no signal will come
        os._exit(1)
    return expected.pid


def _round(worker: Worker, asks: Any, replies: Any) -> None:
    """Take what was asked since, and make a step if there is anything to do; waits a second for it otherwise."""
    for number, ask, start in _waiting(asks, idle=not worker.busy):
        if ask is None:
            worker.cancel(number)
        elif (reply := worker.add(number, ask, start)) is not None:
            replies.send((number, reply, {}))
    if worker.busy:
        for number, reply in worker.step():
            replies.send((number, reply, worker.seen))


@dataclass
class Job:
    """A request that is being answered."""

    handle: Any
    start: float
    prompt: int
    ids: list[int] = field(default_factory=list)
    stamps: list[float] = field(default_factory=list)
    """Seconds after ``start`` at which a token came that is text."""
    finish: str = ""
    went_on: bool = False
    """Whether it got a token in the last step."""


class Worker:
    """A model and the requests it is answering."""

    def __init__(self, model: Model) -> None:
        self.model, self.jobs = model, dict[int, Job]()
        self.seen: dict[str, Any] = {"preemptions": 0}

    @property
    def busy(self) -> bool:
        """Whether there is something to step for; a request that was cancelled takes one more step to go."""
        return bool(self.model.pipeline.has_non_finished_requests())

    def add(self, number: int, ask: Ask, start: float) -> Reply | None:
        """Put a request into the batch; the reply if it cannot be answered."""
        reply = Reply(ask.id, counted="tokenizer")
        try:
            tools = [dict(tool) for tool in ask.tools] or None
            tokenizer, messages = self.model.tokenizer, [dict(message) for message in ask.messages]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tools=tools)
            ids = tokenizer.encode(text, add_special_tokens=False).input_ids  # the template has written them
            reply.prompt_tokens = prompt = int(ids.shape[-1])
            config = self._config(ask, self.model.limit - prompt)
            handle = self.model.pipeline.add_request(number + 1, ids, config)  # 0 was the probe
            self.jobs[number] = Job(handle, start, prompt)
            return None
        except Exception as error:
            reply.error = _said(error)
            return reply

    def _config(self, ask: Ask, room: int) -> Any:
        if self.model.limit - room in self.model.fatal:
            fatal = f"{self.model.fatal[0]} to {self.model.fatal[-1]} tokens"
            raise ValueError(f"OpenVINO's scores=norm-sum fails at prompts of {fatal}: use scores=sum or window=0")
        if room < (ask.max_tokens or 1):
            wanted = f"at least {self.model.limit - room} tokens and {ask.max_tokens or 1} are to come"
            raise ValueError(f"the prompt has {wanted}; there is room for {self.model.limit}")
        config = self.model.genai.GenerationConfig(max_new_tokens=ask.max_tokens or room)
        if ask.temperature:
            seed = random.getrandbits(31) if ask.seed is None else ask.seed
            config.do_sample, config.temperature, config.rng_seed = True, ask.temperature, seed
        for name, value in ask.extra.items():
            if name not in EXTRA:
                raise ValueError(f"OpenVINO has no {name!r}; known are {', '.join(EXTRA)}")
            setattr(config, name, value)
        return config

    def cancel(self, number: int) -> None:
        """Drop a request; nobody waits for its reply."""
        if job := self.jobs.pop(number, None):
            job.handle.cancel()

    def step(self) -> Iterator[tuple[int, Reply]]:
        """One step of the whole batch, and the requests that ended with it."""
        self.model.pipeline.step()
        now = time.perf_counter()
        before = [job.went_on for job in self.jobs.values()]
        for job in self.jobs.values():
            job.went_on = self._read(job, now)
        went_on = [job.went_on for job in self.jobs.values()]
        if went_on and all(went_on):  # nobody's prompt is being read, for the first time or again
            self._watch()
        if len(went_on) <= self.model.batched:  # a step has a token for each
            self.seen["preemptions"] += sum(a and not b for a, b in zip(before, went_on, strict=True))
        for number, job in list(self.jobs.items()):
            if (status := job.handle.get_status().name) != "RUNNING":
                del self.jobs[number]
                yield number, self._reply(job, status, now)

    def _read(self, job: Job, now: float) -> bool:
        before = len(job.ids)
        while job.handle.can_read():
            for output in job.handle.read().values():
                job.ids += output.generated_ids
                job.stamps += [now - job.start for t in output.generated_ids if t not in self.model.stops]
                job.finish = output.finish_reason.name.lower()
        return len(job.ids) > before

    def _reply(self, job: Job, status: str, now: float) -> Reply:
        reply = Reply("", tokens=len(job.ids), counted="tokenizer", prompt_tokens=job.prompt, finish=job.finish)
        reply.text = self.model.tokenizer.decode(job.ids, skip_special_tokens=True)
        reply.seconds, reply.ttft = now - job.start, (job.stamps or [0.0])[0]
        reply.gaps = [later - sooner for sooner, later in zip(job.stamps, job.stamps[1:], strict=False)]
        if status == "IGNORED":
            held = self.model.blocks * self.model.block
            reply.finish, reply.error = "", f"the KV cache of {held} tokens was full after {len(job.ids)} tokens"
        return reply

    def _watch(self) -> None:
        """Where eviction is on: how many tokens the cache held in this step, against those there were to hold."""
        if not self.model.facts["eviction"]:
            return
        there = sum(job.prompt + len(job.ids) - 1 for job in self.jobs.values())
        share = self.model.pipeline.get_metrics().cache_usage / 100
        held = round(share * self.model.blocks) * self.model.block
        if there - held > self.seen.get("evicted_tokens", 0):
            self.seen |= {"evicted_tokens": there - held, "proof": f"{held:,} tokens of {there:,}"}


def _waiting(asks: Any, idle: bool) -> Iterator[tuple[int, Ask | None, float]]:
    """What has been asked since; waits a second for it while there is nothing else to do."""
    try:
        while True:
            number, ask, start = json.loads(asks.get(timeout=1.0) if idle else asks.get_nowait())
            yield number, ask and Ask(**ask), start
            idle = False
    except queue.Empty:
        return


def _said(error: Exception) -> str:
    """What OpenVINO throws without the paths of its build machine."""
    lines = [line.strip() for line in str(error).splitlines() if not line.startswith("Exception from ")]
    return re.sub(r" at /\S+:\d+:?", ":", " ".join(filter(None, lines))) or type(error).__name__
