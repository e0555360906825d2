"""Images per second beside the official PyTorch samplers: python benchmarks/landmarks.py --official DIR [--markdown FILE].

DIR holds clones of the official repositories, named LlamaGen, VAR, ARPG and mar. Each system is built by the official
code with random weights, converted by `ar_jax.interop`, checked for agreement, and then sampled by both in turn, in one
process, float32, with classifier-free guidance as published: PyTorch and XLA both use as many threads as the process may
run on. Official code runs as its users run it (their generate function, inference mode, their caches); what it says to
`.cuda()` is answered with nothing. Needs torch, einops, timm and tqdm, which the library itself does not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from ar_jax.analysis import profile  # noqa: E402
from ar_jax.config import UsageError  # noqa: E402
from ar_jax.interop import arpg, llamagen, mar, tokenizers, var  # noqa: E402
from ar_jax.interop.generators import greedy, official_run  # noqa: E402
from ar_jax.system import System  # noqa: E402

try:
    import torch
except ModuleNotFoundError:
    sys.exit("benchmarks/landmarks.py runs official PyTorch code; pip install torch einops timm==0.9.12 tqdm.")

Run = Callable[[], Any]
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "base": {
        "LlamaGen": dict(batch=4, dim=512, n_layer=8, n_head=8, vocab_size=4096, block_size=256),
        "VAR": dict(batch=4, depth=8, patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), V=4096, ch=32),
        "ARPG": dict(batch=4, dim=512, n_layer=8, n_head=8, vocab_size=4096, block_size=256, num_iter=32),
        "MAR": dict(batch=2, width=384, depth=4, heads=6, side=16, diffloss_w=512, num_iter=16, steps=25),
    },
    "tiny": {
        "LlamaGen": dict(batch=2, dim=64, n_layer=2, n_head=2, vocab_size=256, block_size=64),
        "VAR": dict(batch=2, depth=2, patch_nums=(1, 2, 3, 4), V=256, ch=32),
        "ARPG": dict(batch=2, dim=64, n_layer=4, n_head=2, vocab_size=256, block_size=64, num_iter=8),
        "MAR": dict(batch=2, width=64, depth=2, heads=2, side=8, diffloss_w=64, num_iter=4, steps=5),
    },
}
NUM_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Landmark:
    """One system, twice.

    Attributes:
      batch: images that a run draws.
      agreement: how both agree, in words.
      theirs: official runs by variant; the first is what ours is compared with.
      ours: the same with this library.
      compiled: the program that `ours` runs.
    """

    batch: int
    agreement: str
    theirs: Mapping[str, Run]
    ours: Run
    compiled: Any


def perturbed(module: Any, scale: float = 0.02) -> Any:
    """The module for inference; noise on all parameters, so that none of those that start at zero hides a difference."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module.eval()


def arrays(module: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """A module's weights by name."""
    return {prefix + name: tensor.numpy() for name, tensor in module.state_dict().items()}


def labels_of(batch: int) -> np.ndarray:
    """Classes of the images."""
    return np.arange(batch) * 7 % NUM_CLASSES


def sampler(system: System, params: Any, batch: int, decode: bool = False, **drawing: Any) -> tuple[Run, Any]:
    """A run of ours, another seed each time, tokens or images; and the program, compiled once."""

    def draw(params: Any, key: Any, labels: Any, told: Any) -> Any:
        tokens = system.sample(params, key, labels, jnp.zeros(batch, bool), told)
        return system.tokenizer.decode(params["tokenizer"], tokens) if decode else tokens

    labels, told = jnp.asarray(labels_of(batch), jnp.int32), system.drawing(**drawing)
    program = jax.jit(draw).lower(params, jax.random.key(0), labels, told).compile()
    seeds = iter(range(2**31))
    return lambda: jax.block_until_ready(program(params, jax.random.key(next(seeds)), labels, told)), program


def equal_tokens(ours: Any, theirs: Any) -> str:
    """How many tokens are equal."""
    same = np.asarray(ours) == np.asarray(theirs)
    return f"{same.sum()} of {same.size} greedy tokens equal"


def llamagen_landmark(size: dict[str, Any], compiled: bool = False, scale: float = 2.0) -> Landmark:
    """LlamaGen: token after token, with a cache; where `compiled`, beside its network under torch.compile, too."""
    gpt = importlib.import_module("autoregressive.models.gpt")
    generate = importlib.import_module("autoregressive.models.generate").generate
    batch, sizes = size["batch"], {k: v for k, v in size.items() if k != "batch"}
    model = perturbed(gpt.Transformer(gpt.ModelArgs(**sizes, num_classes=NUM_CLASSES)))
    side = round(sizes["block_size"] ** 0.5)
    config = dict(
        tokenizer=dict(kind="codes", grids=((side, side),), vocab_size=sizes["vocab_size"]),
        order=dict(kind="raster"),
        head=dict(kind="categorical", use_bias=False),
        model=llamagen.model_config(sizes["dim"], sizes["n_layer"], sizes["n_head"], multiple_of=256),
    )
    system, params = official_run(config, NUM_CLASSES, llamagen.rules, arrays(model))
    labels = torch.from_numpy(labels_of(batch))

    def official(network: Any, **options: Any) -> Any:
        return generate(network, labels, sizes["block_size"], cfg_scale=scale, **options)

    ours = greedy(system, params, jnp.asarray(labels_of(batch)), batch, guidance_scale=scale)
    theirs = {"": functools.partial(official, model)}
    if compiled:
        theirs["torch.compile"] = functools.partial(official, torch.compile(model, fullgraph=True))
    return Landmark(
        batch, equal_tokens(ours, official(model, sample_logits=False)), theirs,
        *sampler(system, params, batch, guidance_scale=scale),
    )  # fmt: skip


def var_landmark(size: dict[str, Any], decode: bool = False, cfg: float = 1.5) -> Landmark:
    """VAR: scale after scale; with `decode` up to the image, otherwise up to the tokens and their features."""
    models, vae_module = (importlib.import_module(f"models{name}") for name in ("", ".vqvae"))
    vae_size = dict(vocab_size=size["V"], z_channels=32, ch=size["ch"], share_quant_resi=4)
    vae = perturbed(vae_module.VQVAE(**vae_size, v_patch_nums=size["patch_nums"]))
    depth, batch, side = size["depth"], size["batch"], 16 * size["patch_nums"][-1]
    network = models.VAR(
        vae, NUM_CLASSES, depth, 64 * depth, depth, cond_drop_rate=0.1, attn_l2_norm=True, patch_nums=size["patch_nums"]
    )
    network.init_weights(init_adaln=0.5, init_adaln_gamma=1e-5, init_head=1.0, init_std=-1)
    vae_config = vae_size | dict(ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, patch_nums=size["patch_nums"])
    config = dict(
        image_shape=(side, side, 3),
        tokenizer=tokenizers.tokenizer_of({"config": vae_config}, {}),
        order=dict(kind="next_scale"),
        condition=dict(kind="class", copies=1),
        model=var.model_config(64 * depth, depth, depth) | {"norm_epsilon": 1e-6},
    )
    weights = arrays(perturbed(network), "var.") | arrays(vae, "vae.")
    system, params = official_run(config, NUM_CLASSES, var.both, weights)
    labels, guided = torch.from_numpy(labels_of(batch)), dict(guidance_scale=1 + cfg, guidance_schedule="linear_steps")
    official = functools.partial(network.autoregressive_infer_cfg, batch, labels, cfg=cfg)
    filters = dict(top_k=min(900, size["V"]), top_p=0.96)
    tokens = greedy(system, params, jnp.asarray(labels_of(batch)), batch, **guided)
    image = np.moveaxis(np.asarray(jax.jit(system.tokenizer.decode)(params["tokenizer"], tokens)), -1, 1)
    with torch.inference_mode():
        error = np.abs(image - (2 * official(top_k=1).numpy() - 1)).max()
    if not decode:
        vae.fhat_to_img = torch.clone
    return Landmark(
        batch, f"greedy images differ by at most {error:.0e}", {"": lambda: official(**filters)},
        *sampler(system, params, batch, decode, **filters, **guided),
    )  # fmt: skip


def arpg_landmark(size: dict[str, Any], scale: float = 4.0) -> Landmark:
    """ARPG: random sets of tokens in two passes."""
    batch, steps = size["batch"], size["num_iter"]
    sizes = {k: v for k, v in size.items() if k not in ("batch", "num_iter")}
    theirs = importlib.import_module("models.arpg")
    model = perturbed(theirs.Transformer(theirs.ModelArgs(**sizes, num_classes=NUM_CLASSES)))
    length = sizes["block_size"]
    side = round(length**0.5)
    config = dict(
        tokenizer=dict(kind="codes", grids=((side, side),), vocab_size=sizes["vocab_size"]),
        order=dict(kind="random"),
        feed=dict(kind="query"),
        head=dict(kind="categorical", use_bias=False),
        model=arpg.model_config(sizes["dim"], sizes["n_layer"], sizes["n_head"]),
        sampling=dict(order=dict(kind="random", num_steps=steps, sizes="arccos")),
    )
    system, params = official_run(config, NUM_CLASSES, arpg.rules, arrays(model))
    labels = torch.from_numpy(labels_of(batch))
    official = functools.partial(model.generate, labels, guidance_scale=scale, seq_len=length, num_iter=steps)
    guided = dict(guidance_scale=scale, guidance_schedule="linear")
    torch.manual_seed(0)
    told = official(top_k=1)
    torch.manual_seed(0)
    torch.rand_like(labels, dtype=torch.float)  # which conditions to drop: none; the order is drawn next
    slots = np.broadcast_to(torch.rand(length).argsort().numpy(), (batch, length))
    ours = greedy(system, params, jnp.asarray(labels_of(batch)), batch, slots, **guided)
    return Landmark(batch, equal_tokens(ours, told), {"": official}, *sampler(system, params, batch, **guided))


def mar_landmark(size: dict[str, Any], scale: float = 2.9) -> Landmark:
    """MAR: random sets of continuous tokens, each the end of a diffusion."""
    batch, side, width, depth, heads = (size[k] for k in ("batch", "side", "width", "depth", "heads"))
    both = {f"{half}_{k}": v for half in ("encoder", "decoder") for k, v in
            dict(embed_dim=width, depth=depth, num_heads=heads).items()}  # fmt: skip
    head = dict(diffloss_d=3, diffloss_w=size["diffloss_w"], num_sampling_steps=str(size["steps"]))
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    official = importlib.import_module("models.mar").MAR
    model = perturbed(official(img_size=16 * side, norm_layer=norm, class_num=NUM_CLASSES, **both, **head))
    steps = size["num_iter"]
    config = dict(
        tokenizer=dict(kind="codes", grids=((side, side),), channels=16),
        order=dict(kind="random", num_steps=steps),
        objective=dict(kind="masked"),
        condition=dict(kind="class", copies=64),
        head=dict(kind="diffusion", depth=3, width=size["diffloss_w"], num_sampling_steps=size["steps"]),
        model=mar.model_config(width, depth, heads),
    )
    system, params = official_run(config, NUM_CLASSES, mar.rules, arrays(model))
    labels = torch.from_numpy(labels_of(batch))
    guided = dict(guidance_scale=scale, guidance_schedule="linear_mar")
    return Landmark(
        batch, _mar_agreement(system, params, model, labels),
        {"": lambda: model.sample_tokens(batch, steps, scale, "linear", labels)}, *sampler(system, params, batch, **guided),
    )  # fmt: skip


def _mar_agreement(system: System, params: Any, model: Any, labels: Any) -> str:
    """Hidden vectors and the head's answers with half of the tokens masked."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((len(labels), model.seq_len, 16)).astype(np.float32)
    mask = np.stack([rng.permutation(np.arange(model.seq_len) % 2) for _ in labels]).astype(np.float32)
    with torch.inference_mode():
        told, masked = torch.from_numpy(tokens), torch.from_numpy(mask)
        z = model.forward_mae_decoder(model.forward_mae_encoder(told, masked, model.class_emb(labels)), masked)
        flat, time = told.reshape(-1, 16), torch.full((told.shape[0] * told.shape[1],), 500)
        answer = model.diffloss.net(flat, time, z.reshape(len(flat), -1)).numpy()
    hidden, _ = mar.hidden_under_mask(system, params, jnp.asarray(tokens), mask, jnp.asarray(labels.numpy()))
    ours = system.model.ask(params, "__call__", hidden, jnp.asarray(tokens), jnp.full(mask.shape, 500))
    error = np.abs(np.asarray(ours).reshape(answer.shape) - answer).max()
    return f"predicted noise differs by at most {error:.0e}"


LANDMARKS: dict[str, tuple[str, str, Callable[[dict[str, Any]], Landmark]]] = {
    "LlamaGen": ("LlamaGen", "LlamaGen", functools.partial(llamagen_landmark, compiled=True)),
    "LlamaGen, eager only": ("LlamaGen", "LlamaGen", llamagen_landmark),
    "VAR": ("VAR", "VAR", var_landmark),
    "VAR to pixels": ("VAR", "VAR", functools.partial(var_landmark, decode=True)),
    "ARPG": ("ARPG", "ARPG", arpg_landmark),
    "MAR": ("mar", "MAR", mar_landmark),
}  # name: the clone's folder, the key of SIZES, how to build it


@contextlib.contextmanager
def repository(folder: Path) -> Iterator[None]:
    """Official modules bear the same names (`models`, `utils`): inside, those of one repository are found, and no others.

    Raises:
      UsageError: there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; clone the official repository there, or choose others with --only.")
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]


def prepare_torch(threads: int) -> None:
    """As many threads as XLA takes, no graphics card, and stand-ins for packages that the official code only names."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.Tensor.cuda = lambda self, *args, **options: self  # type: ignore[method-assign]
    for name, member in (
        ("huggingface_hub", "PyTorchModelHubMixin"),
        ("transformers.configuration_utils", "PretrainedConfig"),
    ):
        if importlib.util.find_spec(name.split(".")[0]) is None:
            for part in (name.split(".")[0], name):
                sys.modules.setdefault(part, types.ModuleType(part))
            setattr(sys.modules[name], member, type(member, (), {"__init__": lambda self, **options: None}))


def measure(name: str, landmark: Landmark, rounds: int) -> list[dict[str, Any]]:
    """One row per official variant: medians of images per second, and the median over rounds of their ratio.

    All runs of a round follow one another, so that a slow moment of the machine is everybody's.
    """
    runs = {"ours": landmark.ours, **{f"official {v}".strip(): run for v, run in landmark.theirs.items()}}
    speeds: dict[str, list[float]] = {key: [] for key in runs}
    with torch.inference_mode():
        for round_ in range(rounds + 1):  # the first one compiles and warms up
            for key, run in runs.items():
                start = time.perf_counter()
                run()
                if round_:
                    speeds[key].append(landmark.batch / (time.perf_counter() - start))
    kinds = profile.by_kind(profile.trace(landmark.ours), landmark.compiled.as_text())
    return [
        {
            "system": name,
            "official": key,
            "batch": landmark.batch,
            "agreement": landmark.agreement,
            "images_per_second_official": statistics.median(speeds[key]),
            "images_per_second_ours": statistics.median(speeds["ours"]),
            "ratio": statistics.median(a / b for a, b in zip(speeds["ours"], speeds[key], strict=True)),
            "lowest_ratio": min(a / b for a, b in zip(speeds["ours"], speeds[key], strict=True)),
            "rounds": rounds,
            "share_of_time": {kind: seconds / sum(kinds.values()) for kind, seconds in kinds.items()},
        }
        for key in runs
        if key != "ours"
    ]


def markdown(rows: list[dict[str, Any]], size: str, threads: int) -> str:
    """The page with the table."""
    lines = [
        f"<!-- written by: python benchmarks/landmarks.py --official DIR --size {size} -->",
        "",
        f"Images per second on {threads} CPU threads, float32, classifier-free guidance on, torch {torch.__version__}, "
        f"jax {jax.__version__}; medians of {rows[0]['rounds']} rounds taken in turn. The ratio is the median over rounds. "
        "The last column: how much of our time goes to matrix products, which no sampler can leave out, by the profiler.",
        "",
        "| system | official code | images a batch | official | ours | ratio | agreement | products |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        speeds = f"{row['images_per_second_official']:.2f} | {row['images_per_second_ours']:.2f} | {row['ratio']:.2f}"
        share = row["share_of_time"]["products"]
        lines.append(
            f"| {row['system']} | {row['official']} | {row['batch']} | {speeds} | {row['agreement']} | {share:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints a JSON object per row, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, metavar="DIR", help="clones of the repositories")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=LANDMARKS,
        default=[name for name in LANDMARKS if "only" not in name],
        metavar="SYSTEM",
    )
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="cores to run on; all if left out")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    cores, rows = sorted(os.sched_getaffinity(0))[: arguments.threads], []
    os.sched_setaffinity(0, cores)  # XLA takes a thread per core that it may run on, and is not running yet
    prepare_torch(len(cores))
    for name in arguments.only:
        folder, key, build = LANDMARKS[name]
        with repository(arguments.official / folder):
            size = SIZES[arguments.size][key]
            landmark = build(size)
            rows += measure(name, landmark, arguments.rounds)
        print("\n".join(json.dumps(row) for row in rows[-len(landmark.theirs) :]), flush=True)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows, arguments.size, len(cores)))


if __name__ == "__main__":
    main()
