"""Every system's rules are bijections of all its weights, tokenizer included: what is exported comes back bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ar_jax.config import get_config
from ar_jax.data.protocol import Facts
from ar_jax.interop import SYSTEMS
from ar_jax.interop.rules import flatten
from ar_jax.interop.transfer import to_official, to_ours
from ar_jax.system import System, from_config
from ar_jax.training.paths import named_leaves

ROOT = Path(__file__).parents[2]
TINY = dict(hidden_channels=8, num_groups=4, num_res_blocks=1, channel_multipliers=(1, 2))
CASES = [
    ("llamagen", "b_256"),
    ("llamagen", "t2i_b"),
    ("var", "d16"),
    ("var", "d36_512"),
    ("mvar", "d16"),
    ("mvar", "d24"),
    ("mar", "b"),
    ("rar", "b"),
    ("arpg", "l"),
    ("lpd", "l"),
    ("maskgil", "b"),
    ("npp", "b"),
    ("dnd_transformer", "xxl"),
    ("dnd_transformer", "text_xxl"),
    ("par", "xl_4x"),
    ("nar", "b"),
    ("nar", "t2i_xl"),
    ("nar_video", "l"),
    ("aim", "b"),
    ("aim", "l"),
    ("maskgit", "titok_l_32"),
    ("maskgit", "titok_s_128"),
]


def small(name: str, variant: str) -> System:
    """The published variant with narrow, shallow networks on images of 8 x 8."""
    config = get_config(ROOT / f"configs/{name}.py:{variant}")
    config.model.update(embed_dim=16, num_layers=2, mlp_dim=24, dtype="float32")
    mixer, heads, ssm = config.model.mixer, dict(num_heads=2), dict(state_dim=3, head_dim=8)
    mixer.update({"aim": ssm, "mvar": dict(softmax=heads, mamba2=ssm)}.get(name, heads))
    for order in (config.order, config.sampling.get("order", {})):
        if "num_steps" in order:
            order.num_steps = 3
    if name == "lpd":
        config.objective.sizes = ((6, 10),)
    if name == "mar":
        config.model.update(decoder_dim=16, decoder_layers=2, decoder_mlp_dim=24)
        config.model.decoder_mixer.num_heads = 2
        config.head.update(depth=2, width=16)
    if name == "maskgit":
        transformer = dict(embed_dim=16, num_layers=2, num_heads=2)
        config.tokenizer.update(num_latent_tokens=4, patch_size=4, encoder=transformer, decoder=transformer)
        config.tokenizer.pixel_decoder = dict(
            num_proxies=8, proxy_channels=8, hidden_channels=32, channel_multipliers=(1, 1, 1)
        )
    elif name == "nar_video":
        config.tokenizer.grids = ((2, 3, 3),)
    else:
        config.tokenizer.update(TINY)
    if name in ("var", "mvar"):
        config.tokenizer.quantizer.update(patch_nums=(1, 2, 4))
    return from_config(config, Facts("image", (8, 8, 3), 256, tuple("abc")))


def drawn(system: System) -> Any:
    """Random parameters in numpy, each number its own."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), shapes)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_all_parameters_go_out_and_come_back_bit_for_bit(name: str, variant: str) -> None:
    system = small(name, variant)
    params, rules = drawn(system), SYSTEMS[name].rules(system)
    kept = {key: np.ones(3, np.float32) for rule in flatten(rules) if not rule.ours for key in rule.official}
    official = to_official(rules, params, kept)
    back = to_ours(rules, official, params)
    for leaf, value in named_leaves(params).items():
        np.testing.assert_array_equal(named_leaves(back.params)[leaf], value, err_msg=leaf)
    again = to_official(rules, back.params, back.kept, back.dtypes)
    assert sorted(again) == sorted(official)
    for key, value in official.items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)
