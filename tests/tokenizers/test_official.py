"""Official tokenizers: their weights come and go bit for bit.

That they give the official outputs is tested with all other official runs in tests/interop/test_replay.py; those for which
no run was recorded with its weights are here.
"""

import functools
import json
import os
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ar_jax.interop import tokenizers as interop
from ar_jax.interop.replay_tokenizers import load
from ar_jax.interop.transfer import to_official, to_ours
from ar_jax.tokenizers import TOKENIZERS

FIXTURES = Path(os.environ.get("AR_JAX_FIXTURES", Path(__file__).parents[3] / "shared" / "fixtures")) / "visual"
RULES = {
    "llamagen_vq": interop.llamagen_vq,
    "var_vqvae": interop.var_vqvae,
    "titok": interop.titok,
    "titok_rgb": interop.titok,
}


@functools.cache
def fixture(kind):
    folder = FIXTURES / kind
    if not folder.is_dir():
        pytest.skip(f"no official fixture {folder}; set AR_JAX_FIXTURES")
    arrays = load_file(folder / "io.safetensors")
    return json.loads((folder / "meta.json").read_text()), load_file(folder / "weights.safetensors"), arrays


@pytest.mark.parametrize("kind", RULES)
def test_official_weights_come_and_go_bit_for_bit(kind):
    meta, weights, arrays = fixture(kind)
    tokenizer, _ = load(meta, weights, arrays, RULES[kind])
    images = jax.ShapeDtypeStruct((1, *tokenizer.shape), jnp.float32)
    like = jax.eval_shape(tokenizer.network.init, jax.random.key(0), images)["params"]
    ours = to_ours(RULES[kind](tokenizer), weights, like)
    back = to_official(RULES[kind](tokenizer), ours.params, ours.kept, ours.dtypes)
    assert set(back) == set(weights)
    assert all(np.array_equal(back[key], weights[key]) for key in weights)


# What the official code gave for the weights of `made_up` and these sizes; recorded once.
RECORDED = np.load(Path(__file__).with_name("official.npz"))
SIZES = dict(kind="autoencoder", hidden_channels=32, channel_multipliers=(1, 2))
KL = SIZES | dict(quantizer=dict(kind="kl", channels=4), num_res_blocks=1, attention=("encoder", "middle"))
KL |= dict(patch_size=2, latent_scale=0.2325)
MASKGIT_VQ = dict(
    kind="vq", vocab_size=32, channels=8, l2_norm=False, codebook_weight=0.25, commitment_weight=1.0
)  # the weights are the other way round in its code
MASKGIT = SIZES | dict(quantizer=MASKGIT_VQ, style="maskgit", attention=(), quant_kernel_size=0, image_range=(0, 1))


def made_up(tokenizer, rules):
    """Weights that depend on the official names and shapes only, as our parameters."""
    like = jax.eval_shape(tokenizer.init, jax.random.key(0))
    blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), like)
    weights = {}
    for key, array in to_official(rules(tokenizer), blank).items():
        noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(array.shape)
        if array.ndim > 1:
            noise = noise * np.prod(array.shape[1:]) ** -0.5
        else:
            noise = 0.1 * noise + ("norm" in key and key.endswith("weight"))
        weights[key] = noise.astype(np.float32)
    return to_ours(rules(tokenizer), weights, like).params


def built(config):
    options = {k: v for k, v in config.items() if k != "kind"}
    images = np.random.RandomState(0).uniform(-1, 1, (2, 3, 16, 16)).astype(np.float32)
    return TOKENIZERS[config["kind"]](shape=(16, 16, 3), **options), jnp.moveaxis(jnp.asarray(images), 1, -1)


def close(found, name):
    """1e-4: sums of a few hundred float32 products through a dozen layers; measured differences are below 1e-5."""
    np.testing.assert_allclose(found, RECORDED[name], rtol=0, atol=1e-4)


def test_mars_autoencoder_gives_its_official_latents_tokens_and_images():
    tokenizer, images = built(KL)
    params = made_up(tokenizer, interop.mar_kl)
    tokens, found = jax.jit(lambda p, x: (tokenizer.encode(p, x), tokenizer.reconstruct(p, x, train=False)))(
        params, images
    )
    close(tokens, "mar_kl.patches")
    close(found.z.reshape(2, 8, 8, 4).transpose(0, 3, 1, 2), "mar_kl.mean")
    close(jnp.moveaxis(found.images, -1, 1), "mar_kl.decoded")
    np.testing.assert_allclose(found.losses["kl"], RECORDED["mar_kl.kl"].mean() * 1e-6, rtol=1e-5)
    image = jax.jit(tokenizer.decode)(params, tokens)
    np.testing.assert_allclose(image, jnp.clip(found.images, -1, 1), rtol=0, atol=1e-4)


def test_maskgits_vqgan_gives_its_official_codes_and_images():
    tokenizer, images = built(MASKGIT)
    params = made_up(tokenizer, interop.maskgit_vqgan)
    found = jax.jit(functools.partial(tokenizer.reconstruct, train=False))(params, images)
    close(found.z.reshape(2, 8, 8, 8).transpose(0, 3, 1, 2), "maskgit_vqgan.z")
    np.testing.assert_array_equal(found.codes, RECORDED["maskgit_vqgan.indices"])
    np.testing.assert_allclose(sum(found.losses.values()), RECORDED["maskgit_vqgan.loss"], rtol=1e-5)
    close(jnp.moveaxis((found.images + 1) / 2, -1, 1), "maskgit_vqgan.decoded")
