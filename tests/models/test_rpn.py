"""The choice of the highest scores."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdet.models.rpn import MULTI_BLOCK_TOPK, top_n


class OnCuda(Tensor):
    """A tensor of the CPU whose `is_cuda` is true."""

    is_cuda = True


def record_operators(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The name of each call of `sort` and `topk`, and whether it is stable."""
    calls = []

    def record(name: str, method: Any) -> None:
        def recorded(self: Tensor, *args: Any, **options: Any) -> Any:
            calls.append((name, options.get("stable", False)))
            return method(self, *args, **options)

        monkeypatch.setattr(Tensor, name, recorded)

    for name in ("sort", "topk"):
        record(name, getattr(Tensor, name))
    return calls


@pytest.mark.parametrize("kind", [Tensor, OnCuda], ids=["cpu", "cuda"])
@pytest.mark.parametrize(("count", "n"), [(0, 5), (1, 1), (7, 3), (7, 9), (1001, 1000)])
def test_the_highest_in_order(kind, count, n):
    scores = torch.randn(3, count).as_subclass(kind)
    values, index = top_n(scores, n)
    assert values.shape == index.shape == (3, min(n, count))
    for row, found, at in zip(scores.tolist(), values.tolist(), index.tolist(), strict=True):
        assert found == sorted(row, reverse=True)[:n]
        assert [row[i] for i in at] == found


def test_equal_scores_of_the_sort_keep_their_order():
    scores = torch.tensor([[1.0, 2.0, 1.0, 2.0, -math.inf, 2.0, -math.inf]]).as_subclass(OnCuda)
    _, index = top_n(scores, 6)
    assert index.tolist() == [[1, 3, 5, 0, 2, 4]]


@pytest.mark.parametrize(
    ("kind", "count", "expected"),
    [
        (OnCuda, MULTI_BLOCK_TOPK - 1, "sort"),
        (OnCuda, MULTI_BLOCK_TOPK, "topk"),
        (Tensor, MULTI_BLOCK_TOPK - 1, "topk"),
    ],
)
def test_the_faster_operator_of_each_device(monkeypatch, kind, count, expected):
    scores = torch.randn(1, count).as_subclass(kind)
    calls = record_operators(monkeypatch)
    top_n(scores, 100)
    assert set(calls) == {(expected, expected == "sort")}
