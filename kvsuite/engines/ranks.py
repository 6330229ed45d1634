"""Processes that torchrun started, called ranks, which share one model: tensor parallelism. What ends a cell or a run
on one rank ends it on all, since a rank that went on alone would wait for the others in its next pass.

Without torchrun there is one rank, which agrees with itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from kvsuite.errors import UsageError, first_line

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
PATIENCE = 120
"""Seconds that a rank waits for the others where all arrive at about the same time."""
ADDED = ("nbytes", "nbytes_read", "allocated", "peak", "moved", "operations", "bandwidth", "rate")
"""What a timed cell has of all ranks together."""


class Elsewhere(RuntimeError):
    """Another rank has failed."""


class Lost(RuntimeError):
    """Another rank has ended, or does not answer, for this reason."""


def size() -> int:
    """Ranks of this run; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """This process among them. The first, 0, writes and prints for all."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def check(config: Any, name: str) -> None:
    """Raises UsageError where transformers cannot split a model of this configuration, or kv heads are not shared out
    evenly."""
    text = config.get_text_config()
    if not text.base_model_tp_plan:
        raise UsageError(f"transformers has no plan by which torchrun's processes share a {text.model_type!r} model")
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    for each in heads if isinstance(heads, list) else [heads]:
        if each % size():
            raise UsageError(
                f"{size()} processes cannot share the {each} kv heads of {name} evenly: "
                f"give torchrun a --nproc-per-node that divides {each}"
            )


def command() -> list[str]:
    """What starts such a run, before pytest's arguments."""
    if size() == 1:
        return ["pytest"]
    return ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "pytest"]


class _Group:
    """What ranks tell each other beside the model's own exchanges."""

    gloo: Any = None
    store: Any = None
    """Where a rank leaves why it failed: others may be in a pass, in which it no longer takes part."""
    failures = 0
    """That all have heard of."""
    ahead = False
    """Whether all ranks are known to begin the next pass."""


def join(device: str) -> None:
    """Meet the other ranks, on a GPU each with its own. Raises Lost where they do not come."""
    if size() == 1 or _Group.gloo is not None:
        return
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    own = None
    if device == "cuda":
        own = torch.device(device, int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
    try:
        _Group.store, at, count = next(rendezvous("env://"))
        distributed.init_process_group(
            "nccl" if own else "gloo", store=_Group.store, rank=at, world_size=count, device_id=own
        )
        _Group.gloo = distributed.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE))
    except RuntimeError as error:
        raise Lost(f"the other processes of torchrun do not come: {first_line(error)}") from error


def leave() -> None:
    """Part; the others wait until the first rank has written all it has to write, since torchrun ends those that are
    left soon after one has failed."""
    if _Group.gloo is not None:
        from torch import distributed

        if rank():
            with contextlib.suppress(RuntimeError):  # that it is gone
                distributed.barrier(_Group.gloo)
        distributed.destroy_process_group()
        _Group.gloo = None


def split() -> dict[str, Any]:
    """What transformers' ``from_pretrained`` is told to give each rank its part of a model."""
    if size() == 1:
        return {}
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=size())}


def watch(model: Any) -> None:
    """Let every pass through a model begin with `agree`."""
    if size() > 1:
        model.register_forward_pre_hook(_begin)


def _begin(*_: Any) -> None:
    if _Group.ahead:
        _Group.ahead = False
    else:
        agree()


def at_once(timed: Callable[[], T]) -> T:
    """What ``timed`` returns, begun by all ranks together: its pass does not begin with `agree`, whose time it would
    take."""
    agree()
    _Group.ahead = _Group.gloo is not None
    return timed()


def agree() -> None:
    """Wait for all ranks. Raises Elsewhere where one of them has failed, and Lost where one has ended."""
    if said := _exchange(""):
        raise Elsewhere(said)


def failed(error: Exception, said: str) -> tuple[str, bool]:
    """Tell the others that this rank has failed. Returns what all ranks say of it, ``said`` or what the first of those
    that failed says; and whether they have lost each other."""
    if isinstance(error, Elsewhere):
        return str(error), False
    try:
        if isinstance(error, Lost):
            raise error
        with contextlib.suppress(AttributeError, RuntimeError):  # there are no others; the store went with its rank
            _Group.store.compare_set(f"failed {_Group.failures}", "", _signed(said, rank()))
        return _exchange(said) or said, False
    except Lost as lost:
        _Group.gloo = None  # there is nobody to part from
        return str(lost), True


def _signed(said: str, at: int) -> str:
    return f"{said} (rank {at})" if at else said


def _left(error: Exception) -> str:
    """Why a rank does not answer: what it left, or else what was noticed here."""
    with contextlib.suppress(RuntimeError):
        if _Group.store.check([key := f"failed {_Group.failures}"]):
            return str(_Group.store.get(key).decode())
    return first_line(error)


def _exchange(said: str) -> str:
    """What the first of the ranks that have something to say says."""
    if _Group.gloo is None:
        return ""
    import torch
    from torch import distributed

    _Group.ahead, texts = False, [""] * size()
    try:
        found = torch.tensor([bool(said)], dtype=torch.int32)
        distributed.all_reduce(found, group=_Group.gloo)
        if found.item():
            distributed.all_gather_object(texts, said, group=_Group.gloo)
            _Group.failures += 1
    except RuntimeError as error:
        raise Lost(_left(error)) from error
    return next((_signed(text, at) for at, text in enumerate(texts) if text), "")


def gather(value: T) -> list[T]:
    """What every rank has, in their order, once none has failed."""
    agree()
    if _Group.gloo is None:
        return [value]
    from torch import distributed

    found = [value] * size()
    distributed.all_gather_object(found, value, group=_Group.gloo)
    return found


def first(value: T) -> T:
    """What the first rank has."""
    return gather(value)[0]


def together(found: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's facts: bytes, operations and speeds of all ranks added up, the check that came out worst."""
    ranks = gather(found)
    added = {key: sum(rank[key] for rank in ranks) for key in ADDED if found.get(key) is not None}
    worst = {"checked": max(rank["checked"] for rank in ranks)} if "checked" in found else {}
    return {**ranks[0], **added, **worst}


def slowest(timed: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """A cell's times, each that of the rank which took longest."""
    ranks = gather(timed)
    return {key: [max(times) for times in zip(*(rank[key] for rank in ranks), strict=True)] for key in timed}


def local(weight: Tensor) -> Tensor:
    """This rank's part of a weight."""
    return weight.to_local() if size() > 1 and hasattr(weight, "to_local") else weight
