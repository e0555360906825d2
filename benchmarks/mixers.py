"""Every mixer side by side: python benchmarks/mixers.py [--only NAME ...] [--steps 200] [--seeds 3] [--out docs].

Writes mixers.md, a table, and mixers.png, cost and memory by the length of the sequence. One layer of width 64 is measured
for state, FLOPs, temporary memory and the time of a token behind a long context; a decoder of two layers is trained on bytes
of tiny_shakespeare for what it learns, its feed-forward layers cut so that all have as many parameters. What is not causal
has no token-by-token form and no such likelihood. Cycles are those of the scheduled TPU kernel (see kernels_tpu.py), where
the TPU's compiler is here; replay differences those of the official runs in $AR_JAX_FIXTURES or beside the project.

A row is kept in .cache/mixers as soon as it is measured: a run that was interrupted goes on there. --fresh measures all anew.
Times of a token are measured at the end, all mixers side by side.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from ml_collections import ConfigDict

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from ar_jax import run  # noqa: E402
from ar_jax.analysis.flops import flops  # noqa: E402
from ar_jax.config import build  # noqa: E402
from ar_jax.evaluation import report  # noqa: E402
from ar_jax.interop import replay  # noqa: E402
from ar_jax.mixers import MIXERS  # noqa: E402
from ar_jax.mixers.protocol import Tokens  # noqa: E402
from ar_jax.system import from_config  # noqa: E402
from configs.recipes import text  # noqa: E402

ROOT = Path(__file__).parents[1]
KEPT = ROOT / ".cache" / "mixers"
FIXTURES = Path(os.environ.get("AR_JAX_FIXTURES", ROOT.parent / "shared" / "fixtures")) / "mixers"
WIDTH, HEADS, LAYERS, LENGTH, BATCH = 64, 4, 2, 128, 16
CONTEXTS = (1024, 16384)
LENGTHS = (256, 512, 1024, 2048, 4096)
STATES = {"state": LENGTHS, "state at": CONTEXTS}
NUM_TOKENS = 32
STEP, LINEAR = "step_attention", "linear_attention"
RETENTION = dict(kind="linear", num_heads=HEADS, feature_map="identity", normalize=False, out_gate="silu")
# Keys of config.model.mixer; the kernel of kernels_tpu.py that does the work; how the names of its official runs begin.
Row = tuple[dict[str, Any], str | None, tuple[str, ...]]
ROWS: dict[str, Row] = {
    "softmax": (dict(kind="softmax", num_heads=HEADS), STEP, ()),
    "softmax, window 64": (dict(kind="softmax", num_heads=HEADS, window=64), STEP, ()),
    "softmax, forget gate": (dict(kind="softmax", num_heads=HEADS, forget_gate=True), STEP, ("fla_forgetting",)),
    "linear, elu": (dict(kind="linear", num_heads=HEADS), LINEAR, ("fla_linear_attn", "linear_transformer")),
    "linear, retention": (
        dict(RETENTION, decay="fixed", value_dim=32, rope_base=10000.0, out_norm="plain"),
        f"{LINEAR}, decay per head",
        ("fla_retention", "fla_lightning"),
    ),
    "linear, decay per step": (dict(RETENTION, decay="learned"), f"{LINEAR}, decay per step", ("fla_simple_gla",)),
    "linear, GLA": (
        dict(RETENTION, decay="channel", head_dim=8, value_dim=16),
        f"{LINEAR}, decay per channel",
        ("fla_gla",),
    ),
    "linear, Based": (
        dict(kind="linear", num_heads=HEADS, head_dim=8, value_dim=16, feature_map="taylor", epsilon=1e-12),
        LINEAR,
        ("fla_based",),
    ),
    "linear, FAST": (
        dict(kind="linear", num_heads=HEADS, head_dim=8, value_dim=16, feature_map="taylor", qk_norm="plain"),
        LINEAR,
        (),
    ),
    "linear, log-normal": (dict(kind="linear", num_heads=HEADS, feature_map="exp", epsilon=1e-8), LINEAR, ()),
    "hgrn": (dict(kind="hgrn"), None, ("fla_hgrn",)),
    "slots": (dict(kind="slots", num_heads=HEADS, num_slots=16), None, ("fla_gsa", "fla_abc")),
    "agalite": (dict(kind="agalite", num_heads=HEADS, expansion=4, num_waves=2), None, ("agalite",)),
    "delta": (
        dict(kind="delta", num_heads=HEADS),
        "delta_attention",
        ("fla_delta_rule", "fla_gated_delta"),
    ),
    "rwkv6": (dict(kind="rwkv6", num_heads=HEADS), f"{LINEAR}, decay per channel", ("fla_rwkv6",)),
    "rwkv7": (dict(kind="rwkv7", num_heads=HEADS), "dplr_attention", ("fla_rwkv7",)),
    "mamba": (dict(kind="mamba"), "selective_scan", ("mamba_",)),
    "mamba2": (dict(kind="mamba2", state_dim=64, head_dim=32), f"{LINEAR}, decay per step", ("mamba2",)),
    "mamba2, log-linear": (
        dict(kind="mamba2", state_dim=32, head_dim=32, num_levels=16),
        None,
        ("fla_log_linear",),
    ),
    "mesa": (dict(kind="mesa", num_heads=HEADS, num_iterations=15), None, ("fla_mesa",)),
    "ttt": (dict(kind="ttt", num_heads=HEADS, mini_batch=16), None, ("fla_ttt",)),
    "convolution": (dict(kind="convolution", width=4), None, ()),
    "aft, local": (dict(kind="aft", variant="local", window=32), None, ("aft_local",)),
    "aft, simple": (dict(kind="aft"), None, ("aft_simple",)),
    "axial": (dict(kind="axial", num_heads=HEADS), None, ("axial",)),
    "chela": (dict(kind="chela", num_heads=HEADS, z_dim=32, long_width=64), None, ()),
    "combiner": (dict(kind="combiner", num_heads=HEADS), None, ()),
    "fnet": (dict(kind="fnet", num_samples=32), None, ("fnet",)),
    "gss": (dict(kind="gss", state_dim=32), None, ("gss",)),
    "hrrformer": (dict(kind="hrrformer", num_heads=HEADS), None, ("hrrformer",)),
    "lightnet": (dict(kind="lightnet", num_heads=HEADS), LINEAR, ("lightnet",)),
    "lightweight_convolution": (
        dict(kind="lightweight_convolution", num_heads=HEADS, width=15),
        None,
        ("lightweight_conv",),
    ),
    "dynamic convolution": (
        dict(kind="lightweight_convolution", num_heads=HEADS, width=15, dynamic=True),
        None,
        ("dynamic_conv",),
    ),
    "transformer_xl": (dict(kind="transformer_xl", num_heads=HEADS), "step_attention", ()),
    "linformer": (dict(kind="linformer", num_heads=HEADS, rank=32), None, ("linformer",)),
    "loki": (dict(kind="loki", num_heads=HEADS, num_keys=64, rank=8), None, ("loki",)),
    "mega": (dict(kind="mega", z_dim=32, ema_dim=8, chunk_size=32), None, ("mega",)),
    "multiresolution": (
        dict(kind="multiresolution", num_heads=HEADS, num_blocks=64, block_size=32),
        None,
        ("mra",),
    ),
    "native_sparse": (
        dict(kind="native_sparse", num_heads=HEADS, block_size=16, num_blocks=4, window=32),
        None,
        ("fla_nsa",),
    ),
    "neighborhood": (dict(kind="neighborhood", num_heads=HEADS, kernel_size=33), None, ("natten",)),
    "routing": (
        dict(kind="routing", num_heads=HEADS, local_heads=2, num_clusters=8, window=32),
        None,
        ("routing",),
    ),
    "seer_attention": (
        dict(kind="seer_attention", num_heads=HEADS, block_size=16, num_blocks=4),
        None,
        ("seerattention",),
    ),
    "select_and_pack": (dict(kind="select_and_pack", num_heads=HEADS, rate=0.7), STEP, ()),
    "sparsek": (dict(kind="sparsek", num_heads=HEADS, num_keys=32, window=32), None, ("sparsek",)),
    "subsampled": (dict(kind="subsampled", num_heads=HEADS, window=64, spread=1.0), STEP, ()),
    "toeplitz": (dict(kind="toeplitz", num_heads=HEADS), None, ()),
    "vision_retention": (dict(kind="vision_retention", num_heads=HEADS), None, ()),
    "fixed_point": (dict(kind="fixed_point", num_heads=HEADS), STEP, ()),
    "hyper_zzw": (dict(kind="hyper_zzw"), None, ()),
    "conditioned_attention": (dict(kind="conditioned_attention", conditioning="none"), None, ()),
}


def mixer_of(row: Mapping[str, Any], length: int) -> Any:
    """One layer's mixer for a line of so many tokens."""
    given = dict(embed_dim=WIDTH, position_axes=1, grid=(length,), num_rows=length, num_prefix=0)
    return build(MIXERS, dict(row), "model.mixer", **given)


def tokens(length: int, first: Any = 0) -> Tokens:
    """Consecutive ones."""
    step = first + jnp.arange(length, dtype=jnp.int32)[None]
    return Tokens(step, step[..., None], length, row=step)


def sequence(length: int) -> jax.ShapeDtypeStruct:
    """x of one example."""
    return jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32)


def whole(mixer: Any, params: Any, x: jax.Array) -> jax.Array:
    """All tokens at once."""
    return mixer.apply(params, x, tokens(x.shape[1]))[0]


def params_of(mixer: Any, length: int) -> Any:
    """Their shapes; those of a mixer with a table of places depend on the length."""
    return jax.eval_shape(lambda x: mixer.init(jax.random.key(0), x, tokens(length)), sequence(length))


def size(tree: Any) -> int:
    """Numbers in a pytree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def costs(row: Mapping[str, Any]) -> dict[str, Any]:
    """FLOPs and temporary bytes of one layer by length, and the power with which FLOPs grow at the longest context."""

    def flops_of(length: int) -> int | None:
        mixer = mixer_of(row, length)
        try:
            return flops(functools.partial(whole, mixer), params_of(mixer, length), sequence(length))
        except NotImplementedError:  # a loop that runs until it has converged
            return None

    def temporary(length: int) -> int:
        mixer = mixer_of(row, length)
        lowered = jax.jit(functools.partial(whole, mixer)).lower(params_of(mixer, length), sequence(length))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    longest, half = flops_of(CONTEXTS[-1]), flops_of(CONTEXTS[-1] // 2)
    return {
        "parameters": size(params_of(mixer_of(row, LENGTH), LENGTH)),
        "flops": [flops_of(n) for n in LENGTHS],
        "temporary": [temporary(n) for n in LENGTHS],
        "slope": math.log2(longest / half) if longest and half else None,
    }


def state_bytes(row: Mapping[str, Any], context: int) -> int:
    """Of one example behind so long a context."""
    state = jax.eval_shape(lambda: mixer_of(row, context).init_state(1, context, 1))
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state))


def decoder(row: Mapping[str, Any], context: int) -> Callable[[], Any]:
    """Compiled: NUM_TOKENS tokens of one example, one after another, behind a context that was read before."""
    length = context + NUM_TOKENS
    mixer = mixer_of(row, length)
    x = jax.random.normal(jax.random.key(0), (1, context, WIDTH))
    params = jax.jit(lambda: mixer.init(jax.random.key(1), x[:, :8], tokens(8)))()
    start = jax.jit(lambda: mixer.init_state(1, length, 1))()
    state = jax.jit(lambda params, x, state: mixer.apply(params, x, tokens(context), state)[1])(params, x, start)

    @jax.jit
    def decode(params: Any, x: jax.Array, state: Any) -> Any:
        def one(carry: Any, place: jax.Array) -> Any:
            out, after = mixer.apply(params, carry[0], tokens(1, place), carry[1])
            return (out, after), None

        return jax.lax.scan(one, (x, state), context + jnp.arange(NUM_TOKENS, dtype=jnp.int32))[0]

    return functools.partial(decode, params, x[:, :1], state)


def microseconds(names: Sequence[str], rounds: int = 5) -> dict[str, list[float]]:
    """Of a token behind each of CONTEXTS: medians over rounds, in each of which every mixer has its turn."""
    runs = {(name, context): decoder(ROWS[name][0], context) for name in names for context in CONTEXTS}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    for _ in range(rounds + 1):  # the first one compiles
        for key, run_once in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run_once())
            times[key].append(time.perf_counter() - began)
    return {
        name: [1e6 * statistics.median(times[name, context][1:]) / NUM_TOKENS for context in CONTEXTS] for name in names
    }


def language_model(row: Mapping[str, Any], steps: int, seed: int, mlp_dim: int) -> ConfigDict:
    """The decoder that all mixers share."""
    config = text.language_model("base", dict(row))
    config.seed = seed
    config.data.length = LENGTH
    config.model.update(dict(embed_dim=WIDTH, num_layers=LAYERS, mlp_dim=mlp_dim))
    config.optimizer.learning_rate = 3e-3
    config.schedule.warmup_steps = steps // 10
    config.train.update(dict(num_steps=steps, batch_size=BATCH, log_every_steps=steps))
    return config


def with_as_many_parameters(row: Mapping[str, Any], data: Any) -> tuple[int, int]:
    """The width of the feed-forward layers that gives as many parameters as softmax attention with 4 times WIDTH, and how many."""

    def count(mixer: Mapping[str, Any], mlp_dim: int) -> int:
        system = from_config(language_model(mixer, 1, 0, mlp_dim), data)
        return size(jax.eval_shape(system.init, jax.random.key(0)))

    target, narrow, wide = count(ROWS["softmax"][0], 4 * WIDTH), count(row, WIDTH), count(row, 2 * WIDTH)
    mlp_dim = max(8, round(WIDTH + (target - narrow) / (wide - narrow) * WIDTH))
    return mlp_dim, count(row, mlp_dim)


def learning(row: Mapping[str, Any], steps: int, seeds: int) -> dict[str, Any]:
    """Held-out bits per byte after so many steps, for each seed."""
    data = run.load_data(language_model(row, steps, 0, WIDTH))
    mlp_dim, parameters = with_as_many_parameters(row, data)
    bits = []
    for seed in range(seeds):
        trained = run.train(language_model(row, steps, seed, mlp_dim))
        bits.append(report.held_out(trained, data)["bits_per_dim"])
    return {"bits": bits, "model parameters": parameters}


def replayed(names: tuple[str, ...]) -> float | None:
    """The largest difference of a float output of the official runs of these names; inf where an integer is unequal."""
    found = [path for path in sorted(FIXTURES.glob("*")) if path.name.startswith(names or ("no run",))]
    differences = [d for path in found for d in replay.compare(path, replay.replay(path))]
    if any(d.exact and d.found for d in differences):
        return math.inf
    return max((d.found for d in differences if not d.exact), default=None)


@functools.cache
def cycles(kernel: str | None) -> int | None:
    """Of the kernel's forward form on v5e, 8 heads x 4096 x 128."""
    import kernels_tpu

    if kernel is None or kernels_tpu.libtpu() is None:
        return None
    case = kernels_tpu.Case(kernel, "forward", 4096, 128)
    named = kernel.split(",")[0]
    return sum(n for name, n in kernels_tpu.cycles_of(case, "v5e").items() if name.startswith(named))


def measure(name: str, steps: int, seeds: int) -> dict[str, Any]:
    """Everything about one row."""
    row, kernel, names = ROWS[name]
    found = costs(row) | {"replay": replayed(names), "cycles": cycles(kernel), "kernel": kernel}
    if mixer_of(row, LENGTH).causal:
        found |= {key: [state_bytes(row, n) for n in lengths] for key, lengths in STATES.items()}
        found |= learning(row, steps, seeds)
    return found


def _number(value: Any, form: str = ",.0f") -> str:
    return "" if value is None else format(value, form)


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The page's table, best learner first."""
    head = ["mixer", "parameters", "FLOPs slope", *[f"state at {n}" for n in CONTEXTS]]
    head += [*[f"µs a token at {n}" for n in CONTEXTS], "bits per byte", "spread", "TPU cycles", "replay"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    bits = {name: statistics.mean(row["bits"]) if row.get("bits") else math.inf for name, row in rows.items()}
    for name in sorted(rows, key=lambda name: bits[name]):
        row = rows[name]
        cells = [name, _number(row["parameters"]), _number(row["slope"], ".2f")]
        cells += [_number(n) for n in row.get("state at", [None] * 2)]
        cells += [_number(n) for n in row.get("microseconds at", [None] * 2)]
        spread = max(row["bits"]) - min(row["bits"]) if row.get("bits") else None
        cells += [_number(bits[name] if row.get("bits") else None, ".3f"), _number(spread, ".3f")]
        cells += [_number(row["cycles"]), _number(row["replay"], ".0e")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(rows: Mapping[str, Mapping[str, Any]], command: str, steps: int, seeds: int) -> str:
    """mixers.md."""
    sizes = sorted({row["model parameters"] for row in rows.values() if "model parameters" in row})
    return "\n".join(
        [
            f"<!-- written by: {command} -->",
            "",
            "# Mixers, measured",
            "",
            f"One layer of width {WIDTH} with {HEADS} heads, one example, float32, CPU. State in bytes. The slope is the power with which FLOPs grow from {CONTEXTS[-1] // 2} to {CONTEXTS[-1]} tokens, projections included, and blocks that a kernel skips at run time (windows, packed segments) counted;",  # noqa: E501
            f"times of a token are medians of five rounds of {NUM_TOKENS} tokens, in each of which every mixer has its turn. Bits per byte: held-out tiny_shakespeare after {steps} steps of {BATCH} x {LENGTH} bytes, decoders of {LAYERS} layers with",  # noqa: E501
            f"{sizes[0]:,} to {sizes[-1]:,} parameters, mean of {seeds} seeds and their spread (greatest less least). A short training at a small size: it tells which mixers learn fast, not which are best." if sizes else "",  # noqa: E501
            "TPU cycles: the scheduled forward kernel on v5e, 8 heads x 4096 x 128, bfloat16. Replay: the largest difference from the official runs. An empty cell: what is not causal has no such form, or there is nothing to compare.",  # noqa: E501
            "",
            *table(rows),
            "",
            "![FLOPs, temporary memory and state by length](mixers.png)",
            "",
        ]
    )  # fmt: skip


def draw(rows: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Cost and memory by length, a line for each mixer."""
    figure, axes = plt.subplots(1, 3, figsize=(18, 8), sharex=True)
    colours = plt.get_cmap("tab20")
    for place, (key, title, scale) in enumerate(
        [
            ("flops", "MFLOPs of a layer", 1e6),
            ("temporary", "MB of temporary memory", 1e6),
            ("state", "kB of state", 1e3),
        ]
    ):
        for i, (name, row) in enumerate(rows.items()):
            values = row.get(key) or []
            if len(values) == len(LENGTHS) and None not in values:
                style = ("-", "--", ":")[i // 20 % 3]
                axes[place].loglog(LENGTHS, np.array(values) / scale, style, color=colours(i % 20), label=name)
        axes[place].set(title=title, xlabel="tokens")
        axes[place].set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        axes[place].minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
    figure.subplots_adjust(left=0.04, right=0.99, top=0.95, bottom=0.26, wspace=0.12)
    figure.savefig(file, dpi=80)
    plt.close(figure)


def kept(name: str, fresh: bool, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is on file for a row, or what `make` gives, kept."""
    file = KEPT / f"{name.replace(', ', '-').replace(' ', '_')}.json"
    if file.exists() and not fresh:
        return json.loads(file.read_text())
    found = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))
    return found


def main() -> None:
    """Writes the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help="rows to measure")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--no-times", action="store_true", help="leave out the times of a token")
    parser.add_argument("--fresh", action="store_true", help="forget rows of earlier runs")
    options = parser.parse_args()
    rows = {}
    for name in options.only:
        began = time.perf_counter()
        rows[name] = kept(name, options.fresh, lambda name=name: measure(name, options.steps, options.seeds))
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    causal = [name for name in rows if mixer_of(ROWS[name][0], LENGTH).causal]
    if not options.no_times:
        for name, found in microseconds(causal).items():
            rows[name]["microseconds at"] = found
    options.out.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/mixers.py --steps {options.steps} --seeds {options.seeds}"
    (options.out / "mixers.md").write_text(page(rows, command, options.steps, options.seeds))
    draw(rows, options.out / "mixers.png")


if __name__ == "__main__":
    main()
