"""Official weights become a run that eval.py, train.py and Python read, and come out of it bit for bit."""

from __future__ import annotations

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import toy_official
from toy_official import INTEROP, weights, write_torch_weights

import ar_jax
from ar_jax import training
from ar_jax.data import pipeline
from ar_jax.interop import SYSTEMS, convert
from ar_jax.interop.files import read_safetensors, write_safetensors
from ar_jax.run import load_data

WIDTH = 8  # of the toy's smoke variant


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setitem(SYSTEMS, "toy", INTEROP)


def run(*arguments):
    return convert.main(["--system=toy", *map(str, arguments)])


def test_weights_become_a_run_and_are_exported_bit_for_bit(tmp_path, capsys):
    official = weights(WIDTH)
    official["head.weight"] = official["head.weight"].astype(ml_dtypes.bfloat16)
    official["counter"] = np.int64(3)[None]
    file = write_torch_weights(tmp_path / "toy.pth", official, lambda tree: {"model": tree, "epoch": 1})
    out = tmp_path / "run"
    assert run(f"--weights={file}", f"--out={out}") == 0
    said = capsys.readouterr().out
    assert "toy_config.py:smoke: " in said and "none is left over" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "toy.pth"]

    loaded = ar_jax.load(out)
    assert loaded.step == 0 and loaded.config.model.embed_dim == WIDTH
    query = loaded.params["generator"]["decoder"]["stack"]["layers"]["block_0"]["mixer"]["query"]["kernel"]
    np.testing.assert_array_equal(query[1], official["blocks.1.qkv.weight"][:WIDTH].T)
    record = json.loads((out / "conversion.json").read_text())
    assert record["dtypes"] == {"head.weight": "bfloat16"}
    assert sorted(record["kept"]) == ["blocks.0.mask", "blocks.1.mask", "codes.weight", "counter"]
    assert {*record["used"], *record["kept"]} == set(official)

    exported = tmp_path / "again.safetensors"
    assert run(f"--workdir={out}", f"--export={exported}") == 0
    back = read_safetensors(exported)
    assert sorted(back) == sorted(official)
    for name, array in official.items():
        assert (back[name].dtype, back[name].tobytes()) == (array.dtype, array.tobytes()), name
    assert run(f"--workdir={out}", f"--export={exported}") == 2
    assert "exists; choose another --export" in capsys.readouterr().err


def test_training_goes_on_from_official_weights(tmp_path):
    write_safetensors(tmp_path / "toy.safetensors", weights(WIDTH))
    assert run(f"--weights={tmp_path / 'toy.safetensors'}", f"--out={tmp_path / 'run'}") == 0
    before = ar_jax.load(tmp_path / "run")
    data = load_data(before.config)
    iterator = pipeline.train_iterator(data, before.config.train.batch_size, before.config.seed)
    after = training.fit(before.system, iterator, before.config, tmp_path / "run")
    assert after.step == 1
    gaps = jax.tree.map(lambda a, b: float(abs(a - b).max()), before.params["generator"], after.params["generator"])
    assert 0 < max(jax.tree.leaves(gaps)) < 1e-2  # one step of 1e-3 at most


def changed(**changes):
    official = weights(WIDTH)
    for name, array in changes.items():
        official[name.replace("__", ".")] = array
    return {name: array for name, array in official.items() if array is not None}


BAD = {
    "another size": (
        lambda: weights(12),
        r"No variant of .*toy_config.py fits.*nearest is .*:(base|smoke)\. .*has shape \[",
    ),
    "another depth": (
        lambda: weights(WIDTH) | {"blocks.2.norm1.weight": np.zeros(WIDTH, np.float32)},
        r"nearest is .*:smoke\. Official weight 'blocks.2.norm1.weight' \[8\] is unknown",
    ),
    "another system": (
        lambda: {"cls_token": np.zeros((1, 1, 8), np.float32)},
        r"'codes.weight' \(and .* more\) is missing",
    ),
    "missing": (
        lambda: changed(null=None),
        r"'null' is missing; it belongs to generator/condition/embed/embedding \[11, 8\]",
    ),
    "extra": (lambda: changed(nul=np.zeros((1, WIDTH), np.float32)), r"'nul' \[1, 8\] is unknown.*Did you mean 'null'"),
    "not finite": (
        lambda: changed(null=np.full((1, WIDTH), np.nan, np.float32)),
        "'null' has values that are not finite",
    ),
    "integers": (lambda: changed(null=np.zeros((1, WIDTH), np.int64)), "'null' has dtype int64"),
    "other shape": (
        lambda: changed(null=np.zeros((2, WIDTH), np.float32)),
        r"'null' has shape \[2, 8\], but generator/condition/embed/embedding \[11, 8\] of this model needs \[1, 8\]",
    ),
}


@pytest.mark.parametrize(("official", "message"), BAD.values(), ids=BAD)
def test_weights_that_do_not_fit_are_told_and_nothing_is_made(official, message, tmp_path, capsys):
    file = write_torch_weights(tmp_path / "toy.pt", official())
    before = file.read_bytes()
    assert run(f"--weights={file}", f"--out={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["toy.pt"] and file.read_bytes() == before


def test_a_truncated_file_and_a_directory_in_use_are_told_and_nothing_is_touched(tmp_path, capsys):
    file = write_torch_weights(tmp_path / "toy.pt", weights(WIDTH))
    file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / "run").mkdir()
    assert run(f"--weights={file}", f"--out={tmp_path / 'run'}") == 2
    assert "toy.pt is damaged" in capsys.readouterr().err
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "run" / "notes").write_text("mine")
    assert run(f"--weights={file}", f"--out={tmp_path / 'run'}") == 2
    assert "run is not an empty directory; choose another --out" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes"]


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no more")

    monkeypatch.setattr(convert, "write_run", fail)
    with pytest.raises(RuntimeError, match="no more"):
        convert.convert(INTEROP, weights(WIDTH), tmp_path / "run")
    assert not list(tmp_path.iterdir())


FLAGS = {
    "system": (["--system=toi"], "--system=toi is unknown. Did you mean 'toy'"),
    "weights": (["--out=x"], "--weights is missing"),
    "workdir": (["--export=x.safetensors"], "--workdir is missing"),
    "option": (["--wieghts=x"], "--wieghts=x is not an option. Did you mean '--weights'"),
    "config": (["--config=none.py"], "none.py"),
}


@pytest.mark.parametrize(("arguments", "message"), FLAGS.values(), ids=FLAGS)
def test_wrong_options_are_told(arguments, message, tmp_path, capsys):
    write_safetensors(tmp_path / "toy.safetensors", weights(WIDTH))
    rest = (
        [f"--weights={tmp_path / 'toy.safetensors'}", f"--out={tmp_path / 'run'}"] if "config" in arguments[0] else []
    )
    assert run(*arguments, *rest) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_given_config_is_used_and_must_fit(tmp_path, capsys):
    write_safetensors(tmp_path / "toy.safetensors", weights(WIDTH))
    flags = [f"--weights={tmp_path / 'toy.safetensors'}", f"--out={tmp_path / 'run'}"]
    assert run(*flags, f"--config={toy_official.INTEROP.config}:base") == 2
    assert "has shape" in capsys.readouterr().err
    assert run(*flags, f"--config={toy_official.INTEROP.config}:smoke", "--verbose") == 0
    assert "used  head.weight" in capsys.readouterr().out
