"""Agents with gated linear transformers for memory (AGaLiTe, S050, arXiv:2310.15719), in the paper's T-Maze."""

from typing import Any

from ml_collections import ConfigDict

from ar_jax.config import choose_variant

# The published network and training are those of config/tmaze/arelit.yaml of the official code.
SIZES: dict[str, dict[str, Any]] = {
    "base": dict(num_layers=4, embed_dim=128, mlp_dim=128, hidden_dim=128, head_dim=64, num_heads=4),
    "smoke": dict(num_layers=1, embed_dim=32, mlp_dim=32, hidden_dim=32, head_dim=8, num_heads=2),
}
ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "base": dict(kind="t_maze", corridor_length=180, num_distractors=6, max_steps=1000),
    "smoke": dict(kind="t_maze", corridor_length=8, num_distractors=6, max_steps=60),
}
VARIANTS = SIZES


def get_config(variant: str = "base") -> ConfigDict:
    """The T-Maze of 180 places, 5 million steps; "smoke": one of 8 places, a network of one block, 576,000 steps.

    Published is PPO by the official code; here each rollout is used once (A2C with generalised advantages).
    """
    size = dict(choose_variant(VARIANTS, variant))
    published = variant == "base"
    config = ConfigDict()
    config.seed = 0
    config.data = dict(kind="episodes", environment=ENVIRONMENTS[variant])
    mixer = dict(kind="agalite", expansion=4, num_waves=2, **{k: size.pop(k) for k in ("head_dim", "num_heads")})
    block = dict(norm="layer", residual="gru", activation="relu", gated=False, mlp_bias=True)
    config.model = block | size | dict(mixer=mixer)
    config.objective = dict(
        kind="actor_critic",
        rollout_length=1000 if published else 60,
        discount=0.99,
        trace_decay=0.95,
        value_weight=0.5,
        entropy_weight=0.001 if published else 0.01,
    )
    config.optimizer = dict(kind="adamw", learning_rate=1e-4 if published else 2e-3, weight_decay=0.0, clip_norm=0.5)
    config.schedule = dict(kind="constant")
    config.train = dict(num_steps=625 if published else 300, batch_size=8 if published else 32, log_every_steps=20)
    config.checkpoint = dict(every_steps=500)
    config.eval = dict(batch_size=64, every_steps=0)
    config.mesh = dict(data=-1)
    return config
