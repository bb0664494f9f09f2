"""Ranks that were set up differently find out before they exchange anything that the others would misread."""

import os
import socket
from typing import Any

import torch.distributed as dist


def agree(group: dist.ProcessGroup, facts: dict[str, Any]) -> None:
    """Returns when all ranks of the group came with the same facts; else raises the same RuntimeError on all of them."""
    everyone: list[dict] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(everyone, facts, group=group)
    if all(other == everyone[0] for other in everyone):
        return
    lines = []
    for key in dict.fromkeys(k for f in everyone for k in f):
        said: dict[str, list[int]] = {}
        for rank, other in enumerate(everyone):
            said.setdefault(_text(other.get(key, "-"), everyone[0].get(key, "-")), []).append(rank)
        if len(said) > 1:
            lines.append(f"  {key}: " + "; ".join(f"rank {_ranks(ranks)}: {text}" for text, ranks in said.items()))
    raise RuntimeError(
        "commopt: the ranks do not agree, so their messages would be misread. Give all of them the same:\n" + "\n".join(lines)
    )


def nodes(group: dist.ProcessGroup) -> tuple[tuple[int, ...], ...]:
    """The ranks of the group on each machine. A launcher that numbers the ranks of a machine (torchrun: LOCAL_RANK and
    LOCAL_WORLD_SIZE) says which belong together; else those with one host name do."""
    if "LOCAL_RANK" in os.environ and "LOCAL_WORLD_SIZE" in os.environ:
        mine: Any = dist.get_rank() - int(os.environ["LOCAL_RANK"])  # the first rank of the machine
    else:
        mine = socket.gethostname()
    places: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(places, mine, group=group)
    return tuple(tuple(r for r, place in enumerate(places) if place == one) for one in dict.fromkeys(places))


def _ranks(ranks: list[int]) -> str:
    return ",".join(map(str, ranks))


def _text(value: Any, first: Any) -> str:
    """A value as it is; of a long list only where it first leaves rank 0's."""
    if not isinstance(value, list) or len(value) < 4:
        return str(value)
    at = next((i for i, (a, b) in enumerate(zip(value, first)) if a != b), None)
    at = min(len(value), len(first)) if at is None and len(value) != len(first) else at
    here = "as rank 0" if at is None else f"entry {at} is {value[at]}" if at < len(value) else "ends there"
    return f"{len(value)} entries, {here}"
