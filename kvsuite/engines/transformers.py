"""The engine that answers with a transformers model in this process."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from kvsuite.cache import adapter
from kvsuite.cache.extra_pass import ExtraPassCache, repetitions
from kvsuite.cache.observations import ExtraPass, Observation
from kvsuite.cache.prefill import PrefillCache
from kvsuite.engines import ranks
from kvsuite.engines.packing import pack
from kvsuite.engines.pool import DecoderPool
from kvsuite.engines.precision import compute_dtype
from kvsuite.engines.pretrained import load_model
from kvsuite.engines.random_model import random_model
from kvsuite.engines.request import Request, Response
from kvsuite.engines.sampling import GREEDY, Sampling
from kvsuite.engines.worker import MethodWorker, Prompt, say
from kvsuite.errors import UsageError
from kvsuite.methods import Codec, Method
from kvsuite.methods.artifact import Artifact
from kvsuite.modes import PAGED
from kvsuite.shapes import shaped

Compress = Literal["prompt", "context"]


class TransformersEngine:
    """One model, any number of methods: a prompt is prefilled once and each method answers it from its own cache."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        kv_dtype: torch.dtype | None = None,
        reason: str = "the model's",
        backend: str = "auto",
    ) -> None:
        """A loaded causal language model and its tokenizer (None where only token ids are decoded). ``kv_dtype``: what
        uncompressed K and V are stored in, the model's dtype unless given; ``reason``: why it computes in its dtype;
        ``backend``: who computes on the caches."""
        adapter.install(model)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.layers = adapter.contexts(model, kv_dtype)
        self.reason, self.backend = reason, backend
        self.artifacts: dict[Codec, Artifact] = {}
        """What codecs have learned of this model."""
        ends = model.generation_config.eos_token_id
        self.stop = frozenset([ends] if isinstance(ends, int) else ends or ())

    @classmethod
    def load(cls, folder: Path, dtype: str = "auto", device: str = "cpu", backend: str = "auto") -> TransformersEngine:
        """From a folder in Hugging Face's layout. ``dtype``: what it computes in: auto (what this machine is fastest
        in), bfloat16 or float32. Uncompressed K and V are stored in the checkpoint's own dtype."""
        model = load_model(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return cls._computing(model.to(device), tokenizer, dtype, backend)

    @classmethod
    def shaped(cls, model: Path, dtype: str = "auto", device: str = "cpu", backend: str = "auto") -> TransformersEngine:
        """A shape with random weights, which decodes token ids: ``shape:llama-3.1-8b:layers=2``. The rest as for
        `load`. Raises UsageError for no shape."""
        return cls._computing(random_model(shaped(model), device), None, dtype, backend)

    @classmethod
    def _computing(cls, model: Any, tokenizer: Any, dtype: str, backend: str) -> TransformersEngine:
        kv_dtype, (compute, reason) = model.dtype, ranks.first(compute_dtype(model, dtype))
        model = model.to(compute)
        ranks.watch(model)
        if model.device.type == "cpu" and ranks.size() == 1:
            reason += f"; {pack(model)}"
        return cls(model, tokenizer, kv_dtype, reason, backend)

    def worker(
        self,
        method: Method,
        rows: int,
        lengths: Iterable[tuple[int, int]],
        sampling: Sampling = GREEDY,
        name: str = "",
        backend: str = "",
    ) -> MethodWorker:
        """A method's caches for ``rows`` sequences of these lengths; see `MethodWorker`. ``backend``: the
        engine's unless given. Raises UsageError where its codec has yet to learn something of the model."""
        if _learns(method) and method.codec not in self.artifacts:
            raise UsageError(f"{method.name} must be calibrated before it is used")
        method.check_layers(self.layers)
        method.check_model(self.layers)
        return MethodWorker(
            method, self.layers, rows, lengths,
            sampling=sampling, name=name, backend=backend or self.backend, artifact=self.artifacts.get(method.codec),
        )  # fmt: skip

    def calibrate(self, methods: Iterable[Method], text: Callable[[], list[int]]) -> None:
        """Let the codecs that must learn something of this model learn it, from one prefilled text: token ids, asked
        for only where there is such a codec."""
        learning = {method.codec for method in methods if _learns(method)}
        if learning:
            context = self.prefill(Request("calibration", "", "", 1), text(), []).context
            found = {codec: codec.calibrate(context) for codec in learning}
            self.artifacts |= {codec: artifact for codec, artifact in found.items() if artifact is not None}

    def encode(self, request: Request, compress: Compress) -> tuple[list[int], list[int]]:
        """Context and suffix as token ids. The prompt is tokenized as a whole, so both ways of compressing answer the
        same tokens; with ``compress="context"`` it is split before the first token of the question. Raises UsageError
        where the tokenizer or the template does not tell where that is."""
        text, plain = self._templated(request)
        if text is None:
            encoded = self.tokenizer.apply_chat_template(_messages(request), tokenize=True, return_dict=True)
        else:
            encoded = self.tokenizer(text, add_special_tokens=plain)
        ids = list(encoded["input_ids"])
        if text is None and request.opening:
            ids += self.tokenizer(request.opening, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UsageError(f"sample {request.id} has an empty prompt")
        if compress == "prompt" or not request.question:
            return ids, []
        offsets, start = self._offsets(text or "", plain), _place(request, text or "")
        cut = next((i for i, (first, last) in enumerate(offsets) if last > start and last > first), len(ids))
        if cut == 0:
            raise UsageError(f"sample {request.id} has no context before its question; use --kv-compress prompt")
        return ids[:cut], ids[cut:]

    def _templated(self, request: Request) -> tuple[str | None, bool]:
        """The whole prompt as text, and whether it is plain, without a chat template. None where the tokenizer's text
        holds control tokens that it does not read back."""
        if "MistralCommon" in type(self.tokenizer).__name__ and not request.plain:
            return None, False
        messages = _messages(request)
        if not request.plain and getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            return text + request.opening, False
        if request.before:
            raise UsageError(f"sample {request.id} has several messages, but the model has no chat template")
        return messages[-1]["content"] + request.opening, True

    def tokens_of(self, request: Request, passage: str) -> list[int]:
        """The places in a prompt of the tokens that hold a passage of it; none where it cannot be found, or where the
        tokenizer does not tell where its tokens stand."""
        text, plain = self._templated(request)
        start = -1 if text is None or not passage else text.find(passage)
        if text is None or start < 0:
            return []
        try:
            offsets = self._offsets(text, plain)
        except UsageError:
            return []
        end = start + len(passage)
        return [at for at, (first, last) in enumerate(offsets) if first < end and last > start and last > first]

    def _offsets(self, text: str, plain: bool) -> list[tuple[int, int]]:
        """Where each token of a text begins and ends."""
        try:
            return list(self.tokenizer(text, add_special_tokens=plain, return_offsets_mapping=True)["offset_mapping"])
        except (KeyError, NotImplementedError, TypeError, ValueError) as error:
            kind = type(self.tokenizer).__name__
            raise UsageError(
                f"{kind} does not tell where its tokens stand in the text, which --kv-compress context needs; "
                "use --kv-compress prompt"
            ) from error

    @torch.inference_mode()
    def prefill(
        self,
        request: Request,
        context: list[int],
        suffix: list[int],
        observes: Iterable[Observation] = (),
        mode: str = PAGED,
    ) -> Prompt:
        """Run the context through the model once, in full precision, and keep what the methods asked for. ``mode``: see
        `PrefillCache`."""
        cache = PrefillCache(self.layers, observes, self.backend, mode)
        start = time.perf_counter()
        ids = torch.tensor([context], device=self.model.device)
        logits = adapter.forward(self.model, cache, ids)[0]
        if logits.is_cuda:
            torch.cuda.synchronize()
        for observation in cache.asked:
            if isinstance(observation, ExtraPass):
                self._feed_again(cache, observation, context)
        seconds = time.perf_counter() - start
        return Prompt(request, cache.prefilled, suffix, logits, seconds, cache.seconds)

    def _feed_again(self, cache: PrefillCache, what: ExtraPass, context: list[int]) -> None:
        """Run the context through the model once more, chunk by chunk, after the prefilled context. Where there is no
        tokenizer, as for a shape, nothing is said before a chunk."""
        start = time.perf_counter()
        again = ExtraPassCache(cache.prefilled, what)
        for chunk, fed in repetitions(context, what.chunk, self._tokens, self._turn()):
            again.repeats(chunk)
            where = torch.arange(len(context), len(context) + len(fed), device=self.model.device)[None]
            adapter.forward(self.model, again, torch.tensor([fed], device=self.model.device), position_ids=where)
        values = [layer.most for layer in again.layers]
        if values[0].is_cuda:
            torch.cuda.synchronize()
        cache.add(what, values, time.perf_counter() - start)

    def _tokens(self, text: str) -> list[int]:
        return [] if self.tokenizer is None else list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _turn(self) -> str:
        """What the chat template has between a user's words and the answer; a line feed where there is none."""
        mark = "XYZZY"
        text, plain = (None, True) if self.tokenizer is None else self._templated(Request("", mark, "", 1))
        return "\n" if text is None or plain else text.rpartition(mark)[2]

    @torch.inference_mode()
    def generate(
        self,
        requests: Iterable[Request],
        methods: Sequence[Method],
        *,
        width: int = 8,
        compress: Compress = "prompt",
        sampling: Sampling = GREEDY,
        again: Mapping[str, Sampling] | None = None,
        timeout: float = math.inf,
        memory: float = math.inf,
        done: Mapping[tuple[str, str], float] | None = None,
    ) -> Iterator[Response]:
        """Every method's answer to every request, as they end. A method that fails costs its own answers only; so does
        one that takes ``timeout`` seconds more than 10 times what the first method, the baseline, has taken.

        Each prompt is prefilled once; then every method takes it into one of its ``width`` rows. On a CPU all methods
        are decoded together, in steps of 8 × ``width`` rows whatever the methods are; on a GPU each by itself. No more
        sequences are held than have rows, nor more than ``memory`` bytes are reserved for. ``done``: (request's id,
        method's name) → seconds of answers that are there: they are not made again, and count for timeouts. ``again``:
        name → how the baseline's tokens are drawn when it answers once more, as another arm of that name.
        """
        asked = [(request, *self._packed(request, compress)) for request in requests]
        if not asked:
            return
        self._refuse_long(asked, methods)
        done = done or {}
        pool = DecoderPool(self, methods, asked, width, sampling, again or {}, timeout, memory, done)
        for request, context, suffix in asked:
            missing = [name for name in pool.arms if (request.id, name) not in done]
            if not missing:
                continue
            observes = [observation for name in missing for observation in pool.arms[name][0].observes]
            try:
                prompt = self.prefill(request, context.tolist(), suffix.tolist(), observes)
            except Exception as error:  # a prompt too large for this machine costs its own answers
                for name in missing:
                    yield pool.lost(name, request, say(error))
                continue
            for response in pool.take(prompt, missing):
                yield self._finished(response)
        for response in pool.drain():
            yield self._finished(response)

    def _packed(self, request: Request, compress: Compress) -> tuple[array[int], array[int]]:
        """`encode` in 4 bytes a token, a ninth of a list's: those of a whole task's prompts are held at once."""
        context, suffix = self.encode(request, compress)
        return array("i", context), array("i", suffix)

    def _finished(self, response: Response) -> Response:
        if self.tokenizer is not None:
            response.text = self.tokenizer.decode(response.tokens, skip_special_tokens=True).strip()
        return response

    def _refuse_long(
        self, asked: Sequence[tuple[Request, Sequence[int], Sequence[int]]], methods: Sequence[Method]
    ) -> None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        again = [(o.chunk, method.name) for method in methods for o in method.observes if isinstance(o, ExtraPass)]
        for request, context, suffix in asked:
            needs = [(len(suffix) + request.max_new_tokens, "")]
            needs += [(min(chunk, len(context)), f" for {name}, which repeats the context") for chunk, name in again]
            most, why = max(needs)
            if limit and len(context) + most > limit:
                total = len(context) + most
                raise UsageError(f"sample {request.id} needs {total} tokens{why}, the model's context has {limit}")


def _messages(request: Request) -> list[dict[str, str]]:
    said = [*request.before, ("user", request.context + request.question)]
    return [{"role": role, "content": text} for role, text in said]


def _learns(method: Method) -> bool:
    return type(method.codec).calibrate is not Codec.calibrate


def _place(request: Request, text: str) -> int:
    """Where the question begins in the templated text, also where the template has trimmed it."""
    for question in (request.question, request.question.rstrip(), request.question.strip()):
        if question and (at := text.rfind(question)) >= 0:
            return at
    raise UsageError(
        f"the chat template changes the question of sample {request.id}, so that its place in the prompt is not known; "
        "use --kv-compress prompt"
    )
