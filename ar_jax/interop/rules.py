"""Rules: which official arrays are which of our parameters. Each is a bijection, so weights come and go bit for bit.

`ar_jax.interop.transfer` applies them: `to_ours(rules, official, like)` and `to_official(rules, params, kept, dtypes)`.
A system's rules are a list, nested as it likes. They read like a table of the official names beside ours:

    rules = [
        linear("word_embed", "generator/token_embed"),
        stacked(depth, [split("blocks.{i}.attn.qkv.weight", [f"generator/layers/{n}/kernel" for n in ("query", "key", "value")])]),
        rows("embeddings.weight", {"generator/code/embedding": (0, 64), "generator/mask_token": (64, 65)}, length=67),
        prefixed("vae.", "tokenizer/", [conv("encoder.conv_in", "encoder/conv_in")]),
        unused("attn_bias_for_masking"),
    ]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Arrays = Sequence[np.ndarray]
Shapes = Sequence[tuple[int, ...]]
Kept = Sequence[np.ndarray | None]
Rules = Any  # a Rule, or an iterable of Rules: nested lists are one list


@dataclasses.dataclass(frozen=True)
class Rule:
    """A bijection between official arrays and our leaves, in numpy, by moving values only.

    Attributes:
      official: names of the official arrays.
      ours: names of our leaves, such as `generator/layers/mlp/up/kernel`.
      read: (the official arrays, the shapes of our leaves) to our leaves; views where possible.
      write: (our leaves, what `keep` gave or None each) to the official arrays: what shapes they must have, too.
      keep: the official arrays to what of each our leaves do not hold, or None where they hold it all.
      required: whether the official arrays must be there.
      copy_of: the official array that the only one of this rule repeats; "" where it is no copy.
    """

    official: tuple[str, ...]
    ours: tuple[str, ...]
    read: Callable[[Arrays, Shapes], Arrays]
    write: Callable[[Arrays, Kept], Arrays]
    keep: Callable[[Arrays], Kept] = lambda arrays: [None] * len(arrays)
    required: bool = True
    copy_of: str = ""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of one array, there and here.

    Attributes:
      read: an official array to ours.
      write: ours to the official one.
    """

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


PLAIN = Layout(lambda x: x, lambda x: x)
MATRIX = Layout(np.transpose, np.transpose)  # [out, in] <-> [in, out]; a vector stays
CONV = Layout(lambda x: np.moveaxis(x, (0, 1), (-1, -2)), lambda x: np.moveaxis(x, (-1, -2), (0, 1)))  # OIHW <-> HWIO
POINTWISE = Layout(  # a convolution of 1 x 1 <-> a matrix; a vector stays
    lambda x: x[:, :, 0, 0].T if x.ndim == 4 else x, lambda x: x.T[:, :, None, None] if x.ndim == 2 else x
)


def sections(order: Sequence[int]) -> Layout:
    """[sections out, in] <-> [in, sections out], where our section k is the official section order[k]; vectors likewise."""

    def moved(x: np.ndarray, places: np.ndarray) -> np.ndarray:
        return x.reshape(len(order), -1, *x.shape[1:])[places].reshape(x.shape)

    return Layout(lambda x: moved(x, np.asarray(order)).T, lambda x: moved(x.T, np.argsort(order)))


def flattened(layout: Layout) -> Layout:
    """A layout of vectors, whatever axes the official ones have."""
    return Layout(lambda x: layout.read(x.reshape(-1)), layout.write)


def flatten(rules: Rules) -> list[Rule]:
    """Nested lists of rules as one list."""
    return [rules] if isinstance(rules, Rule) else [flat for rule in rules for flat in flatten(rule)]


def same(official: str, ours: str, shape: Sequence[int] | None = None, layout: Layout = PLAIN) -> Rule:
    """One array is one leaf.

    Args:
      official: its whole name.
      ours: our leaf's whole name.
      shape: the official one where it differs from ours, such as (1, 1, -1) for a token that is [D] here.
      layout: the axes, before that reshape.
    """

    def write(leaf: np.ndarray) -> np.ndarray:
        return layout.write(leaf) if shape is None else layout.write(leaf).reshape(shape)

    return Rule(
        (official,),
        (ours,),
        lambda arrays, shapes: [layout.read(arrays[0]).reshape(shapes[0])],
        lambda leaves, kept: [write(leaves[0])],
    )


def _module(official: str, ours: str, names: Mapping[str, str], layout: Layout = PLAIN) -> list[Rule]:
    return [same(f"{official}.{there}", f"{ours}/{here}", layout=layout) for there, here in names.items()]


def _names(weight: str, bias: bool) -> dict[str, str]:
    return {"weight": weight} | ({"bias": "bias"} if bias else {})


def linear(official: str, ours: str, bias: bool = True, layout: Layout = MATRIX) -> list[Rule]:
    """A linear layer: `x.weight` [out, in], `x.bias` are our `kernel` [in, out], `bias`; POINTWISE reads a 1 x 1 convolution."""
    return _module(official, ours, _names("kernel", bias), layout)


def conv(official: str, ours: str, bias: bool = True) -> list[Rule]:
    """A convolution over any number of axes: OIHW <-> HWIO."""
    kernel = same(f"{official}.weight", f"{ours}/kernel", layout=CONV)
    return [kernel, *_module(official, ours, {"bias": "bias"} if bias else {})]


def norm(official: str, ours: str, bias: bool = True) -> list[Rule]:
    """A norm: `weight`, `bias` are our `scale`, `bias`."""
    return _module(official, ours, _names("scale", bias))


def embedding(official: str, ours: str) -> list[Rule]:
    """A table: `weight` is our `embedding`."""
    return _module(official, ours, {"weight": "embedding"})


def split(official: str, ours: Sequence[str], axis: int = 0, layout: Layout = MATRIX) -> Rule:
    """One packed array is several leaves, such as queries, keys and values; the sections may be unequal.

    Args:
      official: the packed array's whole name: a weight [3 D, D], or a bias [3 D].
      ours: whole names of our leaves, in the order of the sections.
      axis: along which the official array is packed.
      layout: the axes of each section.
    """

    def read(arrays: Arrays, shapes: Shapes) -> Arrays:
        ends = np.cumsum([layout.write(_blank(shape)).shape[axis] for shape in shapes])[:-1]
        return [layout.read(section) for section in np.split(arrays[0], ends, axis)]

    def write(leaves: Arrays, kept: Kept) -> Arrays:
        return [np.concatenate([layout.write(leaf) for leaf in leaves], axis)]

    return Rule((official,), tuple(ours), read, write)


def packed_linear(official: str, ours: Sequence[str], bias: bool = True, layout: Layout = MATRIX) -> list[Rule]:
    """Several linear layers in one, packed along their outputs; `ours` are our layers."""
    names = _names("kernel", bias).items()
    return [split(f"{official}.{there}", [f"{o}/{here}" for o in ours], layout=layout) for there, here in names]


def join(official: Mapping[str, int], ours: str, lead: int = 0, layout: Layout = PLAIN) -> Rule:
    """Several arrays, one below the other, are one leaf [rows, D].

    Args:
      official: how many rows of the leaf each is, by its whole name.
      ours: our leaf's whole name.
      lead: axes of size 1 in front of the official rows.
      layout: the axes of each official array; MATRIX where its columns are our rows.
    """
    ends = np.cumsum(list(official.values()))[:-1]
    return Rule(
        tuple(official),
        (ours,),
        lambda arrays, shapes: [np.concatenate([layout.read(a) for a in arrays], axis=lead).reshape(shapes[0])],
        lambda leaves, kept: [layout.write(part)[(None,) * lead] for part in np.split(leaves[0], ends)],
    )


def rows(official: str, ours: Mapping[str, tuple[int, int]], length: int | None = None, lead: int = 0) -> Rule:
    """One table [length, D] whose ranges of rows are several leaves; rows that are in no range are kept for the export.

    Args:
      official: the table's whole name.
      ours: (first row, row after the last) by our leaf; one row may be a leaf [D].
      length: rows of the table; None takes the end of the last range.
      lead: axes of size 1 in front of the official rows.
    """
    first = (0,) * lead
    length = max(stop for _, stop in ours.values()) if length is None else length
    free = sorted(set(range(length)).difference(*(range(*span) for span in ours.values())))

    def read(arrays: Arrays, shapes: Shapes) -> Arrays:
        spans = zip(ours.values(), shapes, strict=True)
        return [arrays[0][first][slice(*span)].reshape(shape) for span, shape in spans]

    def write(leaves: Arrays, kept: Kept) -> Arrays:
        sections = [leaf.reshape(stop - start, -1) for leaf, (start, stop) in zip(leaves, ours.values(), strict=True)]
        table = np.empty((length, sections[0].shape[1]), sections[0].dtype)
        for section, span in zip(sections, ours.values(), strict=True):
            table[slice(*span)] = section
        if free:
            table[free] = 0 if kept[0] is None else kept[0]
        return [table[(None,) * lead]]

    return Rule((official,), tuple(ours), read, write, lambda arrays: [arrays[0][first][free] if free else None])


def unused(*official: str, required: bool = True) -> list[Rule]:
    """Arrays that carry nothing for us, such as masks and counters. They are kept, so that an export has them again.

    Args:
      *official: their whole names.
      required: False where only some official files have them.
    """
    nothing: dict[str, Any] = {"read": lambda arrays, shapes: [], "write": lambda leaves, kept: kept}
    return [Rule((key,), (), **nothing, keep=lambda arrays: arrays, required=required) for key in official]


def copied(official: str, of: str) -> Rule:
    """An array that repeats another, as tied weights do in some official files; an export repeats it, where it was there."""
    nothing: dict[str, Any] = {"read": lambda arrays, shapes: [], "write": lambda leaves, kept: kept}
    mark = lambda arrays: [np.zeros(0, np.float32)]  # that it was there  # noqa: E731
    return Rule((official,), (), **nothing, keep=mark, required=False, copy_of=of)


def prefixed(official: str, ours: str, rules: Rules) -> list[Rule]:
    """The rules with `official` in front of all official names and `ours` in front of ours, such as "vae." and "tokenizer/"."""
    return [_rename(rule, lambda name: official + name, lambda name: ours + name) for rule in flatten(rules)]


def each(layers: int | Iterable[int], rules: Rules) -> list[Rule]:
    """The rules once per layer, with its number for `{i}` in official names and in ours: modules that stand side by side."""
    return [
        _rename(rule, number, number) for i in _numbers(layers) for number in [_numbered(i)] for rule in flatten(rules)
    ]


def stacked(layers: int | Iterable[int], rules: Rules) -> list[Rule]:
    """The rules of one layer for layers that are stacked here: a leading axis [num_layers, ...] of our leaves.

    Args:
      layers: how many, or the official numbers in our order.
      rules: with `{i}` for the number in official names.
    """
    numbers, flat = _numbers(layers), flatten(rules)
    alone = each(numbers, [rule for rule in flat if not rule.ours])
    return [*alone, *(_stack(rule, numbers) for rule in flat if rule.ours)]


def _stack(rule: Rule, numbers: Sequence[int]) -> Rule:
    """One rule for all layers; the official arrays come layer by layer."""
    width = len(rule.official)

    def by_layer(arrays: Sequence[Any]) -> list[Sequence[Any]]:
        return [arrays[width * layer : width * (layer + 1)] for layer in range(len(numbers))]

    def read(arrays: Arrays, shapes: Shapes) -> Arrays:
        layers = [rule.read(layer, [shape[1:] for shape in shapes]) for layer in by_layer(arrays)]
        return [np.stack(leaves) for leaves in zip(*layers, strict=True)]

    def write(leaves: Arrays, kept: Kept) -> Arrays:
        parts = enumerate(by_layer(kept))
        return [array for layer, part in parts for array in rule.write([leaf[layer] for leaf in leaves], part)]

    def keep(arrays: Arrays) -> Kept:
        return [part for layer in by_layer(arrays) for part in rule.keep(layer)]

    official = tuple(_numbered(i)(name) for i in numbers for name in rule.official)
    return Rule(official, rule.ours, read, write, keep, rule.required)


def _numbers(layers: int | Iterable[int]) -> list[int]:
    return list(range(layers) if isinstance(layers, int) else layers)


def _numbered(i: int) -> Callable[[str], str]:
    return lambda name: name.replace("{i}", str(i))


def _rename(rule: Rule, official: Callable[[str], str], ours: Callable[[str], str]) -> Rule:
    copy_of = official(rule.copy_of) if rule.copy_of else ""
    there, here = tuple(map(official, rule.official)), tuple(map(ours, rule.ours))
    return dataclasses.replace(rule, official=there, ours=here, copy_of=copy_of)


def _blank(shape: tuple[int, ...]) -> np.ndarray:
    """An array of a shape that takes no memory."""
    return np.broadcast_to(np.False_, shape)
