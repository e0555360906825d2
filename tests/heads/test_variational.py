"""The variational state-space model: drawn at once or one by one, gone on from a prefix, trained by a bound."""

from __future__ import annotations

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from ar_jax.config import UsageError
from ar_jax.heads.noise import Drawn, Recorded
from ar_jax.heads.protocol import Sampling
from ar_jax.heads.variational import Variational
from ar_jax.run import Run

BATCH, LENGTH, DIM, VOCAB = 2, 11, 8, 5
HEADS = {
    "normal": Variational(DIM, VOCAB, length=LENGTH, latent_dim=3, num_layers=2, mixer={"kind": "gss", "state_dim": 3}),
    "classes": Variational(
        DIM,
        VOCAB,
        length=LENGTH,
        latent_dim=2,
        num_classes=4,
        num_layers=1,
        mixer={"kind": "mamba"},
        learned_prior=True,
    ),
}


@functools.cache
def params_of(name: str) -> Any:
    """Parameters of order one, so that latents matter."""
    init = functools.partial(HEADS[name].init, method="loss")
    fed = jnp.zeros((1, LENGTH, DIM)), jnp.zeros((1, LENGTH), jnp.int32)
    shapes = jax.eval_shape(init, jax.random.key(0), *fed, jax.random.key(0))
    rng = np.random.default_rng(1)

    def drawn(path: Any, leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        values = (2.0 if "latent" in name or "posterior" in name else 0.5) * rng.normal(size=leaf.shape)
        return np.float32(values - 3 if "poles" in name else values)  # what was read fades slowly

    return jax.tree_util.tree_map_with_path(drawn, shapes)


def hidden() -> jax.Array:
    return jax.random.normal(jax.random.key(2), (BATCH, LENGTH, DIM))


def noise() -> dict[str, dict[str, np.ndarray]]:
    """What each head draws from, [B, T, ...]."""
    rng = np.random.default_rng(3)
    latents = {"normal": rng.normal(size=(BATCH, LENGTH, 3)), "classes": rng.uniform(size=(BATCH, LENGTH, 2, 4))}
    token = rng.uniform(size=(BATCH, LENGTH, VOCAB))
    return {name: {"latent": np.float32(a), "token": np.float32(token)} for name, a in latents.items()}


def at_once(name: str, **given: Any) -> jax.Array:
    head, source = HEADS[name], Recorded(noise()[name])
    return head.apply(params_of(name), hidden(), source, Sampling(), method="sample", **given)


def one_by_one(name: str, state: Any, first: int) -> tuple[Any, jax.Array]:
    """The state behind the tokens from the first on, each drawn behind those before it, and these tokens."""
    head, params = HEADS[name], params_of(name)
    source = Recorded({key: np.swapaxes(a, 0, 1)[:, :, None] for key, a in noise()[name].items()})

    def step(state: Any, t: jax.Array) -> tuple[Any, jax.Array]:
        fed = jax.lax.dynamic_slice_in_dim(hidden(), t, 1, axis=1)
        drawn, state = head.apply(params, fed, source.fold_in(t), Sampling(), state, method="extend")
        return state, drawn[:, 0]

    state, drawn = jax.lax.scan(step, state, jnp.arange(first, LENGTH))
    return state, drawn.T


def loop_lengths(jaxpr: Any) -> list[int]:
    """How often each loop of a program runs; 0 where nobody knows."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("scan", "while"):
            found.append(equation.params.get("length", 0))
        for inner in jaxprs_in_params(equation.params):
            found += loop_lengths(inner)
    return found


@pytest.mark.parametrize("name", HEADS)
def test_tokens_generated_at_once_are_those_generated_one_by_one(name: str) -> None:
    whole, stepwise = jax.jit(lambda: (at_once(name), one_by_one(name, HEADS[name].init_state(BATCH), 0)[1]))()
    np.testing.assert_array_equal(whole, stepwise)
    assert len(np.unique(whole)) > 2


def test_the_parallel_program_loops_over_layers_only() -> None:
    assert loop_lengths(jax.make_jaxpr(lambda: at_once("normal"))().jaxpr) == [HEADS["normal"].num_layers]


@pytest.mark.parametrize("name", HEADS)
def test_behind_a_given_prefix_generation_goes_on_from_its_state(name: str) -> None:
    """All at once with a mask, or from the state that has read the prefix, one token after the other."""
    head, known = HEADS[name], 5
    given = jax.random.randint(jax.random.key(4), (BATCH, LENGTH), 0, VOCAB)
    mask = jnp.broadcast_to(jnp.arange(LENGTH) < known, given.shape)
    together = jax.jit(lambda given: at_once(name, given=(given, mask)))

    @jax.jit
    def resumed() -> jax.Array:
        source = Recorded({key: a[:, :known] for key, a in noise()[name].items()})
        fed = hidden()[:, :known], given[:, :known], source, head.init_state(BATCH)
        return one_by_one(name, head.apply(params_of(name), *fed, method="read"), known)[1]

    whole = together(given)
    np.testing.assert_array_equal(whole[:, :known], given[:, :known])
    np.testing.assert_array_equal(whole[:, known:], resumed())
    others = [together((given + i) % VOCAB)[:, known:] for i in range(1, VOCAB)]
    assert any((other != whole[:, known:]).any() for other in others)  # what is given matters behind it


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_is_the_mean_of_log_weights_whose_exponentials_average_to_the_likelihood(name: str) -> None:
    """w = p(x | z) p(z) / q(z), z from q: the loss is -E log w, and E w = E_p(z) p(x | z), estimated from the prior's draws."""
    head, params, length, many = HEADS[name], params_of(name), 2, 4000
    params = jax.tree.map(lambda a: np.float32(0.25) * a, params)  # so that weights do not vary much
    x, h = jnp.asarray([[1, 3]]), hidden()[:1, :length]

    def told(module: Variational, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, p = module._posterior(h, x)[0], module._prior(h)

        def log_density(z: jax.Array, beliefs: jax.Array) -> jax.Array:
            if module.num_classes:
                return (z * jax.nn.log_softmax(beliefs)).sum()
            return jax.scipy.stats.norm.logpdf(z[..., 0], beliefs[..., 0], jnp.exp(beliefs[..., 1])).sum()

        def likelihood(z: jax.Array) -> jax.Array:
            return module.observed.log_prob(module.decode(z, h)[0], x).sum()

        from_q, from_p = module._drawn(q, Drawn(key)), module._drawn(p, Drawn(key))
        log_weight = likelihood(from_q) + log_density(from_q, p) - log_density(from_q, q)
        return module.loss(h, x, key).sum(), log_weight, likelihood(from_p)

    keys = jax.random.split(jax.random.key(5), many)
    told_once = functools.partial(head.apply, params, method=told)
    losses, log_weights, log_p = (np.asarray(a, np.float64) for a in jax.jit(jax.vmap(told_once))(keys))
    assert losses.mean() == pytest.approx(-log_weights.mean(), abs=float(5 * log_weights.std() / many**0.5))
    weights, shares = np.exp(log_weights), np.exp(log_p)
    noise = 5 * (weights.var() + shares.var()) ** 0.5 / many**0.5
    assert weights.mean() == pytest.approx(shares.mean(), abs=float(noise)) and noise < 0.2 * shares.mean()
    assert losses.mean() > -np.log(shares.mean())


def test_a_run_goes_on_from_given_tokens_and_says_what_cannot_be() -> None:
    whole = {"order__kind": "blocks", "order__block": 3}
    head = {"head__kind": "variational", "head__latent_dim": 2, "head__num_layers": 1}
    system = cases.tiny(**whole, **head)
    run = Run(system, cases.tiny_params(system), {})
    mask = np.arange(9)[None] < 4
    drawn = [run.sample_tokens([0, 1, 2] * 20, given=np.full((1, 9), i), given_mask=mask) for i in range(3)]
    assert all((tokens[:, :4] == i).all() for i, tokens in enumerate(drawn))
    assert any((tokens[:, 4:] != drawn[0][:, 4:]).any() for tokens in drawn)
    with pytest.raises(UsageError, match="9 steps; set config.order.kind='blocks'"):
        cases.tiny(**head)
    deaf = {"kind": "hrrformer", "num_heads": 2}
    with pytest.raises(UsageError, match="config.head.mixer reads later tokens"):
        Variational(DIM, VOCAB, mixer=deaf).check()
    both_ways = Variational(DIM, VOCAB, causal=False)
    given = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool)
    with pytest.raises(UsageError, match="causal=False reads whole sequences"):
        both_ways.init(
            jax.random.key(0),
            jnp.zeros((1, 3, DIM)),
            Drawn(jax.random.key(0)),
            Sampling(),
            None,
            1.0,
            given,
            method="sample",
        )
