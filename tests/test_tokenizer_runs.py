"""Tokenizers as a user trains and uses them: train, load, evaluate, write tokens, read them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ar_jax
from ar_jax import run as runs
from ar_jax import tokenize
from ar_jax.config import UsageError, get_config
from ar_jax.data.protocol import Facts
from ar_jax.data.token_shards import load_token_shards
from ar_jax.run import load_data
from ar_jax.tokenizer_system import tokenizer_from_config
from ar_jax.training.program import make_program

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "tokenizers"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
VARIANTS = [(name, v) for name in NAMES for v in importlib.import_module(f"configs.tokenizers.{name}").VARIANTS]
SHAPES = {"smoke": (8, 8, 1), "fashion": (28, 28, 1)}
# Parameters in the papers, where they tell: LlamaGen's table 8 (72 M and 70 M), TiTok's table 1 with decoder, VAR's 109 M.
MILLIONS = {("vqgan", "base"): 72, ("vqgan", "vq_8"): 70, ("titok", "base"): 641, ("var_vq", "base"): 109}


def smoke(name="vqgan", **train):
    config = get_config(FOLDER / f"{name}.py:smoke")
    config.train.update(dict(num_steps=10, batch_size=16, log_every_steps=5) | train)
    config.tokenizer.update(hidden_channels=8, num_groups=4)
    config.objective.perceptual_weight = 0.0  # compiling takes its time
    config.schedule.warmup_steps, config.mesh = 2, dict(data=1)
    return config


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_variant_builds_and_can_be_trained(name, variant):
    config = get_config(FOLDER / f"{name}.py:{variant}")
    config.objective.update(perceptual_features="random", perceptual_weights="")  # no file is at hand
    shape = SHAPES.get(variant, (256, 256, 3))
    system = tokenizer_from_config(config, Facts("image", shape))
    params = make_program(system, config).shapes.params
    batch = {"image": jax.ShapeDtypeStruct((2, *shape), jnp.float32)}
    loss, _, replaced = jax.eval_shape(system.loss, params, batch, jax.random.key(0), jnp.float32(0))
    assert loss.shape == () and all(system.frozen(leaf) for leaf in replaced)
    millions = sum(leaf.size for leaf in jax.tree.leaves(params["tokenizer"])) / 1e6
    assert round(millions) == MILLIONS.get((name, variant), round(millions))


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_the_three_variants(name):
    assert {"base", "smoke", "fashion"} <= {v for n, v in VARIANTS if n == name}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "vqgan"
    return workdir, ar_jax.train(smoke(), workdir)


def test_a_tokenizer_learns_and_its_codes_follow(trained):
    workdir, run = trained
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["l1"] < lines[0]["l1"]
    assert {"discriminator", "adversarial_weight", "codebook_usage", "perplexity"} <= set(lines[-1])
    assert {"eval/PSNR_db", "eval/codebook_usage"} <= set(lines[-1])
    assert not np.allclose(run.params["tokenizer"]["quantizer"]["codebook"]["count"], 1.0)


def test_a_loaded_tokenizer_encodes_and_decodes_as_the_trained_one(trained):
    workdir, run = trained
    loaded, images = ar_jax.load(workdir), load_data(run.config).test.take(np.arange(5))["image"]
    codes = loaded.encode(images)
    np.testing.assert_array_equal(codes, run.encode(images))
    assert codes.shape == (5, 16) and codes.dtype == np.int32 and loaded.step == 10
    made = loaded.decode(codes)
    assert made.shape == images.shape and np.abs(made).max() <= 1
    for bad, words in [(lambda: loaded.encode(images[:, :4]), r"takes \[B, 8, 8, 1\]"),
                       (lambda: loaded.decode(codes[:, :3]), r"tokenizer's are \[B, 16\]"),
                       (lambda: loaded.decode(codes + 64), "between 0 and 63")]:  # fmt: skip
        with pytest.raises(UsageError, match=words):
            bad()


def test_evaluation_reports_reconstructions_and_draws_them(trained):
    workdir, run = trained
    metrics = runs.evaluate(run, workdir)
    wanted = {"step", "PSNR_db", "mean_absolute_error", "codebook_usage", "perplexity", "reconstructions_per_second"}
    assert set(metrics) == wanted and metrics == json.loads((workdir / "eval" / "metrics.json").read_text())
    test = load_data(run.config).test.take(np.arange(360))["image"]
    made = run.reconstruct(test)
    squares = np.square(made - test).reshape(360, -1).mean(axis=1)
    assert metrics["PSNR_db"] == pytest.approx((10 * np.log10(4 / squares)).mean(), rel=1e-4)
    assert metrics["mean_absolute_error"] == pytest.approx(np.abs(made - test).mean(), rel=1e-4)
    picture = np.asarray(Image.open(workdir / "eval" / "reconstructions.png"))
    assert picture.shape[0] > 300 and len(np.unique(picture)) > 10


def test_tokens_written_are_the_tokenizers_and_writing_again_is_the_same(trained, tmp_path, monkeypatch, capsys):
    workdir, run = trained
    monkeypatch.delenv("AR_JAX_DATA", raising=False)
    arguments = ["tokenize", f"--workdir={workdir}", "--out", str(tmp_path / "shards")]
    tokenize.main(arguments)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == {"digest": tokenize.digest(run), "train": 1437, "test": 360}
    data, images = load_token_shards(str(tmp_path / "shards")), load_data(run.config)
    assert (data.shape, data.levels, data.label_names) == (images.shape, images.levels, images.label_names)
    assert data.train.meta.layout == run.system.tokenizer.layout and data.train.meta.dtype == "uint16"
    for tokens, source in ((data.train, images.train), (data.test, images.test)):
        some, there = np.asarray([0, 7, len(source) - 1]), source.take(np.asarray([0, 7, len(source) - 1]))
        np.testing.assert_array_equal(tokens.take(some)["tokens"], run.encode(there["image"]))
        np.testing.assert_array_equal(tokens.take(some)["label"], there["label"])
    tokenize.tokenize(run, images, tmp_path / "again")
    for file in (tmp_path / "shards").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    with pytest.raises(UsageError, match="shards exists; remove it"):
        tokenize.main(arguments)


def test_continuous_tokens_are_written_in_the_dtype_asked_for(tmp_path):
    run = ar_jax.build_run(smoke("mar_kl"))
    data = load_data(run.config)
    meta = tokenize.tokenize(run, data, tmp_path / "shards", "float16")
    assert meta.shape == (16, 4) and meta.dtype == "float16" and meta.vocab_size == 0
    read = load_token_shards(str(tmp_path / "shards")).test.take(np.arange(3))["tokens"]
    np.testing.assert_allclose(read, run.encode(data.test.take(np.arange(3))["image"]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(model=dict(kind="decoder")), "config.model is not a known key"),
        (dict(tokenizer=dict(kind="pixels")), "'pixels' learns nothing; use 'autoencoder' or 'titok'"),
        (dict(objective=dict(kind="reconstruction", l3_weight=1.0)), "config.objective.l3_weight is not a known key"),
        (
            dict(objective=dict(kind="reconstruction", perceptual_weight=1.0, perceptual_features="no")),
            "no does not exist",
        ),
        (dict(data=dict(kind="text", path="README.md", length=8)), "is for images, but the data is text"),
    ],
    ids=str,
)
def test_configs_that_make_no_sense_are_refused_before_anything_is_written(change, words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("AR_JAX_DATA", raising=False)
    config = smoke()
    for section, values in change.items():
        config[section] = values
    with pytest.raises(UsageError, match=words):
        ar_jax.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
