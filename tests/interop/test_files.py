"""Weights are found wherever checkpoints keep them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from toy_official import write_torch, write_torch_weights

from ar_jax.config import UsageError
from ar_jax.interop.files import read_weights, write_safetensors

A, B = np.arange(3, dtype=np.float32), np.ones((2, 2), np.float32)
PLACES = {
    "at the top": (lambda tree: tree, None),
    "model": (lambda tree: {"model": tree, "epoch": 3}, None),
    "averaged first": (lambda tree: {"model": {}, "model_ema": tree, "args": None}, None),
    "module": (lambda tree: {"module": tree}, None),
    "nested": (lambda tree: {"epoch": 1, "trainer": {"vae_local": tree}}, None),
    "by key": (lambda tree: {"model": {}, "deep": {"inside": tree}}, "deep/inside"),
}


@pytest.mark.parametrize(("wrap", "key"), PLACES.values(), ids=PLACES)
def test_weights_are_found_in_training_checkpoints(wrap, key, tmp_path):
    file = write_torch_weights(tmp_path / "a.pt", {"x": A, "y": B}, wrap)
    found = read_weights(str(file), key)
    np.testing.assert_array_equal(found["x"], A)
    np.testing.assert_array_equal(found["y"], B)
    assert sorted(found) == ["x", "y"]


def test_wrappers_prefixes_are_taken_off(tmp_path):
    file = write_torch_weights(tmp_path / "a.pt", {"module._orig_mod.x": A, "module.y": B, "modules.z": A})
    assert sorted(read_weights(str(file))) == ["modules.z", "x", "y"]
    with pytest.raises(UsageError, match="'x' twice"):
        read_weights(str(write_torch_weights(tmp_path / "b.pt", {"module.x": A, "x": B})))


def test_safetensors_are_read_bit_for_bit_and_written_again(tmp_path):
    arrays = {"a": A, "b": B.astype(ml_dtypes.bfloat16), "c": np.array(True), "d": np.zeros((0, 2), np.int64), "t": B.T}
    write_safetensors(tmp_path / "a.safetensors", arrays)
    found = read_weights(str(tmp_path / "a.safetensors"))
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_several_files_are_one_table_with_a_key_for_each(tmp_path):
    one = write_torch_weights(tmp_path / "a.pt", {"x": A}, lambda tree: {"trainer": {"var_wo_ddp": tree}})
    safetensors.numpy.save_file({"y": B}, tmp_path / "b.safetensors")
    assert sorted(read_weights(f"{one},{tmp_path / 'b.safetensors'}")) == ["x", "y"]
    both = write_torch_weights(tmp_path / "c.pt", {"x": A}, lambda tree: {"a": tree, "b": {"y": tree["x"]}})
    assert sorted(read_weights(f"{both},{both}", "a,b")) == ["x", "y"]


def told(tmp_path):
    weights = str(write_torch_weights(tmp_path / "a.pt", {"x": A}, lambda tree: {"model": tree}))
    plain = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"y": B}, plain)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(plain.read_bytes()[:-1])
    numbers = str(write_torch(tmp_path / "n.pt", {"epoch": 1}))
    return [
        ((weights, "modl"), r"no weights at 'modl'; set --key to where they are, such as one of \['model'\]"),
        ((numbers,), r"no weights at 'its top'.*\['epoch'\]"),
        ((f"{weights},{weights}",), "'x', which another file has"),
        ((f"{weights},{weights}", "a,b,c"), "names 2 files, but --key 3 places"),
        ((str(plain), "model"), "leave --key out"),
        ((str(cut),), "neither a whole .safetensors file"),
        ((" ",), "names no file"),
        ((str(tmp_path / "none.pt"),), "none.pt cannot be read"),
        ((str(tmp_path),), "cannot be read"),
    ]


@pytest.mark.parametrize("row", range(9))
def test_what_is_wrong_with_files_is_told(row, tmp_path):
    arguments, message = told(tmp_path)[row]
    with pytest.raises(UsageError, match=message):
        read_weights(*arguments)
