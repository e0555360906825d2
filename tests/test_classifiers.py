"""Classifiers: every config builds, learns and answers; encoders read no padding; labels supervise a selection."""

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ar_jax
from ar_jax import run as runs
from ar_jax.classifier_system import classifier_from_config
from ar_jax.config import UsageError, get_config
from ar_jax.data.protocol import Facts
from ar_jax.mixers.select_and_pack import SelectAndPack
from ar_jax.run import load_data
from ar_jax.tokenizers.patches import patches
from ar_jax.training.program import make_program

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "classifiers"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
VARIANTS = [(name, v) for name in NAMES for v in importlib.import_module(f"configs.classifiers.{name}").VARIANTS]
TEN = tuple(map(str, range(10)))
# Parameters in the papers' tables, where they tell.
MILLIONS = {("nat", "mini"): 20, ("nat", "tiny"): 28, ("nat", "small"): 51, ("nat", "base"): 90}
MILLIONS |= {("van", "b0"): 4, ("van", "b1"): 14, ("van", "base"): 27, ("van", "b3"): 45}
MILLIONS |= {
    ("mamba_out", "femto"): 7,
    ("mamba_out", "tiny"): 27,
    ("mamba_out", "small"): 48,
    ("mamba_out", "base"): 85,
}
MILLIONS |= {("encoder", "base"): 87, ("encoder", "small"): 22}


def facts_of(config):
    """What its data is, without reading any."""
    return {
        "tfds": Facts("image", (224, 224, 3), 256, tuple(map(str, range(1000)))),
        "idx": Facts("image", (28, 28, 1), 256, TEN),
        "npz": Facts("image", (32, 32, 3), 256, TEN),
    }.get(config.data.kind) or load_data(config)


def smoke(name="encoder", **changes):
    config = get_config(FOLDER / f"{name}.py:smoke")
    config.mesh = dict(data=1)
    for section, values in changes.items():
        config[section].update(values)
    return config


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_variant_builds_and_can_be_trained(name, variant):
    config = get_config(FOLDER / f"{name}.py:{variant}")
    facts = facts_of(config)
    if name == "terminator" and variant == "base":
        facts = Facts("image", (32, 32, 3), 256, TEN)
    system = classifier_from_config(config, facts)
    params = make_program(system, config).shapes.params
    dtype = jnp.int32 if facts.modality == "text" else jnp.float32
    batch = {
        system.data_key: jax.ShapeDtypeStruct((2, *facts.shape), dtype),
        "label": jax.ShapeDtypeStruct((2,), jnp.int32),
    }
    loss, _, replaced = jax.eval_shape(system.loss, params, batch, jax.random.key(0), jnp.float32(0))
    assert loss.shape == () and all(system.frozen(leaf) for leaf in replaced)
    millions = sum(leaf.size for leaf in jax.tree.leaves(params["classifier"])) / 1e6
    assert round(millions) == MILLIONS.get((name, variant), round(millions))


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_a_base_and_a_smoke_variant(name):
    assert {"base", "smoke"} <= {v for n, v in VARIANTS if n == name}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "select_and_pack"
    return workdir, ar_jax.train(smoke("select_and_pack"), workdir)


def test_a_run_is_loaded_evaluated_and_asked(trained):
    workdir, run = trained
    loaded = ar_jax.load(workdir)
    metrics = runs.evaluate(loaded, workdir)
    assert metrics["accuracy"] > 0.7 and metrics["step"] == 200
    assert metrics["accuracy"] == json.loads((workdir / "eval" / "metrics.json").read_text())["accuracy"]
    batch = load_data(run.config).test.take(np.arange(360))
    logits = loaded.logits(batch["image"])
    assert (logits.argmax(axis=-1) == batch["label"]).mean() == pytest.approx(metrics["accuracy"])
    shares = jax.nn.log_softmax(logits)[np.arange(360), batch["label"]]
    assert metrics["cross_entropy_nats"] == pytest.approx(float(-shares.mean()), rel=1e-5)
    assert loaded.classify(batch["image"][:3]) == [str(i) for i in logits[:3].argmax(axis=-1)]
    assert (workdir / "eval" / "confusion.png").stat().st_size > 1000
    with pytest.raises(UsageError, match=r"takes \[B, 8, 8, 1\]"):
        loaded.logits(batch["image"][:, :4])


def test_labels_choose_the_tokens_and_as_many_as_an_example_has(trained, monkeypatch):
    """SPA: the gates of all layers choose the patches with ink; their number differs from image to image."""
    _, run = trained
    batch = load_data(run.config).test.take(np.arange(100))
    gate, seen = SelectAndPack.logits, []

    def noted(self, x):
        logits = gate(self, x)
        jax.debug.callback(lambda value: seen.append(np.asarray(value)), logits)
        return logits

    monkeypatch.setattr(SelectAndPack, "logits", noted)
    run.system.logits(run.params, batch["image"]).block_until_ready()
    jax.effects_barrier()
    ink = np.asarray(patches(batch["object"][..., None], 2).any(axis=-1))
    chosen = np.stack(seen) > 0  # [layers, B, T]
    agreement = (chosen == ink).mean()
    assert agreement > 0.9 > max(ink.mean(), 1 - ink.mean()), (agreement, ink.mean())
    assert len(set(chosen[0].sum(axis=1).tolist())) > 3


@pytest.mark.parametrize("mixer", ["softmax", "chela", "mamba"])
@pytest.mark.parametrize("pool", ["mean", "last"])
def test_an_encoder_reads_no_padding(mixer, pool):
    config = smoke(
        "chela", model=dict(pool=pool, learned_positions=False, mixer=dict(kind=mixer)), data=dict(num_train=8)
    )
    del config.model.mixer["num_heads"], config.model.mixer["z_dim"]
    config.model.embed_dim = 32
    texts = np.zeros((2, 32), np.int32)
    texts[0, :9], texts[1, :20] = np.arange(1, 10), np.arange(20) % 15 + 1
    facts = load_data(config)
    long = classifier_from_config(config, facts)
    short = classifier_from_config(config, Facts("text", (20,), facts.levels, facts.label_names))
    params = long.init(jax.random.key(0))
    logits = long.logits(params, texts)
    np.testing.assert_allclose(logits, short.logits(params, texts[:, :20]), atol=1e-5)
    changed = texts.copy()
    changed[0, 8] = 12
    assert np.abs(long.logits(params, changed)[0] - logits[0]).max() > 1e-3


def test_batch_norms_keep_their_moments_and_answers_do_not_depend_on_the_batch():
    run = ar_jax.train(smoke("van", train=dict(num_steps=12), schedule=dict(warmup_steps=2)))
    system, images = run.system, load_data(run.config).test.take(np.arange(8))["image"]
    before, after = system.init(jax.random.key(0))["batch_stats"], run.params["batch_stats"]
    assert all(np.abs(a - b).max() > 0 for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    np.testing.assert_allclose(run.logits(images)[:3], run.logits(images[:3]), atol=1e-5)


LEARNED = {"encoder": 0.75, "nat": 0.8, "van": 0.75, "mamba_out": 0.75, "terminator": 0.75, "vir": 0.65, "chela": 0.4}
LEARNED |= {"conditioned_attention": 0.9}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_every_smoke_variant_learns(name, tmp_path):
    config = smoke(name)
    if config.data.kind == "text" and "multi30k" not in config.data.path[0]:
        pytest.skip("Multi30k is not in $AR_JAX_DATA")
    run = ar_jax.train(config, tmp_path)
    assert runs.evaluate(run, tmp_path)["accuracy"] > LEARNED[name]  # chance is 0.1


def test_every_smoke_variant_is_trained_here():
    assert {*LEARNED, "select_and_pack"} == set(NAMES)


@pytest.mark.parametrize(
    ("changes", "facts", "message"),
    [
        (dict(model=dict(kind="encodr")), None, "Did you mean 'encoder'"),
        (dict(model=dict(path=2)), None, "Did you mean 'patch'"),
        (dict(model=dict(patch=3)), None, "does not divide the image's"),
        (dict(model=dict(pool="max")), None, "Known: last, mean"),
        (dict(model=dict(adaln="block")), None, "needs a condition"),
        (dict(objective=dict(shift=1.5)), None, r"must lie in \[0, 1\)"),
        (dict(), Facts("image", (8, 8, 1), 17), "at least two classes"),
        (dict(model=dict(patch=1), objective=dict(shift=0.1)), Facts("text", (8,), 17, TEN), "shift moves images"),
        (dict(), Facts("video", (2, 8, 8, 1), 17, TEN), "but the data is video"),
    ],
)
def test_what_does_not_fit_is_told(changes, facts, message):
    config = smoke(**changes)
    with pytest.raises(UsageError, match=message):
        classifier_from_config(config, facts or load_data(config))


def test_objects_are_told_of_images_only():
    config = smoke("select_and_pack", data=dict(objects=2.0))
    with pytest.raises(UsageError, match=r"a brightness in \[-1, 1\)"):
        load_data(config)
    config = smoke("chela")
    config.data.objects = 0.0
    with pytest.raises(UsageError, match="holds none"):
        load_data(config)
