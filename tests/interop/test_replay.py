"""Official runs, replayed from their weights and inputs: every recorded output, tokens to the last one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.interop import replay
from ar_jax.interop.files import read_safetensors, write_safetensors

FIXTURES = Path(os.environ.get("AR_JAX_FIXTURES", Path(__file__).parents[3] / "shared" / "fixtures"))
# The first words of the folders' names.
SYSTEMS = {
    "visual": (
        "llamagen",
        "var",
        "mar",
        "rar",
        "arpg",
        "aim",
        "mvar",
        "titok",
        "maskgit",
        "nar",
        "lpd",
        "npp",
        "maskgil",
        "dnd_transformer",
    ),
    "mixers": (
        "fla_forgetting_attn",
        "fla_nsa",
        "loki",
        "mra",
        "routing",
        "seerattention",
        "sparsek",
        "tree_attention",
        "natten",
        "axial",
        "halo_attention",
        "lightnet",
        "van",
        "ulsam",
        "mambaout",
        "lightweight_conv",
        "dynamic_conv",
        "fnet",
        "linformer",
        "hrrformer",
        "aft",
        "mega",
        "gss",
        "block_transformer",
        "perceiver_ar",
        "fla_delta",
        "fla_gated_delta",
        "fla_rwkv6",
        "fla_rwkv7",
        "fla_mesa_net",
        "fla_ttt_linear",
        "fla_log_linear_attn",
        "mamba",
        "mamba2",
        "linear_transformer",
        "fla_linear_attn",
        "fla_gla",
        "fla_simple_gla",
        "fla_lightning_attn",
        "fla_retention",
        "fla_based",
        "fla_hgrn",
        "fla_gsa",
        "fla_abc",
        "agalite",
    ),
}


def folders() -> list[Path]:
    """The recorded runs of these systems; systems whose names only begin alike are others."""
    names = [
        path
        for area, systems in SYSTEMS.items()
        for path in sorted((FIXTURES / area).glob("*"))
        if any(f"{path.name}_".startswith(f"{system}_") for system in systems)
    ]
    absent = pytest.param(None, marks=pytest.mark.skip(reason=f"There are no official fixtures in {FIXTURES}."))
    return [pytest.param(path, id=path.name) for path in names] or [absent]


@pytest.mark.parametrize("folder", folders())
def test_every_official_output_is_replayed(folder):
    """Floats within the atol of the fixture's meta.json, which is set by what float32 rounding does to them."""
    differences = replay.compare(folder, replay.replay(folder))
    assert {d.output for d in differences} == set(json.loads((folder / "meta.json").read_text())["outputs"])
    assert all(d.within for d in differences), [d.texts for d in differences if not d.within]


META = {
    "source": "github someone/toy",
    "class": "toy.Toy",
    "atol": 1e-3,
    "outputs": {"out.y": dict(shape=[2, 1], dtype="float32"), "out.n": dict(shape=[], dtype="int64")},
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A recorded run of y = w x, n = 3, and its folder."""

    def function(meta, weights, inputs):
        assert set(inputs) == {"in.x"}
        return {"out.y": weights["w"] * inputs["in.x"], "out.n": 3}

    monkeypatch.setitem(replay.REPLAYS, "toy", replay.Replay(r"someone/toy;.*toy\.Toy", function))
    folder = tmp_path / "toy_run"
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps(META))
    write_safetensors(folder / "weights.safetensors", {"w": np.float32([2])})
    recorded = {"in.x": np.float32([1, 2]), "out.y": np.float32([[2], [4]]), "out.n": np.array(3)}
    write_safetensors(folder / "io.safetensors", recorded)
    return folder


def record(folder, **outputs):
    arrays = dict(read_safetensors(folder / "io.safetensors"))
    write_safetensors(folder / "io.safetensors", arrays | {f"out.{name}": array for name, array in outputs.items()})


def test_outputs_are_written_as_meta_tells_and_do_not_depend_on_recorded_ones(toy, tmp_path):
    record(toy, y=np.float32([[np.nan], [7]]), n=np.array(5))
    assert replay.main([str(toy), f"--out={tmp_path / 'found.safetensors'}"]) == 0
    found = read_safetensors(tmp_path / "found.safetensors")
    assert {name: (a.dtype.name, a.tolist()) for name, a in found.items()} == {
        "out.y": ("float32", [[2.0], [4.0]]),
        "out.n": ("int64", 3),
    }


@pytest.mark.parametrize(
    ("outputs", "code", "line"),
    [
        ({}, 0, "toy_run\tout.y\t0.0e+00\t1e-03\t"),
        ({"y": np.float32([[2], [4.0005]])}, 0, "toy_run\tout.y\t5.0e-04\t1e-03\t"),
        ({"y": np.float32([[2], [4.01]])}, 1, "toy_run\tout.y\t1.0e-02\t1e-03\tTOO GREAT"),
        ({"y": np.float32([[2], [np.nan]])}, 1, "toy_run\tout.y\tnan\t1e-03\tTOO GREAT"),
        ({"y": np.float32([[2], [np.inf]])}, 1, "toy_run\tout.y\tinf\t1e-03\tTOO GREAT"),
        ({"n": np.array(4)}, 1, "toy_run\tout.n\t1 of 1 unequal\tequal\tTOO GREAT"),
    ],
)
def test_differences_are_told_and_too_great_ones_fail(outputs, code, line, toy, capsys):
    record(toy, **outputs)
    assert replay.main([str(toy), "--compare"]) == code
    assert line in capsys.readouterr().out.splitlines()


def test_differences_are_written_as_a_page(toy, tmp_path):
    assert replay.main(["--compare", f"--markdown={tmp_path / 'parity.md'}", str(toy)]) == 0
    page = (tmp_path / "parity.md").read_text()
    assert "| toy_run | out.y | 0.0e+00 | 1e-03 | yes |" in page and "| toy_run | out.n | equal | equal | yes |" in page


def test_a_run_is_known_by_what_meta_tells_and_only_then_by_its_folder():
    llamagen = {
        "source": "github FoundationVision/LlamaGen",
        "class": "autoregressive.models.gpt.Transformer(**config)",
    }
    assert replay.kind_of(llamagen | {"system": "LlamaGen GPT, class-conditional"}, "var") == "llamagen_c2i"
    assert replay.kind_of(llamagen | {"system": "LlamaGen GPT"}, "llamagen_t2i_large") == "llamagen_t2i"
    with pytest.raises(UsageError, match="There is no replay of 'github else"):
        replay.kind_of({"source": "github else/where", "class": "models.mar.MAR"}, "else")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing to do; give a DIR"),
        (["DIR"], "Nothing to do; give a DIR"),
        (["DIR", "DIR", "--out=x"], "takes the outputs of one DIR, not of 2"),
        (["nowhere", "--compare"], "nowhere/meta.json cannot be read"),
        (["DIR", "--compair"], "--compair is not an option. Did you mean '--compare'"),
    ],
)
def test_wrong_arguments_are_told(arguments, message, toy, capsys):
    assert replay.main([str(toy) if argument == "DIR" else argument for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_replay_that_gives_another_shape_or_too_little_is_told(toy):
    meta = json.loads((toy / "meta.json").read_text())
    meta["outputs"]["out.y"]["shape"] = [3]
    (toy / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UsageError, match=r"gives out.y the shape \[2\], but meta.json tells \[3\]"):
        replay.replay(toy)
    meta["outputs"]["out.z"] = dict(shape=[], dtype="float32")
    (toy / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UsageError, match="gives no out.z; it gives out.y, out.n"):
        replay.replay(toy)
