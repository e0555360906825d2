"""VF prompts (S014): what the network is shown before the first token, what that costs, and where prompts come from."""

from __future__ import annotations

import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import UsageError, get_config
from ar_jax.data import pipeline
from ar_jax.data.digits import load_digits
from ar_jax.data.prompts import prompted, with_prompts
from ar_jax.data.protocol import Facts
from ar_jax.run import Run
from ar_jax.sampling.loop import walk
from ar_jax.system import System, compiled, from_config

FACTS = Facts("image", (2, 2, 1), 2, ("a", "b"))


def system(**changes: Any) -> System:
    """A decoder on 2 x 2 pixels of two levels, shown four tokens."""
    config: dict[str, Any] = {
        "tokenizer": dict(kind="pixels"),
        "order": dict(kind="raster"),
        "condition": dict(kind="prompt"),
        "model": dict(
            embed_dim=16, num_layers=2, mlp_dim=24, learned_positions=False, target_positions=False,
            mixer=dict(kind="softmax", num_heads=2, rope_base=100.0),
        ),
    }  # fmt: skip
    return from_config(config | changes, FACTS)


@functools.cache
def plain() -> System:
    """One for several tests, so that they share what is compiled."""
    return system()


def given(count: int, prompt: Any = (1, 0, 0, 1), label: int = 0) -> dict[str, jax.Array]:
    """A condition of so many examples."""
    labels = jnp.full(count, label, jnp.int32)
    return {"label": labels, "prompt": jnp.broadcast_to(jnp.asarray(prompt, jnp.int32), (count, 4))}


def nats(made: System, params: Any, values: Any, condition: Any, key: int = 0) -> jax.Array:
    """log p(values | condition), [B]."""
    told = condition if isinstance(condition, dict) else {"label": condition}
    return compiled(made.log_prob)(params, {"tokens": jnp.asarray(values, jnp.int32)} | told, jax.random.key(key))


def test_the_first_evaluation_reads_the_whole_prompt_and_an_image_takes_as_many_as_without() -> None:
    facts = Facts("image", (256, 256, 3), 256, tuple(map(str, range(1000))))
    shown, plain = (
        from_config(get_config(f"configs/{name}"), facts) for name in ("vf_prompt.py:b", "llamagen.py:b_256")
    )
    sizes = [len(chunk) for chunk in shown.model.feed.chunks]
    assert len(sizes) == 256 and sizes[0] == 1 + 256 and set(sizes[1:]) == {1}
    counts = [
        sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(made.model.init, jax.random.key(0))))
        for made in (shown, plain)
    ]
    assert counts[0] - counts[1] == 768  # the vector that tells a prompt's tokens from the image's


def test_a_prompt_is_read_in_raster_order_as_an_image_is_and_all_tokens_know_it() -> None:
    made = plain()
    params, every = cases.tiny_params(made), (np.arange(16)[:, None] >> np.arange(4)) & 1
    found = nats(made, params, every, given(16))
    np.testing.assert_allclose(np.exp(found).sum(), 1.0, rtol=1e-5)  # whatever is shown
    for place in range(4):
        other = np.asarray([1, 0, 0, 1])
        other[place] = 1 - other[place]
        assert jnp.abs(nats(made, params, every, given(16, other)) - found).min() > 1e-5
    swapped = nats(made, params, every, given(16, (0, 1, 0, 1)))  # the same tokens at other places
    assert jnp.abs(swapped - found).max() > 1e-3


def test_what_is_drawn_step_by_step_is_what_the_whole_sequence_says() -> None:
    made = plain()
    model, params = made.model, cases.tiny_params(made)
    values, context = cases.tokens(made, 2), model.context(jax.random.key(0), 2, given(2))

    def one_step(carry: Any, step: Any, chunk: Any) -> Any:
        state, out = carry
        hidden, state = model.read(params, values, context, chunk, state)
        return state, out.at[:, chunk.answers].set(chunk.pick(hidden))

    @jax.jit
    def outputs() -> tuple[jax.Array, jax.Array]:
        chunk = model.feed.parallel()
        whole = chunk.pick(model.read(params, values, context, chunk)[0])
        start = model.generator.decoder.init_state(2, model.feed.max_len, model.feed.max_step_len)
        return whole, walk(model.feed, one_step, (start, jnp.zeros_like(whole)))[1]

    np.testing.assert_allclose(*outputs(), atol=1e-5)  # float32, two layers


def test_a_prompt_that_is_not_given_is_drawn_evenly_by_the_key() -> None:
    made = plain()
    model, params, label = made.model, cases.tiny_params(made), jnp.zeros(600, jnp.int32)
    drawn = model.context(jax.random.key(3), 600, label).condition["prompt"]
    assert drawn.shape == (600, 4) and abs(float(drawn.mean()) - 0.5) < 0.05  # five standard errors of 2400 coins
    image = np.zeros((1, 4))
    assert nats(made, params, image, label[:1], 1) != nats(made, params, image, label[:1], 2)
    assert nats(made, params, image, label[:1], 1) == nats(made, params, image, label[:1], 1)


def test_samples_are_drawn_behind_the_prompt_that_is_given() -> None:
    """2000 samples behind one prompt are as often as the likelihood behind it says, and not as behind another."""
    made = plain()
    params, every = cases.tiny_params(made), (np.arange(16)[:, None] >> np.arange(4)) & 1
    run, count = Run(made, params, {}), 2000
    drawn = run.sample_tokens(labels={"label": np.ones(count, int), "prompt": np.ones((count, 4), int)})
    found = np.bincount((drawn << np.arange(4)).sum(axis=1), minlength=16) / count
    own, other = (np.asarray(jnp.exp(nats(made, params, every, given(16, (p,) * 4, 1)))) for p in (1, 0))
    assert np.abs(found - own).sum() < 0.12 < 0.3 < np.abs(own - other).sum()  # 0.07 of a sample of itself
    for wrong in (np.zeros((count, 3), int), np.full((count, 4), 2), np.zeros((count, 4))):
        with pytest.raises(UsageError, match="prompts have shape .* takes tokens below 2"):
            run.sample_tokens(labels={"label": np.zeros(count, int), "prompt": wrong})


def test_prompts_are_other_examples_of_the_class_drawn_anew_in_every_epoch() -> None:
    data = with_prompts(load_digits())
    batches = pipeline.train_iterator(data, 64, seed=0)
    labels = {image.tobytes(): int(label) for image, label in zip(*_all(data.train.source), strict=True)}
    seen: dict[bytes, set[bytes]] = {}
    for _ in range(60):  # between two and three epochs
        batch = next(batches)
        for image, label, prompt in zip(batch["image"], batch["label"], batch["prompt"], strict=True):
            assert labels[prompt.tobytes()] == label
            seen.setdefault(image.tobytes(), set()).add(prompt.tobytes())
    assert np.mean([len(prompts) > 1 for prompts in seen.values()]) > 0.9
    halves = [pipeline.train_iterator(data, 64, 0, rows) for rows in np.split(np.arange(64), 2)]
    whole = next(pipeline.train_iterator(data, 64, 0))["prompt"]
    np.testing.assert_array_equal(np.concatenate([next(half)["prompt"] for half in halves]), whole)


def _all(source: Any) -> tuple[np.ndarray, np.ndarray]:
    batch = source.take(np.arange(len(source)))
    return batch["image"], batch["label"]


def test_every_other_example_of_a_class_may_be_the_prompt_but_not_the_example_itself() -> None:
    class Numbered:
        """Five examples of two classes and one that is alone in its own."""

        label = np.asarray([1, 0, 1, 2, 1, 0])

        def __len__(self) -> int:
            return 6

        def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            return {"label": self.label[indices], "tokens": indices[:, None]}

    source: Any = prompted(Numbered())  # type: ignore[arg-type]
    uniform = (np.arange(100) + 0.5) / 100
    found = {i: set(source.take_drawn(np.full(100, i), uniform)["prompt"][:, 0].tolist()) for i in range(6)}
    assert found == {0: {2, 4}, 1: {5}, 2: {0, 4}, 3: {3}, 4: {0, 2}, 5: {1}}
    np.testing.assert_array_equal(source.take(np.arange(6))["prompt"], source.take(np.arange(6))["prompt"])


def test_a_training_step_is_shown_the_prompts_of_its_batch() -> None:
    """Images are prompts by way of the tokenizer; the loss is of the image's tokens alone, behind the prompt."""
    made = plain()
    params = cases.tiny_params(made)
    images = jnp.asarray([[-1, 1, 1, -1], [1, 1, -1, -1]], jnp.float32).reshape(2, 2, 2, 1)
    batch = {"image": images, "label": jnp.zeros(2, jnp.int32), "prompt": images[::-1]}
    told = made.condition_of(params, batch)
    np.testing.assert_array_equal(told["prompt"], [[1, 1, 0, 0], [0, 1, 1, 0]])
    found = compiled(made.log_prob)(params, batch, jax.random.key(0))
    np.testing.assert_allclose(found[0], nats(made, params, [[0, 1, 1, 0]], given(1, (1, 1, 0, 0)))[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tokenizer=dict(kind="patches", patch_size=1)), "is of discrete tokens"),
        (
            dict(order=dict(kind="next_scale"), tokenizer=dict(kind="residual_pyramid", sides=(1, 2))),
            "fed by their numbers",
        ),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        system(**changes)


def test_a_data_set_without_classes_has_no_prompts() -> None:
    data = load_digits()
    with pytest.raises(UsageError, match="has no classes"):
        with_prompts(type(data)(data.modality, data.shape, data.levels, (), train=data.train, test=data.test))
