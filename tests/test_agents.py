"""Agents: what they do while they act is what training reads, and with a memory they learn what needs one."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ar_jax
from ar_jax import run as runs
from ar_jax.agent_system import AgentRun, AgentSystem, agent_from_config
from ar_jax.config import UsageError, get_config
from ar_jax.environments import ENVIRONMENTS
from ar_jax.environments.cart_pole import Motion, acceleration
from ar_jax.environments.protocol import Transition
from ar_jax.objectives.actor_critic import lambda_returns
from ar_jax.training.program import make_program

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "agents"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
VARIANTS = [(name, v) for name in NAMES for v in importlib.import_module(f"configs.agents.{name}").VARIANTS]
FIRST = {row["kind"]: name for name, row in reversed(cases.MIXERS.items())}  # of several rows of a kind
QUICK = ("softmax", "linear", "agalite")


def smoke(name: str = "agalite", mixer: dict[str, Any] | None = None, **train: Any) -> Any:
    config = get_config(FOLDER / f"{name}.py:smoke")
    config.train.update(train)
    config.mesh = dict(data=1)
    if mixer is not None:
        config.model.mixer = mixer
    return config


def tiny(mixer: dict[str, Any]) -> AgentSystem:
    """An agent of two layers in a world of chance."""
    config = smoke(mixer=mixer)
    config.data.environment = dict(kind="cart_pole", max_steps=5)
    residual = "gru" if mixer["kind"] == "agalite" else "add"
    config.model.update(num_layers=2, embed_dim=16, mlp_dim=24, hidden_dim=8, residual=residual)
    system = agent_from_config(config, runs.load_data(config))
    return dataclasses.replace(system, environment=dataclasses.replace(system.environment, reset=begin, step=chance))


def begin(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros((), jnp.int32), jax.random.normal(key, (2,))


def chance(time: jax.Array, action: jax.Array, key: jax.Array) -> Transition:
    """Whatever is done, an episode ends with probability 0.3, and after five steps."""
    end_key, seen_key = jax.random.split(key)
    done = (jax.random.uniform(end_key) < 0.3) | (time >= 4)
    return Transition(time + 1, jax.random.normal(seen_key, (2,)), action.astype(jnp.float32), done, done)


def rows() -> list[Any]:
    """One row of each kind of mixer that reads no later tokens; but a few are for the long tests."""
    names = [n for n in cases.CAUSAL_MIXERS if n in FIRST.values() and ":" not in cases.MIXERS[n]["kind"]]
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("mixer", rows())
def test_what_is_read_at_once_is_what_was_told_step_by_step(mixer: str) -> None:
    """Memories are put back to their start in the middle of rollouts, those of the agents at different times."""
    system = tiny(cases.MIXERS[mixer])
    params = cases.away_from_zero(jax.eval_shape(system.init, jax.random.key(0)))

    @jax.jit
    def both(params: Any) -> Any:
        told = system.rollouts(params, jnp.arange(3), jax.random.key(1), 14)
        alone = jnp.broadcast_to(jnp.arange(15)[None], told.time.shape)  # as if each observation were an episode
        forgotten = told.replace(episode=alone, time=jnp.zeros_like(alone))
        return told, system.read(params, told)[0], system.read(params, forgotten)[0]

    told, *logits = both(params)
    assert len(np.unique(told.done.sum(axis=1))) > 1 and told.time.max() == 4
    np.testing.assert_array_equal(told.episode[:, 1:], told.done.cumsum(axis=1))
    read, forgotten = (log_prob(a[:, :-1], told.actions) for a in logits)
    np.testing.assert_allclose(told.log_probs, read, atol=1e-4)  # float32, two layers of sums of terms of order one
    assert np.abs(read - forgotten).max() > 1e-3


def log_prob(logits: jax.Array, actions: jax.Array) -> np.ndarray:
    return np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(actions)[..., None], axis=-1)[..., 0]


def walk(environment: Any, actions: list[int], seed: int = 0) -> list[Any]:
    """The first observation, then what follows from each action."""
    key = jax.random.key(seed)
    state, observation = environment.reset(key)
    told: list[Any] = [observation]
    step = jax.jit(environment.step)
    for number, action in enumerate(actions):
        told.append(step(state, jnp.asarray(action), jax.random.fold_in(key, number)))
        state = told[-1].state
    return told


@pytest.mark.parametrize("seed", [0, 1])
def test_a_maze_shows_its_cue_once_and_rewards_the_turn_that_it_tells(seed: int) -> None:
    up, down, left, right = range(4)
    maze = ENVIRONMENTS["t_maze"](corridor_length=5, num_distractors=3, max_steps=20)
    first = np.asarray(walk(maze, [], seed)[0])
    cue = down if first[0] else up
    assert first.shape == (2 + 8 + 3,) and first[:2].sum() == 1 and not first[2:].any()
    ahead = [left, up, right, right, left, right, right, right, right, left]  # more often than the corridor is long
    for turn, reward in ((cue, 4.0), (1 - cue, -1.0)):
        way = walk(maze, [*ahead, turn], seed)[1:]
        assert [int(t.state.cell) for t in way] == [0, 0, 1, 2, 1, 2, 3, 4, 4, 4, 4]
        np.testing.assert_allclose([t.reward for t in way], [-0.1] * 10 + [reward])
        assert [bool(t.done) for t in way] == [False] * 10 + [True] and bool(way[-1].success) == (reward > 0)
        seen = np.stack([t.observation for t in way])
        assert not seen[:, :2].any() and np.ptp(seen[:, 10:]) == 1
        codes = {int(t.state.cell): tuple(row[2:10]) for t, row in zip(way, seen, strict=True)}
        assert len(set(codes.values())) == 5  # each cell its own, and neighbours differ in one bit
        assert all(np.abs(np.subtract(codes[cell], codes[cell + 1])).sum() == 1 for cell in range(4))
    late = walk(maze, [left] * 20, seed)
    assert [bool(t.done) for t in late[1:]] == [False] * 19 + [True] and not late[-1].success


def test_both_cues_come_up_and_a_seed_fixes_its_own() -> None:
    reset = jax.jit(jax.vmap(lambda seed: ENVIRONMENTS["t_maze"]().reset(jax.random.key(seed))[1]))
    cues = np.asarray(reset(jnp.arange(400)))[:, 0]
    assert 0.4 < cues.mean() < 0.6
    np.testing.assert_array_equal(cues[7:9], np.asarray(reset(jnp.arange(7, 9)))[:, 0])


def test_a_pushed_cart_gains_the_energy_of_the_push() -> None:
    """d/dt of the energy of cart and rod, by their positions, is force times speed: no formula of Barto's enters."""
    random = np.random.default_rng(0)
    for place, speed, force in zip(
        random.normal(size=(9, 2)), random.normal(size=(9, 2)), [10, -10, 0] * 3, strict=True
    ):

        def energy(place: jax.Array, speed: jax.Array) -> jax.Array:
            (_, angle), (along, turning) = place, speed
            rod = jnp.stack([along + 0.5 * turning * jnp.cos(angle), -0.5 * turning * jnp.sin(angle)])
            inertia = 0.1 * (2 * 0.5) ** 2 / 12  # of a rod of 0.1 kg and 1 m, about its middle
            moving = 1.0 * along**2 + 0.1 * (rod**2).sum() + inertia * turning**2
            return moving / 2 + 0.1 * 9.8 * 0.5 * jnp.cos(angle)

        motion = Motion(jnp.asarray(place, jnp.float32), jnp.asarray(speed, jnp.float32), jnp.zeros((), jnp.int32))
        changes = motion.speed, acceleration(motion, jnp.asarray(float(force)))
        gained = jax.jvp(energy, (motion.place, motion.speed), changes)[1]
        assert float(gained) == pytest.approx(force * speed[0], abs=1e-4)  # float32 of terms around 10


def test_a_pole_falls_unless_it_is_balanced_and_its_speeds_are_hidden() -> None:
    hidden, shown = (ENVIRONMENTS["cart_pole"](max_steps=60, speeds=speeds) for speeds in (False, True))
    pushed = walk(hidden, [1] * 12)
    fell = [bool(t.done) for t in pushed[1:]]
    assert fell.index(True) in range(7, 12) and not any(t.success for t in pushed[1:])
    key = jax.random.key(0)
    state, observation = shown.reset(key)
    np.testing.assert_array_equal(observation[:2], hidden.reset(key)[1])
    step = jax.jit(shown.step)
    for number in range(60):  # a hand that leans against the fall
        action = (0.1 * observation[0] + observation[1] + 0.2 * observation[2] + observation[3] > 0).astype(jnp.int32)
        state, observation, reward, done, success = step(state, action, key)
        assert reward == 1 and bool(done) == bool(success) == (number == 59)


def test_returns_are_those_of_their_definition_and_stop_where_an_episode_ends() -> None:
    random, (batch, length, discount) = np.random.default_rng(0), (2, 7, 0.9)
    rewards, values = random.normal(size=(2, batch, length)).astype(np.float32)
    goes_on = (random.uniform(size=(batch, length)) < 0.7).astype(np.float32)
    assert 0 < goes_on.mean() < 1
    for decay in (0.0, 0.6, 1.0):
        expected, later = np.zeros_like(rewards), values[:, -1]
        for t in reversed(range(length)):
            later = rewards[:, t] + discount * goes_on[:, t] * ((1 - decay) * values[:, t] + decay * later)
            expected[:, t] = later
        found = jax.jit(lambda r, d, v, decay=decay: lambda_returns(r, d, v, decay))(
            rewards, discount * goes_on, values
        )
        np.testing.assert_allclose(found, expected, atol=1e-5)  # float32, sums of a few terms


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_variant_builds_and_can_be_trained(name: str, variant: str) -> None:
    config = get_config(FOLDER / f"{name}.py:{variant}")
    system = agent_from_config(config, runs.load_data(config))
    params = make_program(system, config).shapes.params
    batch = {"seed": jax.ShapeDtypeStruct((2,), jnp.int32)}
    loss, metrics, replaced = jax.eval_shape(system.loss, params, batch, jax.random.key(0), jnp.float32(0))
    assert loss.shape == () and not replaced and {"mean_return", "success_rate", "entropy_nats"} <= set(metrics)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_a_base_and_a_smoke_variant(name: str) -> None:
    assert {"base", "smoke"} <= {v for n, v in VARIANTS if n == name}
    with pytest.raises(UsageError, match="Did you mean 'smoke'"):
        get_config(FOLDER / f"{name}.py:smoky")


def short(mixer: dict[str, Any] | None = None, **train: Any) -> Any:
    """The smoke variant in a corridor that is walked in three steps."""
    config = smoke(mixer=mixer, **dict(num_steps=100, log_every_steps=50) | train)
    config.data.environment.update(corridor_length=4, max_steps=16)
    config.objective.rollout_length, config.optimizer.learning_rate = 24, 4e-3
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    workdir = tmp_path_factory.mktemp("runs") / "agalite"
    return workdir, ar_jax.train(short(), workdir)


def test_a_memory_learns_by_reward_what_the_cue_means(trained: Any) -> None:
    """Without memory half of the turns are right; the best return is 4 for the turn less 0.1 for each of three steps."""
    workdir, run = trained
    metrics = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["eval/success_rate"] > 0.9 and metrics["eval/greedy_success_rate"] > 0.9
    assert metrics["eval/greedy_mean_return"] > 3.3 and metrics["success_rate"] > 0.9
    assert metrics["steps_per_second"] == pytest.approx(24 * metrics["examples_per_second"])


def test_a_loaded_agent_plays_as_the_trained_one(trained: Any) -> None:
    workdir, run = trained
    seeds, loaded = np.arange(40), ar_jax.load(workdir)
    played = run.play(seeds)
    assert loaded.step == 100 and {a.shape for a in played.values()} == {(40,)}
    jax.tree.map(np.testing.assert_array_equal, loaded.play(seeds), played)
    assert not np.array_equal(run.play(seeds, seed=1)["return"], played["return"])
    expected = np.where(played["success"], 4.0, -1.0) - 0.1 * (played["length"] - 1)
    ended = played["length"] < 16
    np.testing.assert_allclose(played["return"][ended], expected[ended], atol=1e-5)  # float32, sixteen terms
    for bad in ([], [0.5], [[1, 2]]):
        with pytest.raises(UsageError, match="seeds must be whole numbers in one dimension"):
            run.play(bad)


def test_evaluation_reports_held_out_episodes(trained: Any) -> None:
    workdir, run = trained
    metrics = runs.evaluate(run, workdir)
    kinds = {f"{prefix}{name}" for prefix in ("", "greedy_") for name in ("mean_return", "mean_length", "success_rate")}
    assert set(metrics) == {"step", "steps_per_second"} | kinds
    assert metrics == json.loads((workdir / "eval" / "metrics.json").read_text())
    played = run.play(np.arange(256), greedy=True)  # the first seeds are held out
    assert metrics["greedy_mean_length"] == played["length"].mean()
    assert metrics["greedy_success_rate"] == played["success"].mean()


@pytest.mark.slow
def test_without_memory_half_of_the_turns_are_wrong() -> None:
    run = ar_jax.train(short(dict(kind="convolution", width=1), num_steps=200))
    assert abs(run.play(np.arange(256), greedy=True)["success"].mean() - 0.5) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["agalite", "softmax"])
def test_a_memory_spans_the_smoke_variants_corridor(mixer: str) -> None:
    run = ar_jax.train(smoke(mixer=None if mixer == "agalite" else dict(kind=mixer, num_heads=2, head_dim=16)))
    played = run.play(np.arange(256), greedy=True)
    assert played["success"].mean() > 0.95 and played["length"].mean() < 10


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
def test_devices_share_the_agents_of_a_step() -> None:
    losses = []
    for devices in (1, 4):
        config = short(batch_size=8)
        config.mesh = dict(data=devices)
        program = make_program(agent_from_config(config, runs.load_data(config)), config)
        batch = program.put({"seed": np.arange(8, dtype=np.int32)})
        losses.append(float(program.compile(batch)(program.init(), batch)[1]["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": dict(kind="pixels")}, "config.tokenizer is not a known key"),
        ({"data": dict(kind="digits")}, "trains agents, but the data is image; set config.data.kind='episodes'"),
        ({"objective": dict(kind="next_token")}, "'episodes' is for agents; set config.objective.kind='actor_critic'"),
        ({"data.environment": dict(kind="t_mase")}, "Did you mean 't_maze'"),
        ({"data.environment": dict(kind="t_maze", corridor_length=1)}, "corridor_length=1 must be at least 2"),
        ({"data.environment": dict(kind="t_maze", max_steps=9)}, "max_steps=9 must be at least 10"),
        ({"data.environment": dict(kind="cart_pole", max_steps=0)}, "max_steps=0 must be at least 1"),
        ({"data.num_test": 0}, "num_test=0 must be at least 1"),
        ({"objective.discount": 1.5}, r"discount=1.5 must lie in \[0, 1\]"),
        ({"objective.rollout_length": 0}, "rollout_length=0 must be at least 1"),
        ({"objective.entropy_weight": -1.0}, "entropy_weight=-1.0 must be at least 0"),
        ({"model.dropout_rate": 0.1}, "dropout_rate=0.1 has no meaning for an agent"),
        ({"model.adaln": "block", "model.residual": "add"}, "adaln='block' has no meaning for an agent"),
        ({"model.hidden_dim": 0}, "hidden_dim=0 must be at least 1"),
        ({"model.kind": "decoder"}, "config.model.kind is not a known key"),
        ({"model.mixer": dict(kind="fnet", causal=False)}, "FNet reads later tokens, too"),
        ({"model.mixer.one_clock": True}, "one_clock lets time go on between episodes"),
        ({"eval.samples": dict(num_samples=2)}, "An agent draws no samples"),
    ],
    ids=str,
)
def test_configs_that_make_no_sense_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = smoke()
    for path, value in changes.items():
        *sections, key = path.split(".")
        place = config
        for section in sections:
            place = place[section]
        place[key] = value
    with pytest.raises(UsageError, match=words):
        if "samples" in words:
            runs.evaluate(AgentRun(agent_from_config(config, runs.load_data(config)), None, config), tmp_path)
        ar_jax.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
