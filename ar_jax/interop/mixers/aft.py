"""Official runs of the attention free transformer (a community's code; the paper's authors published none)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ar_jax.interop.kinds import Arrays, Meta
from ar_jax.interop.mixers.sequences import Outputs, params_of, tokens_of, whole
from ar_jax.interop.rules import linear, same
from ar_jax.mixers import MIXERS

NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "project": "out"}
VARIANTS = {"AFTFull": "full", "AFTLocal": "local", "AFTSimple": "simple"}


def _near(matrix: np.ndarray, window: int, taps: int, causal: bool) -> np.ndarray:
    """The diagonals of biases [rows, rows] within the window, in so many places each way, the latest token's first."""
    rows, ahead = len(matrix), 0 if causal else taps - 1
    at = np.arange(rows)[:, None] + np.arange(ahead, -taps, -1)[None]
    inside = (at >= 0) & (at < rows) & (np.abs(at - np.arange(rows)[:, None]) < window)
    return np.where(inside, np.take_along_axis(matrix, np.clip(at, 0, rows - 1), axis=1), 0)


def _mixed(config: Mapping[str, Any], variant: str, causal: bool, weights: Arrays, x: np.ndarray) -> Any:
    window = max(config["s"], 2)  # a window of the token itself is one of two with a bias of 0
    mixer = MIXERS["aft"](
        embed_dim=config["dim"], num_rows=config["max_seqlen"], variant=variant, causal=causal,
        hidden_dim=config["hidden_dim"], window=window, use_bias=True,
    )  # fmt: skip
    rules: list[Any] = [linear(there, ours) for there, ours in NAMES.items()]
    if variant != "simple":
        rules.append(same("wbias", "bias"))
    if variant == "local":
        weights = {**weights, "wbias": _near(weights["wbias"], config["s"], window, causal)}
    return whole(mixer, params_of(mixer, rules, weights, x, tokens_of(x.shape[1])), x)


def replay(meta: Meta, weights: Arrays, inputs: Arrays) -> Outputs:
    """Reading all tokens, and the earlier ones only."""
    variant = VARIANTS[meta["class"].rpartition(".")[2].partition("(")[0].strip()]
    forms = {"out.y": False, "out.y_causal": True}
    return {
        name: _mixed(meta["config"], variant, causal, weights, inputs["in.x"])
        for name, causal in forms.items()
        if name in meta["outputs"]
    }
