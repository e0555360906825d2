"""Files of torch.save, without torch: values as they are, and nothing in them runs."""

from __future__ import annotations

import zipfile

import ml_dtypes
import numpy as np
import pytest
from toy_official import Call, Global, Stored, tensor, write_legacy_torch, write_torch, write_torch_weights

from ar_jax.config import UsageError
from ar_jax.interop.files import read_weights
from ar_jax.interop.torch_file import STORAGES, Inert, read_torch

VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize(("kind", "dtype"), STORAGES.items(), ids=STORAGES)
def test_every_dtype_is_read_bit_for_bit(kind, dtype, compression, tmp_path):
    values = (VALUES % 2).astype(dtype)
    stored = Stored(kind.removeprefix("torch."), "0", values)
    found = read_torch(write_torch(tmp_path / "a.pt", {"x": tensor(stored)}, [stored], compression))["x"]
    assert (found.dtype, found.shape, found.tobytes()) == (dtype, values.shape, values.tobytes())
    assert not found.flags.writeable


def test_views_share_their_storage_and_keep_offsets_and_strides(tmp_path):
    stored = Stored("FloatStorage", "7", VALUES)
    tree = {
        "transposed": tensor(stored, (4, 3), (1, 4)),
        "inner": tensor(stored, (2, 2), (4, 1), offset=5),
        "expanded": tensor(stored, (2, 4), (0, 1)),
        "scalar": tensor(stored, (), (), offset=11),
        "empty": tensor(stored, (0, 4)),
    }
    found = read_torch(write_torch(tmp_path / "a.pt", tree, [stored]))
    np.testing.assert_array_equal(found["transposed"], VALUES.T)
    np.testing.assert_array_equal(found["inner"], VALUES[1:, 1:3])
    np.testing.assert_array_equal(found["expanded"], VALUES[[0, 0]])
    assert found["scalar"] == 11 and found["empty"].shape == (0, 4)
    assert np.shares_memory(found["transposed"], found["inner"])


def test_unknown_names_become_inert(tmp_path):
    stored = Stored("FloatStorage", "0", VALUES)
    namespace = Call(Global("argparse", "Namespace"))
    scalar = Call(Global("numpy.core.multiarray", "scalar"), Global("numpy", "dtype"), b"1234")
    parameter = Call(Global("torch._utils", "_rebuild_parameter"), tensor(stored), True, None)
    tree = {"args": namespace, "scalar": scalar, "list": [1, 2.5, "a", None, (True,)], "weight": parameter}
    found = read_torch(write_torch(tmp_path / "a.pt", tree, [stored]))
    assert isinstance(found["args"], Inert) and isinstance(found["scalar"], Inert)
    assert found["list"] == [1, 2.5, "a", None, (True,)]
    np.testing.assert_array_equal(found["weight"], VALUES)


@pytest.mark.parametrize(
    "name",
    [("os", "system"), ("posix", "system"), ("builtins", "exec"), ("subprocess", "Popen"), ("nt", "no such name")],
)
def test_nothing_in_a_file_runs(name, tmp_path):
    victim = tmp_path / "victim"
    argument = f"open({str(victim)!r}, 'w')" if name[1] == "exec" else f"touch {victim}"
    tree = {"model": Call(Global("collections", "OrderedDict"), [("x", Call(Global(*name), argument))])}
    file = write_torch(tmp_path / "a.pt", tree)
    assert isinstance(read_torch(file)["model"]["x"], Inert)
    assert not victim.exists()
    with pytest.raises(UsageError, match="has no weights"):
        read_weights(str(file))


OUTSIDE = {
    "beyond the end": dict(shape=(3, 5)),
    "negative offset": dict(shape=(2,), strides=(1,), offset=-1),
    "negative stride": dict(shape=(2,), strides=(-1,), offset=3),
    "far": dict(shape=(2,), strides=(2**40,)),
}


@pytest.mark.parametrize("view", OUTSIDE.values(), ids=OUTSIDE)
def test_a_tensor_outside_its_storage_is_damage(view, tmp_path):
    stored = Stored("FloatStorage", "0", VALUES)
    file = write_torch(tmp_path / "a.pt", {"x": tensor(stored, **view)}, [stored])
    with pytest.raises(UsageError, match="a.pt is damaged.*outside its storage"):
        read_torch(file)


def test_a_storage_shorter_than_told_or_of_an_unknown_kind_is_damage(tmp_path):
    file = write_torch(
        tmp_path / "a.pt", {"x": tensor(Stored("FloatStorage", "0", VALUES))}, [Stored("", "0", VALUES[:1])]
    )
    with pytest.raises(UsageError, match="storage '0' is shorter"):
        read_torch(file)
    stored = Stored("QuantizedStorage", "0", VALUES)
    with pytest.raises(UsageError, match="unknown kind 'QuantizedStorage'"):
        read_torch(write_torch(tmp_path / "b.pt", {"x": tensor(stored)}, [stored]))


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_told(part, tmp_path):
    file = write_torch_weights(tmp_path / "a.pt", {"x": VALUES})
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    with pytest.raises(UsageError, match=r"a.pt is damaged or no file of torch.save \(.*\); download it again"):
        read_torch(file)


LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
STRANGE = {"empty": (b"", "no file of torch"), "text": (b"hello", "no file of torch"), "legacy": (LEGACY, "is damaged")}


@pytest.mark.parametrize(("content", "message"), STRANGE.values(), ids=STRANGE)
def test_files_of_other_formats_are_told(content, message, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_torch(tmp_path / "a.pt")


def test_a_missing_file_and_an_archive_of_something_else_are_told(tmp_path):
    with pytest.raises(UsageError, match="a.pt cannot be read.*No such file"):
        read_torch(tmp_path / "a.pt")
    np.savez(tmp_path / "b.npz", x=VALUES)
    with pytest.raises(UsageError, match="b.npz is damaged or no file of torch.save"):
        read_torch(tmp_path / "b.npz")


def test_a_file_of_bfloat16_in_big_endian_order_is_read(tmp_path):
    values = VALUES.astype(ml_dtypes.bfloat16)
    stored = Stored("BFloat16Storage", "0", values)
    file = write_torch(tmp_path / "a.pt", {"x": tensor(stored)})
    with zipfile.ZipFile(file, "r") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        new.writestr("archive/data.pkl", old.read("archive/data.pkl"))
        new.writestr("archive/byteorder", "big")
        new.writestr("archive/data/0", values.view(np.uint16).astype(">u2").tobytes())
    np.testing.assert_array_equal(read_torch(tmp_path / "b.pt")["x"].astype(np.float32), VALUES)


def test_files_before_torch_1_6_are_read_and_checked_alike(tmp_path):
    one, two = Stored("FloatStorage", "70", VALUES), Stored("BFloat16Storage", "7", VALUES.astype(ml_dtypes.bfloat16))
    strange = Call(Global("os", "system"), f"touch {tmp_path / 'victim'}")
    views = {"x": tensor(one), "t": tensor(one, (4, 3), (1, 4)), "y": tensor(two), "scalar": 3, "strange": strange}
    found = read_torch(write_legacy_torch(tmp_path / "a.pt", views, [one, two]))
    np.testing.assert_array_equal(found["x"], VALUES)
    np.testing.assert_array_equal(found["t"], VALUES.T)
    np.testing.assert_array_equal(found["y"].astype(np.float32), VALUES)
    assert found["scalar"] == 3 and isinstance(found["strange"], Inert) and not (tmp_path / "victim").exists()
    assert not found["x"].flags.writeable and set(read_weights(str(tmp_path / "a.pt"))) == {"x", "t", "y"}
    whole = (tmp_path / "a.pt").read_bytes()
    huge = Stored("FloatStorage", "0", np.broadcast_to(np.float32(0), (2**40,)))
    (tmp_path / "b.pt").write_bytes(whole[:-8])
    write_legacy_torch(tmp_path / "c.pt", views, [one])
    write_legacy_torch(tmp_path / "d.pt", {"x": tensor(huge, (1,))})
    write_legacy_torch(tmp_path / "e.pt", views, [one, two], little_endian=False)
    for name, reason in {"b": "'70' is shorter", "c": "'7' is missing", "d": "shorter", "e": "big-endian"}.items():
        with pytest.raises(UsageError, match=f"{name}.pt is damaged.*{reason}"):
            read_torch(tmp_path / f"{name}.pt")
