"""What every learned tokenizer promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError, build
from ar_jax.tokenizers import TOKENIZERS
from ar_jax.training.paths import named_leaves

SHAPE = (8, 8, 3)
CONV = dict(kind="autoencoder", hidden_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=4)
VIT = dict(embed_dim=8, num_layers=1, num_heads=2)
VQ = dict(kind="vq", vocab_size=11, channels=4)
ROWS = {
    "vq": CONV | dict(quantizer=VQ | dict(ema_decay=0.9, revive_below=0.1), z_channels=6),
    "fsq": CONV | dict(quantizer=dict(kind="fsq", levels=(3, 4)), attention=()),
    "kl": CONV | dict(quantizer=dict(kind="kl", channels=4), patch_size=2, latent_scale=0.5, attention=("middle",)),
    "multi_scale_vq": CONV
    | dict(quantizer=dict(kind="multi_scale_vq", vocab_size=11, channels=4, patch_nums=(1, 2, 4)), attention=()),
    "maskgit": CONV | dict(quantizer=VQ, style="maskgit", attention=(), quant_kernel_size=0),
    "titok": dict(kind="titok", quantizer=VQ, num_latent_tokens=3, patch_size=4, encoder=VIT, decoder=VIT),
    "titok, proxies": dict(
        kind="titok", quantizer=dict(kind="kl", channels=4), num_latent_tokens=3, patch_size=2, encoder=VIT, decoder=VIT,
        pixel_decoder=dict(
            num_proxies=5, proxy_channels=4, hidden_channels=4, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=2
        ),
    ),
}  # fmt: skip


@functools.cache
def made(name):
    """Tokenizer, images, parameters; tokens, their reconstruction, and previews of all and of nothing."""
    tokenizer = build(TOKENIZERS, ROWS[name], "tokenizer", shape=SHAPE)
    images = jax.random.uniform(jax.random.key(0), (2, *SHAPE), minval=-1)

    shapes = jax.eval_shape(tokenizer.init, jax.random.key(0))
    draws = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(draws.normal(size=leaf.shape, scale=0.3) + (leaf.ndim == 1), jnp.float32), shapes
    )

    @jax.jit
    def run(params):
        tokens, known = tokenizer.encode(params, images), jnp.arange(4) < 2
        known = jnp.broadcast_to(known[:, None], (4, tokens.shape[1]))
        shown = tokenizer.preview(params, jnp.concatenate([tokens, tokens]), known)
        return tokens, tokenizer.reconstruct(params, images, train=False), shown

    return tokenizer, images, params, *run(params)


def test_every_learned_tokenizer_has_a_row():
    assert {row["kind"] for row in ROWS.values()} == {"autoencoder", "titok"}


@pytest.mark.parametrize("name", ROWS)
def test_tokens_fill_the_layout_and_all_of_them_show_the_reconstruction(name):
    tokenizer, _, _, tokens, reconstruction, shown = made(name)
    length = sum(int(np.prod(grid)) for grid in tokenizer.layout)
    if tokenizer.vocab_size:
        assert tokenizer.channels == 0 and tokens.dtype == jnp.int32 and tokens.shape == (2, length)
        np.testing.assert_array_equal(tokens, reconstruction.codes)
    else:
        assert tokens.shape == (2, length, tokenizer.channels)
    # Straight-through values differ from the table's by float32 rounding, which the norms of tiny nets enlarge.
    np.testing.assert_allclose(shown[:2], jnp.clip(reconstruction.images, -1, 1), atol=1e-3)
    np.testing.assert_allclose(shown[2], shown[3], atol=1e-5)  # nothing is known of either example
    assert shown.shape == (4, *SHAPE) and tokenizer.num_dims == 192


@pytest.mark.parametrize("name", ["vq", "titok, proxies"])
def test_the_last_layers_gradient_is_that_of_the_whole_network(name):
    """The adaptive weight of an adversarial loss differentiates by the last kernel only, from the features on."""
    tokenizer, images, params, _, reconstruction, _ = made(name)
    whole = jax.jit(jax.grad(lambda p: jnp.square(tokenizer.reconstruct(p, images, train=False).images).sum()))(params)
    part = jax.jit(jax.grad(lambda p: jnp.square(tokenizer.decode_last(p, reconstruction.features)).sum()))(params)
    gradients = [named_leaves(tree)[tokenizer.last_layer] for tree in (whole, part)]
    assert jnp.abs(gradients[0]).max() > 0
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-4)  # sums over a hundred pixels in another order


def test_continuous_tokens_are_means_unless_a_key_draws_them():
    tokenizer, images, params, tokens, _, _ = made("kl")
    draw = jax.jit(tokenizer.encode)
    assert (draw(params, images, jax.random.key(0)) != tokens).any()
    np.testing.assert_array_equal(draw(params, images, jax.random.key(0)), draw(params, images, jax.random.key(0)))


def test_a_codebook_of_running_means_is_told_apart_and_updated():
    tokenizer, _, params, _, reconstruction, _ = made("vq")
    assert set(tokenizer.gradient_free) == {f"quantizer/codebook/{leaf}" for leaf in ("embedding", "count", "sum")}
    new = tokenizer.update_codebook(params, reconstruction, jax.random.key(0))
    old = named_leaves(params)
    assert {name: leaf.shape for name, leaf in new.items()} == {
        name: old[name].shape for name in tokenizer.gradient_free
    }
    assert made("fsq")[0].gradient_free == () and made("fsq")[0].update_codebook({}, reconstruction, None) == {}


def test_only_a_tokenizer_of_several_scales_resamples():
    tokenizer, _, params, tokens, _, _ = made("multi_scale_vq")
    assert tokenizer.layout == ((1, 1), (2, 2), (4, 4))
    assert tokenizer.resample(params, tokens, np.arange(1, 21)).shape == (2, 20, tokenizer.resample_channels)
    assert all(made(name)[0].resample_channels == 0 for name in ("vq", "kl", "titok"))


def test_half_precision_changes_little():
    tokenizer = build(TOKENIZERS, ROWS["kl"] | dict(dtype="bfloat16"), "tokenizer", shape=SHAPE)
    _, images, params, tokens, _, _ = made("kl")
    found = jax.jit(tokenizer.encode)(params, images)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, tokens, atol=0.1)  # 8 bits of mantissa through a dozen layers; tokens are near 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (CONV | dict(num_groups=3), "num_groups=3 must divide"),
        (CONV | dict(channel_multipliers=(1,) * 5), "multiples of 16"),
        (CONV | dict(style="vqgna"), "Did you mean 'vqgan'"),
        (CONV | dict(attention=("end",)), "tokenizer.attention"),
        (CONV | dict(dtype="float16"), "tokenizer.dtype='float16'"),
        (CONV | dict(quantizer=VQ, patch_size=2), "continuous"),
        (CONV | dict(quantizer=dict(kind="kl"), patch_size=3), "patch_size=3 must divide"),
        (CONV | dict(latent_scale=0.0), "latent_scale=0.0"),
        (CONV | dict(quantizer=VQ, z_channels=5, quant_kernel_size=0), "z_channels=5"),
        (ROWS["titok"] | dict(patch_size=3), "patch_size=3 must divide"),
        (ROWS["titok"] | dict(encoder=VIT | dict(num_heads=3)), "num_heads=3"),
        (ROWS["titok"] | dict(encoder=dict(heads=3)), "tokenizer.encoder.heads"),
        (ROWS["titok"] | dict(quantizer=dict(kind="multi_scale_vq")), "must rise"),
        (ROWS["titok, proxies"] | dict(patch_size=4), "makes images of"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_told_before_anything_is_traced(changes, message):
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(build(TOKENIZERS, changes, "tokenizer", shape=SHAPE).init, jax.random.key(0))
