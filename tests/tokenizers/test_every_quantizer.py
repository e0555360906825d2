"""What every quantizer promises, and what is special about each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError, build
from ar_jax.tokenizers.quantizers import QUANTIZERS
from ar_jax.tokenizers.quantizers.codebook import update_codebook
from ar_jax.tokenizers.quantizers.vq import entropy_loss

SIDE = 4
ROWS = {
    "vq": dict(kind="vq", vocab_size=9, channels=3, entropy_weight=0.1),
    "vq, plain": dict(kind="vq", vocab_size=9, channels=3, l2_norm=False),
    "vq, averaged": dict(kind="vq", vocab_size=9, channels=3, ema_decay=0.5, revive_below=0.1),
    "vq, clustered": dict(kind="vq", vocab_size=9, channels=3, num_clusters=3),
    "fsq": dict(kind="fsq", levels=(4, 3, 2)),
    "lfq": dict(kind="lfq", channels=5, entropy_bits=3),
    "kl": dict(kind="kl", channels=3),
    "multi_scale_vq": dict(kind="multi_scale_vq", vocab_size=9, channels=3, patch_nums=(1, 3, SIDE), num_phi=4),
    "multi_scale_vq, a phi each": dict(
        kind="multi_scale_vq", vocab_size=9, channels=3, patch_nums=(1, 2, SIDE), num_phi=0
    ),
    "multi_scale_vq, bands": dict(
        kind="multi_scale_vq", vocab_size=9, channels=3, patch_nums=(1, 2, SIDE), frequency_bands=True
    ),
    "residual_vq": dict(kind="residual_vq", vocab_size=9, channels=3, depth=3),
    "residual_vq, averaged": dict(kind="residual_vq", vocab_size=9, channels=3, depth=2, ema_decay=0.5),
}
DISCRETE = [name for name, row in ROWS.items() if row["kind"] != "kl"]


@functools.cache
def made(name):
    quantizer = build(QUANTIZERS, ROWS[name], "tokenizer.quantizer")
    z = jax.random.normal(jax.random.key(0), (2, SIDE, SIDE, quantizer.in_channels))
    variables = quantizer.init(jax.random.key(1), z)
    spread = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(jax.random.key(2), a.shape), variables)
    return quantizer, spread, z, jax.jit(quantizer.apply)(spread, z)


def test_every_quantizer_has_a_row():
    assert {row["kind"] for row in ROWS.values()} == set(QUANTIZERS)


@pytest.mark.parametrize("name", ROWS)
def test_values_and_codes_have_the_promised_shapes(name):
    quantizer, _, z, found = made(name)
    length = sum(int(np.prod(grid)) for grid in quantizer.layout((SIDE, SIDE)))
    assert found.values.shape == (*z.shape[:-1], quantizer.channels)
    assert found.inputs.shape == (2, length, quantizer.channels)
    assert all(loss.shape == () and jnp.isfinite(loss) for loss in found.losses.values())
    if quantizer.vocab_size:
        assert found.codes.shape == (2, length) and found.codes.dtype == jnp.int32
        assert 0 <= found.codes.min() and found.codes.max() < quantizer.vocab_size


@pytest.mark.parametrize("name", DISCRETE)
def test_codes_lead_back_to_the_values(name):
    quantizer, variables, _, found = made(name)
    values = jax.jit(functools.partial(quantizer.apply, method="lookup"))(variables, found.codes)
    # z + (value - z) rounds twice, in float32.
    np.testing.assert_allclose(values.reshape(found.values.shape), found.values, atol=1e-6)


@pytest.mark.parametrize("name", DISCRETE)
def test_nothing_comes_of_unknown_codes(name):
    quantizer, variables, _, found = made(name)
    unknown = jnp.zeros(found.codes.shape, bool)
    assert not quantizer.apply(variables, found.codes, unknown, method="lookup").any()


@pytest.mark.parametrize("name", ["vq, plain", "lfq", "multi_scale_vq", "vq, averaged", "residual_vq, averaged"])
def test_gradients_pass_straight_through_to_the_latents(name):
    quantizer, variables, z, found = made(name)
    weights = jax.random.normal(jax.random.key(3), found.values.shape)
    gradient = jax.jit(jax.grad(lambda z: (quantizer.apply(variables, z).values * weights).sum()))(z)
    if not getattr(quantizer, "l2_norm", False):
        np.testing.assert_allclose(gradient, weights, atol=1e-6)  # one addition
    assert jnp.abs(gradient).min() > 0


def test_an_averaged_codebook_has_no_gradient_and_another_has():
    for name, moved in (("vq, averaged", False), ("vq", True)):
        quantizer, variables, z, _ = made(name)
        loss = lambda v, q=quantizer, z=z: sum(q.apply(v, z).losses.values()) + q.apply(v, z).values.sum()  # noqa: E731
        gradient = jax.jit(jax.grad(loss))(variables)
        assert any(leaf.any() for leaf in jax.tree.leaves(gradient)) == moved


@pytest.mark.parametrize("name", ["fsq", "lfq"])
def test_every_code_of_a_quantizer_without_a_table_is_reached_and_found_again(name):
    quantizer = made(name)[0]
    codes = jnp.arange(quantizer.vocab_size)[None]
    values = quantizer.apply({}, codes, method="lookup")
    assert len({tuple(row) for row in np.asarray(values[0]).tolist()}) == quantizer.vocab_size
    assert jnp.abs(values).max() <= 1
    # Latents that the bounding function of FSQ brings close to each level.
    if name == "fsq":
        levels = np.asarray(quantizer.levels)[None, None]
        half = (levels - 1) * (1 - 1e-3) / 2
        offset = np.where(levels % 2, 0.0, 0.5)
        values = np.arctanh((values * (levels // 2) + offset) / half * 0.9) - np.tan(offset / half)
    np.testing.assert_array_equal(quantizer.apply({}, values).codes, codes)


def test_a_key_draws_from_the_posterior_and_its_divergence_is_that_of_two_gaussians():
    quantizer = made("kl")[0]
    mean, log_variance = jnp.full((1, 50, 20, 3), 0.5), jnp.full((1, 50, 20, 3), -1.0)
    found = quantizer.apply({}, jnp.concatenate([mean, log_variance], axis=-1), jax.random.key(0))
    assert abs(float(found.values.mean()) - 0.5) < 0.04  # four standard errors of 3000 draws
    assert abs(float(found.values.std()) - np.exp(-0.5)) < 0.04
    expected = 0.5 * (0.25 + np.exp(-1.0) - 1 + 1) * 3000 * quantizer.kl_weight
    np.testing.assert_allclose(found.losses["kl"], expected, rtol=1e-4)  # a float32 sum of 3000 equal terms


def test_the_entropy_loss_is_lowest_for_decided_choices_that_use_all_codes():
    decided = 100 * jnp.eye(4)[None]
    np.testing.assert_allclose(entropy_loss(decided), -np.log(4), atol=1e-3)  # log(p + 1e-5) in place of log(p)
    np.testing.assert_allclose(entropy_loss(jnp.zeros((1, 4, 4))), 0.0, atol=1e-3)
    np.testing.assert_allclose(entropy_loss(jnp.broadcast_to(decided[:, :1], (1, 4, 4))), 0.0, atol=1e-3)


def test_the_entropy_of_bits_is_that_of_all_their_patterns():
    """With one group of bits, LFQ's factors give what a softmax over all 2^channels codes gives."""
    quantizer = build(QUANTIZERS, dict(kind="lfq", channels=3, entropy_temperature=2.0), "tokenizer.quantizer")
    z = jax.random.normal(jax.random.key(0), (2, 5, 3))
    codes = quantizer.apply({}, jnp.arange(8)[None], method="lookup")[0]
    distances = jnp.square(z[:, :, None] - codes[None, None]).sum(axis=-1)
    expected = 0.1 * entropy_loss(-distances / 2.0)
    np.testing.assert_allclose(quantizer.apply({}, z).losses["entropy"], expected, atol=1e-6)


def leaves_of(vectors):
    return {"embedding": vectors, "count": jnp.ones(len(vectors)), "sum": vectors}


def test_averaged_vectors_go_to_the_mean_of_what_chose_them():
    leaves = leaves_of(jnp.array([[0.0], [10.0]]))
    inputs, codes = jnp.array([[[1.0], [3.0], [8.0]]]), jnp.array([[0, 0, 1]])
    update = jax.jit(functools.partial(update_codebook, decay=0.8))
    for _ in range(60):  # 0.8^60 is below 1e-5
        leaves = update(leaves, inputs, codes, jax.random.key(0))
    np.testing.assert_allclose(leaves["embedding"], [[2.0], [8.0]], atol=1e-4)
    np.testing.assert_allclose(leaves["count"], [4 / 3, 2 / 3], atol=1e-4)


def test_a_vector_that_nothing_chooses_is_replaced_by_a_latent_of_the_batch():
    leaves = leaves_of(jnp.array([[0.0], [100.0], [200.0]]))
    inputs, codes = jnp.array([[[1.0], [2.0], [3.0], [4.0]]]), jnp.zeros((1, 4), jnp.int32)
    update = jax.jit(functools.partial(update_codebook, decay=0.5, revive_below=0.2))
    seen = []
    for step in range(3):
        leaves = update(leaves, inputs, codes, jax.random.key(step))
        seen.append(np.asarray(leaves["embedding"][1:, 0]))
    np.testing.assert_array_equal(seen[1], [100.0, 200.0])  # counts 1/2, 1/4: still alive
    assert set(seen[2].tolist()) <= {1.0, 2.0, 3.0, 4.0} and len(set(seen[2].tolist())) == 2
    np.testing.assert_array_equal(leaves["count"][1:], [1.0, 1.0])


@pytest.mark.parametrize("slots", [range(0, 26), range(1, 10), [25, 3, 0, 11], [0]], ids=str)
def test_what_is_fed_for_a_slot_is_what_coarser_scales_tell_of_its_place(slots):
    quantizer, variables, _, found = made("multi_scale_vq")
    slots, sides = np.asarray(slots), quantizer.patch_nums
    sizes = np.square(sides)
    totals = quantizer.apply(variables, found.codes, len(sides), method="totals")
    expected = []
    for slot in slots:
        scale = int(np.searchsorted(np.cumsum(sizes), slot, side="right"))
        row, col = divmod(slot - sum(sizes[:scale]), sides[scale])
        bins = [(i * SIDE // sides[scale], -(-(i + 1) * SIDE // sides[scale])) for i in (row, col)]
        expected.append(totals[scale][:, slice(*bins[0]), slice(*bins[1])].mean(axis=(1, 2)))
    fed = quantizer.apply(variables, found.codes, slots, method="resample")
    np.testing.assert_allclose(fed, jnp.stack(expected, axis=1), atol=1e-6)  # means of up to 16 float32
    assert not fed[:, slots == 0].any()


def test_what_is_fed_for_a_scale_does_not_depend_on_it_or_on_finer_ones():
    quantizer, variables, _, found = made("multi_scale_vq")
    slots = np.arange(1, 10)
    feed = functools.partial(quantizer.apply, variables, slots=slots, method="resample")
    np.testing.assert_array_equal(feed(found.codes), feed(found.codes.at[:, 1:].set(0)))


def test_the_first_scales_alone_add_up_to_what_they_are_known_to_be():
    quantizer, variables, _, found = made("multi_scale_vq")
    totals = quantizer.apply(variables, found.codes, 3, method="totals")
    for count, end in enumerate((0, 1, 10, 26)):
        known = jnp.broadcast_to(jnp.arange(26) < end, found.codes.shape)
        np.testing.assert_allclose(
            quantizer.apply(variables, found.codes, known, method="lookup"), totals[count], atol=1e-6
        )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (dict(kind="vq", vocab_size=1), "vocab_size=1"),
        (dict(kind="vq", revive_below=0.1), "needs ema_decay"),
        (dict(kind="vq", num_clusters=17, vocab_size=16), "num_clusters=17 must lie between 0 and vocab_size, 16"),
        (dict(kind="vq", num_clusters=4, ema_decay=0.9), "needs ema_decay=0"),
        (dict(kind="fsq", levels=(4, 1)), r"levels=\(4, 1\)"),
        (dict(kind="lfq", channels=31), "channels=31"),
        (dict(kind="multi_scale_vq", patch_nums=(1, 2)), r"patch_nums=\(1, 2\) must rise"),
        (dict(kind="multi_scale_vq", patch_nums=(3, 1, SIDE)), "must rise"),
        (dict(kind="fsqs"), "Did you mean 'fsq'"),
        (dict(kind="vq", vocab=3), "Did you mean 'vocab_size'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_told(row, message):
    with pytest.raises(UsageError, match=message):
        quantizer = build(QUANTIZERS, row, "tokenizer.quantizer")
        quantizer.layout((SIDE, SIDE))
        jax.eval_shape(quantizer.init, jax.random.key(0), jnp.zeros((1, SIDE, SIDE, quantizer.in_channels)))


def test_a_clustered_code_is_its_cluster_and_itself_and_its_cluster_alone_shows_the_centre():
    quantizer, variables, _, found = made("vq, clustered")
    coarse, fine = found.codes[:, ::2], found.codes[:, 1::2]
    np.testing.assert_array_equal(fine, made("vq")[0].apply(variables_without_centres(variables), made("vq")[2]).codes)
    vectors = quantizer.apply(variables, found.codes, method="lookup")
    centroids = variables["params"]["centroids"]
    distances = jnp.square(vectors[:, :, None] - centroids[None, None]).sum(axis=-1)
    np.testing.assert_array_equal(coarse, distances.argmin(axis=-1))
    known = jnp.broadcast_to(jnp.arange(found.codes.shape[1])[None] % 2 == 0, found.codes.shape)
    shown = quantizer.apply(variables, found.codes, known, method="lookup")
    np.testing.assert_array_equal(shown, centroids[coarse])
    assert quantizer.vocab_sizes == (3, 9) and coarse.max() < 3


def variables_without_centres(variables):
    return {"params": {k: v for k, v in variables["params"].items() if k != "centroids"}}


def test_a_scale_of_bands_is_chosen_for_what_lies_in_its_bands_and_the_ones_before():
    """FR-VAE (arXiv:2503.07076, eq. 3): R_(i-1) + f_i is what the bands up to i hold, less what the codes before have given."""
    quantizer, variables, z, found = made("multi_scale_vq, bands")
    totals = quantizer.apply(variables, found.codes, 3, method="totals")
    spectrum, radius = np.fft.fft2(z, axes=(1, 2)), np.hypot(*np.meshgrid(*[np.fft.fftfreq(SIDE)] * 2, indexing="ij"))
    start = 0
    for scale, (side, cutoff) in enumerate(zip((1, 2, SIDE), np.cumsum([1, 4, 16]) / 21, strict=True)):
        band = np.fft.ifft2(spectrum * (radius <= cutoff * radius.max() + 1e-9)[None, :, :, None], axes=(1, 2)).real
        rest = (band - totals[scale]).reshape(2, side, SIDE // side, side, SIDE // side, 3).mean(axis=(2, 4))
        np.testing.assert_allclose(found.inputs[:, start : start + side * side], rest.reshape(2, -1, 3), atol=1e-5)
        start += side * side
