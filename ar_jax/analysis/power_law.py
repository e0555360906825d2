"""Fits a power law to runs of several sizes: python -m ar_jax.analysis.power_law RUN RUN RUN [--x=parameters] [--constant].

A RUN is the directory of a trained generator. What is fitted is its metric of held-out data, in eval.py's result where there is
one, else in the last evaluation of its training; --metric names it, such as bits_per_dim or token_error_rate. --x is
layer_parameters (of the layers alone, without embeddings and head), parameters (all that are trained) or training_flops.
L = a x^b, or with --constant L = a x^b + c, as VAR (arXiv:2404.02905, sec. 5.2) has it for the loss and the error rate. Prints
the fit, writes --out=power_law.png, and ends with a line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ar_jax import command
from ar_jax.config import UsageError
from ar_jax.plan import batch_shapes
from ar_jax.run import read_facts, system_of
from ar_jax.system import System
from ar_jax.training.paths import named_leaves
from ar_jax.training.program import make_program
from ar_jax.training.workdir import plain_values, read_config

METRICS = ("bits_per_token", "bits_per_dim", "nll_nats_per_example", "loss")  # the first that all runs have
SIZES = {
    "layer_parameters": "parameters of the layers",
    "parameters": "parameters",
    "training_flops": "FLOPs of training",
}
LAYERS = "generator/decoder/"  # where the parameters of the layers lie


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """L(x) = coefficient x^exponent + constant. VAR's (beta x)^alpha has alpha = exponent, beta = coefficient^(1/alpha).

    Attributes:
      coefficient: a, above 0.
      exponent: b.
      constant: c, what no size gets below; 0 where it was not fitted.
      correlation: Pearson's, of log x and log(L - c).
    """

    coefficient: float
    exponent: float
    constant: float
    correlation: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """L at sizes x."""
        return self.coefficient * np.asarray(x, np.float64) ** self.exponent + self.constant


@dataclasses.dataclass(frozen=True)
class Point:
    """A run as a point of the fit.

    Attributes:
      workdir: its directory.
      sizes: by a key of SIZES.
      metrics: of its held-out data.
    """

    workdir: str
    sizes: dict[str, float]
    metrics: dict[str, float]


def fit(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, constant: bool = False) -> PowerLaw:
    """The power law through points.

    Without a constant it is the line of least squares of log y on log x. With one, the sum of squared relative errors
    (L / y - 1)^2 is the least over a, c >= 0 and b < 0.

    Args:
      x: [n] sizes, above 0.
      y: [n] losses or error rates, above 0.
      constant: fits c, too.

    Raises:
      UsageError: fewer than three sizes (with a constant four), numbers that have no logarithm, or, with a constant, values
        that do not fall.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    least, count = 4 if constant else 3, len(np.unique(x))
    if count < least:
        what = "A power law with a constant" if constant else "A power law"
        raise UsageError(f"{what} takes runs of at least {least} sizes, not {count}; name more runs.")
    for name, values in (("size", x), ("metric", y)):
        if not (np.isfinite(values).all() and values.min() > 0):
            raise UsageError(
                f"A power law has no {name} such as {values.min():.3g}; use one that is finite and above 0."
            )
    center = math.exp(np.log(x).mean())
    scaled = x / center
    offset = 0.0
    if constant:
        offset, exponent = _with_constant(scaled, y)
        if offset >= y.min():  # one value lies on the floor: its logarithm is of no use
            raise UsageError("The metric does not fall as the runs grow, so it has no power law; leave --constant out.")
    slope, intercept = np.polyfit(np.log(scaled), np.log(y - offset), 1)
    slope = exponent if constant else slope
    r = float(np.corrcoef(np.log(x), np.log(y - offset))[0, 1])
    return PowerLaw(math.exp(intercept - slope * math.log(center)), float(slope), offset, r)


def _with_constant(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The constant c and the exponent b of the least relative errors; for each b, a and c are a problem of their own."""

    def solved(log_rate: float) -> tuple[np.ndarray, float]:
        columns = np.stack([x ** -math.exp(log_rate), np.ones_like(x)], axis=1) / y[:, None]
        return scipy.optimize.nnls(columns, np.ones_like(y))

    grid = np.linspace(math.log(1e-3), math.log(8), 200)
    best = int(np.argmin([solved(rate)[1] for rate in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = scipy.optimize.minimize_scalar(
        lambda r: solved(r)[1], bounds=bounds, method="bounded", options={"xatol": 1e-10}
    )
    (coefficient, constant), _ = solved(found.x)
    return (float(constant) if coefficient > 0 else math.inf), -math.exp(found.x)


def read_point(workdir: str | Path) -> Point:
    """The sizes and the metrics of a run, from what it has left in its directory; nothing is allocated or run.

    The FLOPs are those of the training steps that the metrics were measured after, three times those of the loss.

    Raises:
      UsageError: there is no run, its model does not build any more, or it was never evaluated.
    """
    config, facts = read_config(workdir), read_facts(workdir)
    config.mesh = dict(data=1)
    system = system_of(config, facts)
    if not isinstance(system, System):
        raise UsageError(f"{workdir} holds no generator; name the directories of some.")
    program = make_program(system, config)
    metrics = _metrics(Path(workdir))
    counts = {n: leaf.size for n, leaf in named_leaves(program.shapes.params).items() if not system.frozen(n)}
    sizes = {
        "layer_parameters": sum(count for name, count in counts.items() if name.startswith(LAYERS)),
        "parameters": sum(counts.values()),
    }
    batch: Any = batch_shapes(system, program.train.batch_size)
    flops = program.model_flops(batch)
    if flops is not None:
        sizes["training_flops"] = flops * int(metrics["step"])
    return Point(str(workdir), sizes, metrics)


def _metrics(workdir: Path) -> dict[str, float]:
    """Of held-out data: what eval.py has written, or the last evaluation of the training."""
    found: dict[str, Any] = {}
    try:
        for line in (workdir / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            own = {name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/")}
            found = own | {"step": row["step"]} if own else found
        if (workdir / "eval" / "metrics.json").exists():
            found = json.loads((workdir / "eval" / "metrics.json").read_text())
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"The metrics of {workdir} cannot be read ({error}); evaluate it again with eval.py."
        ) from error
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
    if "step" not in numbers:
        raise UsageError(f"{workdir} was never evaluated; run python eval.py --workdir={workdir}.")
    return numbers


def check_alike(workdirs: Sequence[str]) -> None:
    """Raises UsageError where runs are of other data or another tokenizer than the first, whose losses mean something else."""
    first, *others = ({k: plain_values(read_config(w)).get(k) for k in ("data", "tokenizer")} for w in workdirs)
    for workdir, other in zip(workdirs[1:], others, strict=True):
        if differing := [section for section in first if first[section] != other[section]]:
            raise UsageError(
                f"{workdirs[0]} and {workdir} do not compare, as config.{differing[0]} differs; fit runs that differ in size."
            )


def metric_of(points: Sequence[Point], name: str = "") -> str:
    """The metric to fit: the one named, or the first of METRICS that all runs have.

    Raises:
      UsageError: a run does not have it.
    """
    shared = set.intersection(*(set(point.metrics) for point in points))
    name = name or next((metric for metric in METRICS if metric in shared), METRICS[0])
    for point in points:
        if name not in point.metrics:
            known = ", ".join(sorted(set(point.metrics) - {"step"}))
            raise UsageError(f"{point.workdir} has no metric {name!r}; its evaluation has {known}.")
    return name


def picture(law: PowerLaw, x: np.ndarray, y: np.ndarray, x_name: str, y_name: str, path: str | Path) -> None:
    """Writes points and law, both axes logarithmic."""
    figure = Figure(figsize=(5, 3.6), dpi=120)
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    line = np.geomspace(x.min() / 1.5, x.max() * 1.5, 100)
    axes.loglog(line, law(line), color="tab:gray", label=written(law))
    axes.loglog(x, y, "o", color="tab:blue")
    axes.set(xlabel=x_name, ylabel=y_name.replace("_", " "))
    axes.legend(frameon=False)
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"The plot cannot be written to {path} ({error}); choose another --out, such as law.png."
        ) from error


def written(law: PowerLaw) -> str:
    """`3.2 x^-0.12 + 0.4 (r = -0.998)`."""
    rest = f" + {law.constant:.3g}" if law.constant else ""
    return f"{law.coefficient:.3g} x^{law.exponent:.3g}{rest} (r = {law.correlation:.4f})"


def main(arguments: Sequence[str]) -> None:
    """The command."""
    values = flags.FlagValues()
    flags.DEFINE_enum("x", "layer_parameters", [*SIZES], "what a run's size is", flag_values=values)
    flags.DEFINE_string("metric", "", "what is fitted", flag_values=values)
    flags.DEFINE_boolean("constant", False, "fits L = a x^b + c", flag_values=values)
    flags.DEFINE_string("out", "power_law.png", "the plot to write", flag_values=values)
    workdirs = values(list(arguments))[1:]
    if not workdirs:
        raise UsageError("power_law needs the directories of runs of several sizes; name them.")
    check_alike(workdirs)
    points = [read_point(workdir) for workdir in workdirs]
    metric = metric_of(points, values.metric)
    if uncounted := next((point for point in points if values.x not in point.sizes), None):
        raise UsageError(f"The FLOPs of {uncounted.workdir} cannot be counted; use --x=parameters.")
    x, y = (
        np.asarray([getattr(p, of)[key] for p in points], np.float64)
        for of, key in (("sizes", values.x), ("metrics", metric))
    )
    law = fit(x, y, values.constant)
    picture(law, x, y, SIZES[values.x], metric, values.out)
    for point, size, value in zip(points, x, y, strict=True):
        print(f"{point.workdir}: {SIZES[values.x]} {size:.4g}, {metric} {value:.4g}, fitted {float(law(size)):.4g}")
    print(f"{metric} = {written(law)}; plot in {values.out}")
    print(json.dumps({"metric": metric, "x": values.x, **dataclasses.asdict(law)}))


if __name__ == "__main__":
    command.call(main)
