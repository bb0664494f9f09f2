"""Clicks that a recommender can learn and nobody has to download: users and items with hidden tastes, a few of them met often."""

import math
from functools import cache

import torch
from torch import Tensor

USERS, ITEMS = 8192, 2048
_TASTES = 4


@cache
def _hidden() -> tuple[Tensor, Tensor, Tensor]:
    """The tastes of users, those of items, float32 [count, 4], and how much an item is liked by everybody, float32 [items]."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(USERS, _TASTES, generator=g), torch.randn(ITEMS, _TASTES, generator=g), torch.randn(ITEMS, generator=g)


def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(users int64 [size], items int64 [size], clicked float32 [size]). The i-th is met with a probability that falls like i^(-2/3);
    a click has the probability sigmoid(2 tastes . tastes / sqrt 4 + liking - 1)."""
    users, items = ((count * torch.rand(size, generator=generator) ** 3).long() for count in (USERS, ITEMS))
    of_users, of_items, liking = _hidden()
    odds = 2 / math.sqrt(_TASTES) * (of_users[users] * of_items[items]).sum(1) + liking[items] - 1
    return users, items, torch.bernoulli(torch.sigmoid(odds), generator=generator)
