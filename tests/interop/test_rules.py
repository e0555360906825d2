"""Each rule is a bijection, bit for bit, and refuses what does not fit."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.interop.rules import (
    POINTWISE,
    conv,
    copied,
    each,
    embedding,
    join,
    linear,
    norm,
    packed_linear,
    prefixed,
    rows,
    same,
    sections,
    split,
    stacked,
    unused,
)
from ar_jax.interop.transfer import misfits, to_official, to_ours

# Rules; official shapes by name; our shapes by name.
CASES = {
    "linear": (linear("x", "y"), {"x.weight": (3, 2), "x.bias": (3,)}, {"y/kernel": (2, 3), "y/bias": (3,)}),
    "pointwise": (
        linear("x", "y", layout=POINTWISE),
        {"x.weight": (3, 2, 1, 1), "x.bias": (3,)},
        {"y/kernel": (2, 3), "y/bias": (3,)},
    ),
    "sections": (linear("x", "y", bias=False, layout=sections((2, 0, 1))), {"x.weight": (6, 4)}, {"y/kernel": (4, 6)}),
    "conv": (conv("x", "y", bias=False), {"x.weight": (5, 4, 3, 2)}, {"y/kernel": (3, 2, 4, 5)}),
    "conv of one axis": (
        conv("x", "y"),
        {"x.weight": (5, 4, 3), "x.bias": (5,)},
        {"y/kernel": (3, 4, 5), "y/bias": (5,)},
    ),
    "norm": (norm("x", "y"), {"x.weight": (3,), "x.bias": (3,)}, {"y/scale": (3,), "y/bias": (3,)}),
    "embedding": (embedding("x", "y"), {"x.weight": (7, 2)}, {"y/embedding": (7, 2)}),
    "same": (same("x", "y", (1, 1, -1)), {"x": (1, 1, 4)}, {"y": (4,)}),
    "split unequally": (
        packed_linear("x", ["q", "k", "v"]),
        {"x.weight": (8, 3), "x.bias": (8,)},
        {f"{n}/{w}": s for n, d in (("q", 4), ("k", 2), ("v", 2)) for w, s in (("kernel", (3, d)), ("bias", (d,)))},
    ),
    "split the other way": (split("x", ["a", "b"], axis=1), {"x": (3, 5)}, {"a": (2, 3), "b": (3, 3)}),
    "join": (join({"x": 3, "z": 1}, "y"), {"x": (3, 2), "z": (1, 2)}, {"y": (4, 2)}),
    "rows": (rows("x", {"a": (4, 6), "b": (1, 2)}, length=8), {"x": (8, 3)}, {"a": (2, 3), "b": (3,)}),
    "rows behind an axis": (rows("x", {"a": (1, 3)}, length=4, lead=1), {"x": (1, 4, 2)}, {"a": (2, 2)}),
    "prefixed": (prefixed("v.", "t/", norm("x", "y", bias=False)), {"v.x.weight": (3,)}, {"t/y/scale": (3,)}),
    "each": (
        each(2, linear("b.{i}", "b_{i}", bias=False)),
        {"b.0.weight": (3, 2), "b.1.weight": (3, 2)},
        {"b_0/kernel": (2, 3), "b_1/kernel": (2, 3)},
    ),
    "stacked": (
        stacked(3, [packed_linear("b.{i}", ["q", "k"], bias=False), unused("m.{i}")]),
        {f"b.{i}.weight": (5, 3) for i in range(3)} | {f"m.{i}": (2,) for i in range(3)},
        {"q/kernel": (3, 3, 2), "k/kernel": (3, 3, 3)},
    ),
    "stacked, some layers": (stacked([4, 1], [same("b.{i}", "b")]), {"b.4": (2,), "b.1": (2,)}, {"b": (2, 2)}),
}


def draw(shapes, dtype=np.float32):
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def tree(shapes):
    nested: dict = {}
    for name, shape in shapes.items():
        *path, last = name.split("/")
        inner = nested
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = jax.ShapeDtypeStruct(shape, np.float32)
    return nested


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize(("rule", "theirs", "ours"), CASES.values(), ids=CASES)
def test_official_weights_come_and_go_bit_for_bit(rule, theirs, ours, dtype):
    official, like = draw(theirs, dtype), tree(ours)
    converted = to_ours(rule, official, like)
    jax.tree.map(
        lambda x, s: (x.shape, x.dtype) == (s.shape, s.dtype) or pytest.fail(f"{x.shape}"), converted.params, like
    )
    back = to_official(rule, converted.params, converted.kept, converted.dtypes)
    assert sorted(back) == sorted(official)
    for name in official:
        assert back[name].dtype == official[name].dtype and back[name].tobytes() == official[name].tobytes(), name
    assert sorted([*converted.used, *(k for k in converted.kept if k not in converted.used)]) == sorted(official)


@pytest.mark.parametrize(("rule", "theirs", "ours"), CASES.values(), ids=CASES)
def test_another_shape_is_told_with_both_shapes_and_names(rule, theirs, ours):
    key = next(iter(theirs))
    wrong = {**theirs, key: (*theirs[key][:-1], theirs[key][-1] + 1)}
    if len(theirs[key]) == 4:
        wrong[key] = (*theirs[key][:1], theirs[key][1] + 1, *theirs[key][2:])
    with pytest.raises(UsageError) as error:
        to_ours(rule, draw(wrong), tree(ours))
    assert f"{key!r} has shape {list(wrong[key])}" in str(error.value)
    assert f"needs {list(theirs[key])}" in str(error.value)
    assert any(f"{name} {list(shape)}" in str(error.value) for name, shape in ours.items())


def test_a_longer_table_is_refused_and_idle_rows_are_kept():
    rule, theirs, ours = CASES["rows"]
    assert to_ours(rule, draw(theirs), tree(ours)).kept["x"].shape == (5, 3)
    assert "[9, 3]" in misfits(rule, draw({"x": (9, 3)}), tree(ours))[0]


def test_stacking_keeps_the_order_of_the_layers():
    rule, theirs, ours = CASES["stacked, some layers"]
    official = draw(theirs)
    np.testing.assert_array_equal(to_ours(rule, official, tree(ours)).params["b"], [official["b.4"], official["b.1"]])


LINEAR = CASES["linear"]
BAD = {
    "missing": ({"x.bias": None}, r"'x.bias' is missing; it belongs to y/bias \[3\]"),
    "extra": ({"x.bia": (3,)}, r"'x.bia' \[3\] is unknown to this system. Did you mean 'x.bias'"),
    "another system": ({"x.bias": None, "x.weight": None, "z": (1,)}, r"'x.weight' \(and 1 more\) is missing"),
    "not a number": ({"x.bias": np.float32([1, np.nan, 2])}, "'x.bias' has values that are not finite"),
    "infinite": ({"x.bias": np.float32([1, np.inf, 2])}, "'x.bias' has values that are not finite"),
    "float64": ({"x.bias": np.zeros(3)}, r"'x.bias' has dtype float64, which y/bias \(float32\)"),
    "integers": ({"x.bias": np.zeros(3, np.int32)}, "'x.bias' has dtype int32"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_told_in_one_sentence(change, message):
    rule, theirs, ours = LINEAR
    official = draw(theirs)
    for name, value in change.items():
        official[name] = draw({name: value})[name] if isinstance(value, tuple) else value
    with pytest.raises(UsageError, match=message):
        to_ours(rule, {name: array for name, array in official.items() if array is not None}, tree(ours))


def test_rules_that_do_not_make_a_model_are_told():
    _, theirs, ours = LINEAR
    with pytest.raises(UsageError, match="Parameter z of this model comes from 0 official weights"):
        to_ours(LINEAR[0], draw(theirs), tree(ours | {"z": (2,)}))
    with pytest.raises(UsageError, match="have a place for y/bias, which is no parameter of this model"):
        to_ours(LINEAR[0], draw(theirs), tree({"y/kernel": (2, 3)}))


def test_what_is_unused_may_hold_anything_and_is_needed_for_an_export():
    rule = [*LINEAR[0], unused("mask"), unused("sometimes", required=False)]
    official = draw(LINEAR[1]) | {"mask": np.full(2, -np.inf, np.float64)}
    converted = to_ours(rule, official, tree(LINEAR[2]))
    assert to_official(rule, converted.params, converted.kept)["mask"].dtype == np.float64
    with pytest.raises(UsageError, match="'mask' is part of the official weights"):
        to_official(rule, converted.params)


def test_branches_without_parameters_stay():
    like = tree(LINEAR[2]) | {"tokenizer": {}}
    assert to_ours(LINEAR[0], draw(LINEAR[1]), like).params["tokenizer"] == {}


def test_a_copy_is_refused_where_it_is_none_and_exported_as_what_it_copies():
    rules = prefixed("v.", "", [embedding("x", "y"), copied("z.weight", of="x.weight")])
    like = tree({"y/embedding": (7, 2)})
    official = draw({"v.x.weight": (7, 2)})
    assert list(to_official(rules, to_ours(rules, official, like).params)) == ["v.x.weight"]  # many files have none
    with_copy = official | {"v.z.weight": official["v.x.weight"]}
    back = to_ours(rules, with_copy, like)
    exported = to_official(rules, {"y": {"embedding": np.float32([[3]])}}, back.kept, back.dtypes)
    np.testing.assert_array_equal(exported["v.z.weight"], exported["v.x.weight"])
    with pytest.raises(UsageError, match="'v.z.weight' must be a copy of 'v.x.weight'"):
        to_ours(rules, with_copy | {"v.z.weight": official["v.x.weight"] + 1}, like)
