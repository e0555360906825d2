import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError, build
from ar_jax.objectives.reconstruction import Reconstruction, code_metrics
from ar_jax.tokenizers import TOKENIZERS

SHAPE = (8, 8, 1)
SIZES = dict(
    kind="autoencoder", hidden_channels=4, num_groups=2, num_res_blocks=1, channel_multipliers=(1, 1), attention=()
)
CODES = dict(kind="vq", vocab_size=16, channels=4)
SMALL = dict(hidden_channels=4, num_layers=1)
KEY = jax.random.key(3)


def make(quantizer=None, **options):
    tokenizer = build(TOKENIZERS, SIZES | dict(quantizer=CODES | (quantizer or {})), "tokenizer", shape=SHAPE)
    objective = Reconstruction(discriminator=SMALL, **options)
    params = {"tokenizer": jax.jit(tokenizer.init)(KEY)} | objective.init(KEY, SHAPE)
    return tokenizer, objective, params


def images():
    return jax.random.uniform(jax.random.key(1), (3, *SHAPE), minval=-1, maxval=1)


def test_gradients_are_those_of_the_papers_two_losses_each_for_its_own_network():
    """The tokenizer's by plain differentiation of eq. 7's sum, lambda too; the discriminator's of its own loss alone."""
    tokenizer, objective, params = make(
        l2_weight=0.5, perceptual_weight=0.1, adversarial_weight=0.3, adversarial_start=0.0
    )

    def ours(params):
        return objective(tokenizer, params, images(), KEY, jnp.float32(0.5))[:2]

    def similar(made):
        return objective.similarity(made.images, images())[0]

    def fooling(made):
        return objective._fooling(params["discriminator"], made.images)

    def published(own):
        made = lambda p: tokenizer.reconstruct(p, images(), jax.random.split(KEY)[0])  # noqa: E731
        norms = [
            jnp.linalg.norm(jax.grad(lambda p, loss=loss: loss(made(p)))(own)["decoder"]["conv_out"]["kernel"].ravel())
            for loss in (similar, fooling)
        ]
        weight = jax.lax.stop_gradient(0.3 * norms[0] / (norms[1] + 1e-6))
        out = made(own)
        return similar(out) + weight * fooling(out) + sum(out.losses.values()), weight

    def telling(discriminator):
        made = tokenizer.reconstruct(params["tokenizer"], images()).images
        return objective._telling(discriminator, images(), made)

    (loss, metrics), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    (expected, weight), own = jax.jit(jax.value_and_grad(published, has_aux=True))(params["tokenizer"])
    told, others = jax.jit(jax.value_and_grad(telling))(params["discriminator"])
    assert metrics["adversarial_weight"] == pytest.approx(float(weight), rel=1e-4)
    assert loss == pytest.approx(float(expected + told), rel=1e-5) and metrics["discriminator"] == pytest.approx(
        float(told)
    )
    chex.assert_trees_all_close(gradients["tokenizer"], own, atol=1e-5)  # float32, sums in another order
    chex.assert_trees_all_close(gradients["discriminator"], others, atol=1e-6)


def test_before_its_start_the_discriminator_is_neither_trained_nor_heard():
    tokenizer, objective, params = make(adversarial_weight=0.3, adversarial_start=0.4)
    plain = Reconstruction()

    def gradients(objective, progress):
        return jax.grad(lambda p: objective(tokenizer, p, images(), KEY, jnp.float32(progress))[0])(params)

    early, late, without = jax.jit(
        lambda: (gradients(objective, 0.39), gradients(objective, 0.4), gradients(plain, 0.0))
    )()
    chex.assert_trees_all_close(early, without, atol=1e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(early["discriminator"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(late["discriminator"]))


def test_a_codebook_of_running_means_is_replaced_and_has_no_gradient():
    tokenizer, objective, params = make(quantizer=dict(ema_decay=0.9, revive_below=0.5))
    _, metrics, replaced = jax.jit(lambda p: objective(tokenizer, p, images(), KEY, jnp.float32(0)))(params)
    assert set(replaced) == {f"tokenizer/quantizer/codebook/{leaf}" for leaf in ("embedding", "count", "sum")}
    assert not np.allclose(
        replaced["tokenizer/quantizer/codebook/count"], params["tokenizer"]["quantizer"]["codebook"]["count"]
    )
    assert "codebook" not in metrics and "discriminator" not in metrics


def test_usage_and_perplexity_count_codes():
    metrics = code_metrics(jnp.asarray([[0, 0, 1], [1, 0, 3]]), vocab_size=8)
    assert metrics["codebook_usage"] == pytest.approx(3 / 8)
    shares = np.asarray([3, 2, 1]) / 6
    assert metrics["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(l1_weight=-1.0), "l1_weight=-1.0 must be at least 0"),
        (dict(l1_weight=0.0), "compares no images"),
        (dict(discriminator_loss="hing"), "Did you mean 'hinge'"),
        (dict(generator_loss="hinge"), "config.objective.generator_loss='hinge' is unknown"),
        (dict(discriminator=dict(kind="pach")), "Did you mean 'patch'"),
        (dict(discriminator=dict(num_layer=3)), "Did you mean 'num_layers'"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        Reconstruction(**options)
