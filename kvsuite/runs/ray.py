"""Answers made by Ray's workers, on one machine or many: a sample is a task, for all arms that miss it at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvsuite.engines.request import Response
from kvsuite.errors import UsageError
from kvsuite.records import Answer, Job
from kvsuite.runs.here import Here, record
from kvsuite.runs.setting import Setting
from kvsuite.tasks import Sample, Task

RETRIES = 3
"""How often a sample is tried again whose worker died."""


class Worker:
    """One model, on one GPU or so many threads. Ray restarts it where it dies."""

    def __init__(self, setting: Setting, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.here = Here(setting)

    def facts(self) -> dict[str, Any]:
        """See `Executor.facts`."""
        return self.here.facts()

    def answers(self, task: Task, sample: Sample, jobs: Collection[Job]) -> list[Answer]:
        """All of a sample's missing answers."""
        return list(self.here.answers(task, [sample], jobs, {}))


class OnRay:
    """As many workers as the cluster has room for. The model's folder must be at the same place on every machine."""

    def __init__(self, setting: Setting, address: str) -> None:
        """``address`` of a cluster; empty starts one on this machine. Raises UsageError where there is none."""
        try:
            import ray
        except ImportError as error:
            raise UsageError("--kv-executor ray needs Ray: pip install 'kvsuite[ray]'") from error
        import torch

        self.ray, threads = ray, torch.get_num_threads()
        try:
            ray.init(address or None, include_dashboard=False if not address else None, log_to_driver=False,
                     logging_level="ERROR", ignore_reinit_error=True)  # fmt: skip
        except Exception as error:
            raise UsageError(f"--kv-ray-address {address!r}: {type(error).__name__}: {error}") from error
        kind, each = ("GPU", 1) if setting.device == "cuda" else ("CPU", threads)
        count = int(ray.cluster_resources().get(kind, 0)) // each
        if not count:
            raise UsageError(f"--kv-executor ray: the cluster has no {kind} to spare ({each} a worker)")
        room = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": each}
        make = ray.remote(max_restarts=-1, max_task_retries=RETRIES, **room)(Worker)
        first = make.remote(setting, threads)
        try:
            self._facts: dict[str, Any] = ray.get(first.facts.remote())
        except ray.exceptions.RayError as error:
            raise UsageError(f"the model cannot be loaded: {str(error).strip().splitlines()[-1]}") from error
        alike = replace(setting, dtype=self._facts["compute_dtype"])  # which `auto` may choose differently elsewhere
        self.workers = [first, *(make.remote(alike, threads) for _ in range(count - 1))]

    def facts(self) -> dict[str, Any]:
        """See `Executor.facts`; of the first worker."""
        return self._facts | {"executor": f"ray, {len(self.workers)} workers"}

    def answers(
        self, task: Task, samples: Sequence[Sample], jobs: Collection[Job], before: Mapping[Job, float]
    ) -> Iterator[Answer]:
        """See `Executor.answers`. A timeout counts for each sample by itself."""
        missing: dict[str, set[Job]] = {}
        for job in jobs:
            missing.setdefault(job.item, set()).add(job)
        waiting = [(s, missing[s.id]) for s in samples if s.id in missing]
        free, running = list(self.workers), dict[Any, tuple[Any, Sample, set[Job]]]()
        while waiting or running:
            while free and waiting:
                worker, (sample, own) = free.pop(), waiting.pop(0)
                running[worker.answers.remote(task, sample, own)] = worker, sample, own
            [ended], _ = self.ray.wait(list(running), num_returns=1)
            worker, sample, own = running.pop(ended)
            free.append(worker)
            try:
                yield from self.ray.get(ended)
            except self.ray.exceptions.RayError as error:
                why = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                for job in sorted(own):
                    lost = Response(sample.id, job.arm, finish="error", error=why, repeat=job.repeat)
                    yield record(task, sample, lost, sample.max_new_tokens)
