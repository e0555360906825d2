"""In which order PyTorch's topk gives equal numbers on CPUs: that of the C++ library's nth_element and sort."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Entry = tuple[float, int]
_FEW = 16  # so few are sorted by insertion


def torch_top_k(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest scores [..., S], the largest first, [..., count]."""
    rows = scores.reshape(-1, scores.shape[-1])
    return np.stack([_top_k(row, count) for row in rows]).reshape(*scores.shape[:-1], count)


def _top_k(row: np.ndarray, count: int) -> np.ndarray:
    if count * 64 <= len(row):  # a heap: equal numbers so far from one another that their order is not modelled
        return np.argsort(-row, kind="stable")[:count]
    entries = [(float(value), index) for index, value in enumerate(row)]
    _nth_element(entries, count - 1)
    head = entries[: count - 1]
    _sort(head)
    return np.asarray([index for _, index in (*head, entries[count - 1])])


def _before(a: Entry, b: Entry) -> bool:
    return a[0] > b[0]


def _nth_element(a: list[Entry], nth: int) -> None:
    first, last = 0, len(a)
    while last - first > 3:
        cut = _partition(a, first, last)
        first, last = (cut, last) if cut <= nth else (first, cut)
    _insertion_sort(a, first, last)


def _sort(a: list[Entry]) -> None:
    pending = [(0, len(a))]
    while pending:
        first, last = pending.pop()
        while last - first > _FEW:
            cut = _partition(a, first, last)
            pending.append((cut, last))
            last = cut
    _insertion_sort(a, 0, len(a))


def _partition(a: list[Entry], first: int, last: int) -> int:
    """Around the median of the second, the middle and the last entry."""
    triple: Sequence[int] = (first + 1, first + (last - first) // 2, last - 1)
    x, y, z = triple
    if _before(a[x], a[y]):
        median = y if _before(a[y], a[z]) else z if _before(a[x], a[z]) else x
    else:
        median = x if _before(a[x], a[z]) else z if _before(a[y], a[z]) else y
    a[first], a[median] = a[median], a[first]
    low, high = first + 1, last
    while True:
        while _before(a[low], a[first]):
            low += 1
        high -= 1
        while _before(a[first], a[high]):
            high -= 1
        if low >= high:
            return low
        a[low], a[high] = a[high], a[low]
        low += 1


def _insertion_sort(a: list[Entry], first: int, last: int) -> None:
    """Stable."""
    a[first:last] = sorted(a[first:last], key=lambda entry: -entry[0])
