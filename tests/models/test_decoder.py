"""What the decoder adds to its mixers: precision, rematerialisation, conditioning, patterns, one program for any depth."""

from __future__ import annotations

from typing import Any

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.analysis.flops import flops
from ar_jax.config import UsageError
from ar_jax.mixers.protocol import Tokens
from ar_jax.models.decoder import layers_apart, mixer_pattern
from ar_jax.models.generator import Context
from ar_jax.system import System
from ar_jax.training.paths import named_leaves, with_leaves


def hidden(system: System, params: Any, context: Any = None, values: jax.Array | None = None) -> jax.Array:
    """The parallel form's hidden vectors."""
    values = cases.tokens(system, 2) if values is None else values
    context = system.model.context(None, 2, jnp.asarray([0, 1])) if context is None else context
    return jax.jit(lambda p: system.model.read(p, values, context, system.model.feed.parallel())[0])(params)


def loss(system: System, params: Any) -> jax.Array:
    """Of a fixed batch of images."""
    shape = system.facts.shape
    batch = {"image": jnp.linspace(-1, 1, 2 * int(np.prod(shape))).reshape(2, *shape), "label": jnp.asarray([0, 2])}
    return system.loss(params, batch, jax.random.key(0), jnp.float32(0))[0]


@pytest.mark.parametrize("mixer", ["softmax grouped, normed, biased", "linear, learned decay", "convolution"])
def test_bfloat16_computes_what_float32_computes(mixer: str) -> None:
    single, half = cases.tiny(mixer), cases.tiny(mixer, model__dtype="bfloat16")
    params = cases.tiny_params(single)
    expected, found = hidden(single, params), hidden(half, params)
    assert found.dtype == jnp.bfloat16 and jax.tree.leaves(params)[0].dtype == jnp.float32
    # bfloat16 keeps 8 bits: 2^-8 relative for each of some ten roundings, on outputs of order one
    chex.assert_trees_all_close(found.astype(jnp.float32), expected, atol=0.12)


def test_rematerialisation_changes_no_gradient() -> None:
    systems = {name: cases.tiny(model__remat=name) for name in ("none", "full", "dots_with_no_batch_dims", "dots")}
    params = cases.tiny_params(systems["none"])
    gradients = [jax.jit(jax.grad(lambda p, n=n: loss(systems[n], p)))(params) for n in ("none", "full")]
    chex.assert_trees_all_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    work = {name: flops(jax.grad(lambda p, s=s: loss(s, p)), params) for name, s in systems.items()}
    assert work["full"] > work["dots_with_no_batch_dims"] > work["dots"] > work["none"]


def test_layers_apart_are_the_same_layers() -> None:
    system = cases.tiny(model__num_layers=11)  # more than ten: their names would not be sorted by number
    params = cases.tiny_params(system)
    apart = params | {"generator": layers_apart(params["generator"])}
    assert len(named_leaves(apart)) > 2 * len(named_leaves(params))
    chex.assert_trees_all_close(hidden(system, apart), hidden(system, params), atol=1e-5)


def test_a_deeper_decoder_is_the_same_program() -> None:
    """The layers are one scan: the jaxpr does not grow with the depth."""
    sizes = []
    for depth in (2, 8):
        system = cases.tiny(model__num_layers=depth)
        shapes = jax.eval_shape(system.init, jax.random.key(0))
        sizes.append(len(str(jax.make_jaxpr(lambda p, s=system: loss(s, p))(shapes)).splitlines()))
    assert sizes[1] == sizes[0]


def test_adaln_blocks_start_as_the_identity_and_then_listen_to_the_condition() -> None:
    system = cases.tiny(model__adaln="block")
    fresh, trained = jax.jit(system.init)(jax.random.key(0)), cases.tiny_params(system)
    contexts = [system.model.context(None, 2, jnp.full(2, label)) for label in (0, 1)]
    embedded = fresh["generator"]["decoder"]["stack"]["layers"]["block_0"]["modulation"]["project"]
    assert not np.asarray(embedded["kernel"]).any()
    apart = [float(jnp.abs(jnp.subtract(*[hidden(system, p, c) for c in contexts])).max()) for p in (fresh, trained)]
    assert apart[1] > 0.1
    # Zero gates: a token other than the prefix is its own embedding, normalised, whatever the class.
    assert float(jnp.abs(jnp.subtract(*[hidden(system, fresh, c)[:, 1:] for c in contexts])).max()) == 0.0


def test_a_dropped_condition_is_no_condition() -> None:
    system = cases.tiny()
    params = cases.tiny_params(system)
    dropped = [
        hidden(system, params, Context(system.model.order.slots(None, 2), condition, jnp.ones(2, bool)))
        for condition in (jnp.asarray([0, 1]), None)
    ]
    chex.assert_trees_all_close(*dropped)
    assert float(jnp.abs(dropped[0] - hidden(system, params)).max()) > 0.01


def test_embeddings_stand_in_front_as_so_many_tokens() -> None:
    system = cases.tiny(condition__kind="embedding", condition__num_tokens=3, condition__channels=5)
    params = cases.tiny_params(system)
    text = jax.random.normal(jax.random.key(3), (2, 3, 5))
    one = hidden(system, params, system.model.context(None, 2, text))
    other = hidden(system, params, system.model.context(None, 2, text.at[:, 0].add(1.0)))
    assert one.shape[1] == system.model.order.length + 2
    assert (jnp.abs(one - other).max(axis=(0, 2)) > 1e-4).all()  # even the first token of the text is read by all


def test_dropout_is_drawn_anew_by_key_and_keeps_the_mean() -> None:
    system = cases.tiny(model__dropout_rate=0.5)
    params = cases.tiny_params(system)
    values, context = cases.tokens(system, 2), system.model.context(None, 2, jnp.asarray([0, 1]))
    chunk = system.model.feed.parallel()
    read = jax.jit(lambda key: system.model.read(params, values, context, chunk, dropout_key=key)[0])
    first, again, other = read(jax.random.key(0)), read(jax.random.key(0)), read(jax.random.key(1))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize(
    ("kind", "layers"),
    [("softmax", 1), ("3 linear : 1 softmax", 4), ("linear:softmax", 2), ("2 convolution : softmax : linear", 4)],
)
def test_a_pattern_names_the_mixers_of_its_layers(kind: str, layers: int) -> None:
    makers = mixer_pattern({"kind": kind}, embed_dim=8)
    assert len(makers) == layers
    told = [count_kind.split() for count_kind in kind.split(":")]
    expected = [name[-1] for name in told for _ in range(int(name[0]) if len(name) > 1 else 1)]
    assert [type(make()).__name__.lower() for make in makers] == expected


@pytest.mark.parametrize("kind", ["", "3", "softmax :", "softmax, linear", "two linear"])
def test_a_pattern_that_cannot_be_read_is_refused(kind: str) -> None:
    with pytest.raises(UsageError, match="mixer"):
        mixer_pattern({"kind": kind}, embed_dim=8)


def test_layers_take_turns_with_the_projections_of_the_condition_that_they_share() -> None:
    name, layer = "decoder, no MLPs, grouped adaLN", "generator/decoder/stack/layers/block_0/"
    shared, alone = cases.tiny(backbone=name), cases.tiny(backbone=name, model__adaln="block", model__adaln_groups=1)
    params = named_leaves(cases.tiny_params(shared))
    kernel, bias = (params[f"generator/decoder/shared_modulation/project/{n}"] for n in ("kernel", "bias"))
    turns = jnp.asarray([0, 1, 0])  # three layers, two projections
    own = {
        f"{layer}modulation/project/kernel": jnp.moveaxis(kernel.reshape(16, 2, 48), 1, 0)[turns],
        f"{layer}modulation/project/bias": bias.reshape(2, 48)[turns] + params[f"{layer}modulation_bias"],
    }
    like = cases.tiny_params(alone)
    assert not any("mlp" in leaf for leaf in named_leaves(like))
    same = with_leaves(like, {leaf: (params | own)[leaf] for leaf in named_leaves(like)})
    # float32: the bias is added before or behind
    chex.assert_trees_all_close(hidden(shared, cases.tiny_params(shared)), hidden(alone, same), atol=1e-5)


def test_a_tied_head_reads_with_the_table_that_embeds() -> None:
    system = cases.tiny(head__tied=True)
    params = cases.tiny_params(system)
    leaves = named_leaves(params)
    table, bias = leaves["generator/head/table/embedding"], leaves["generator/head/bias"]
    assert not any(name.startswith(("generator/value_embed", "generator/head/logits")) for name in leaves)
    found = hidden(system, params)
    logits = jax.jit(lambda p, h: system.model.ask(p, "__call__", h))(params, found)
    chex.assert_trees_all_close(logits, found @ table.T + bias[None, None], atol=1e-5)
    moved = hidden(system, with_leaves(params, {"generator/head/table/embedding": table + 1}))
    assert float(jnp.abs(moved - found).max()) > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model__adaln_groups=2), "adaln_groups=2 must be .* 1 unless adaln='shared'"),
        (dict(model__adaln="shared", model__mlps="last"), "adaln='shared' needs blocks that are alike"),
        (dict(model__mlps="none", model__norm_first=False), "mlps='none' needs norm_first=True"),
        (
            dict(order="next_scale", tokenizer__kind="residual_pyramid", head__tied=True),
            "config.head.tied needs tokens that are fed by their numbers",
        ),
    ],
)
def test_options_that_do_not_fit_are_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cases.tiny(**changes)


def test_attention_within_a_step_and_a_memory_across_steps_cost_the_same_behind_any_context() -> None:
    """M-VAR (arXiv:2411.10433): a scale costs what its own size says, whatever came before it."""

    decoder = cases.tiny("within and across steps", model__mlps="last").model.generator.decoder

    def costs(max_len: int) -> tuple[int, int]:
        """FLOPs of a step of 16 tokens behind so many, and bytes of the state."""
        x, step = jnp.zeros((1, 16, 16)), jnp.full((1, 16), 9)
        tokens = Tokens(step, jnp.zeros((1, 16, 3), jnp.int32), 16)
        params = jax.eval_shape(lambda: decoder.init(jax.random.key(0), x, tokens))
        state = jax.eval_shape(lambda: decoder.init_state(1, max_len, 16))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        return flops(lambda p, s: decoder.apply(p, x, tokens, state=s), params, state), size

    assert costs(32) == costs(4096)
