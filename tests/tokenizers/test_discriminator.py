import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.tokenizers.discriminator import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, PatchDiscriminator

REAL, MADE = jnp.asarray([[2.0, 0.5]]), jnp.asarray([[-3.0, 1.0]])


def test_each_logit_sees_a_patch_of_the_published_size():
    """Three layers: 70 pixels a side for strides 2, 2, 2, 1, 1 of 4x4 convolutions. Norms are left out, as they see all."""
    network = PatchDiscriminator(hidden_channels=4, num_layers=3, norm="none")
    images = jnp.zeros((1, 112, 112, 1))
    params = jax.jit(network.init)(jax.random.key(0), images)
    logits = jax.eval_shape(network.apply, params, images)
    assert logits.shape == (1, 12, 12)
    params = jax.tree.map(jnp.ones_like, params)
    pull = jax.jit(jax.grad(lambda x: network.apply(params, x)[0, 6, 6]))(images)
    assert [int(np.ptp(np.nonzero(pull[0, :, :, 0])[axis])) + 1 for axis in (0, 1)] == [70, 70]


@pytest.mark.parametrize("norm", ["group", "none"])
def test_an_answer_does_not_depend_on_the_rest_of_the_batch(norm):
    network = PatchDiscriminator(hidden_channels=4, num_layers=1, norm=norm)
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    params = jax.jit(network.init)(jax.random.key(0), images)
    whole, one = jax.jit(network.apply)(params, images), jax.jit(network.apply)(params, images[:1])
    np.testing.assert_allclose(whole[:1], one, atol=1e-6)  # float32 convolutions, batched otherwise
    assert any("GroupNorm" in str(k) or "norm" in str(k) for k in params["params"]) == (norm == "group")


def test_losses_are_those_of_the_papers():
    p_real, p_made = jax.nn.sigmoid(REAL), jax.nn.sigmoid(MADE)
    vanilla = -(jnp.log(p_real).mean() + jnp.log(1 - p_made).mean()) / 2
    assert DISCRIMINATOR_LOSSES["hinge"](REAL, MADE) == pytest.approx(((0 + 0.5) / 2 + (0 + 2) / 2) / 2)
    assert DISCRIMINATOR_LOSSES["vanilla"](REAL, MADE) == pytest.approx(float(vanilla), rel=1e-5)
    assert GENERATOR_LOSSES["linear"](MADE) == pytest.approx(1.0)
    assert GENERATOR_LOSSES["non_saturating"](MADE) == pytest.approx(float(-jnp.log(p_made).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [(dict(num_layers=3), "num_layers=3 leaves nothing of images"), (dict(num_layers=1, norm="batch"), "norm='batch'")],
)
def test_what_cannot_work_is_told(options, words):
    with pytest.raises(UsageError, match=words):
        jax.eval_shape(PatchDiscriminator(**options).init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
