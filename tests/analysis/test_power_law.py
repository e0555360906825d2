"""Power laws: found again where they were put in, and fitted to runs of several widths by the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ar_jax
from ar_jax import run as runs
from ar_jax.analysis import power_law
from ar_jax.config import UsageError
from ar_jax.evaluation import report
from ar_jax.training.workdir import plain_values

CONFIG = Path(__file__).parents[2] / "configs/var.py:smoke"
WIDTHS = (16, 32, 64)
SIZES = np.geomspace(3e4, 2e9, 7)


def of_width(width: int) -> Any:
    """VAR's smoke variant, of another width."""
    config = ar_jax.get_config(CONFIG)
    config.model.update(embed_dim=width, mlp_dim=4 * width)
    config.mesh = dict(data=1)
    return config


@pytest.mark.parametrize("exponent", [-0.2, -0.016, 0.3])  # the first two are VAR's, of its loss and its error rate
def test_an_exact_power_law_is_found_again(exponent: float) -> None:
    law = power_law.fit(SIZES, 7.5 * SIZES**exponent)
    assert (law.coefficient, law.exponent) == pytest.approx((7.5, exponent)) and law.constant == 0
    assert law.correlation == pytest.approx(math.copysign(1, exponent))
    np.testing.assert_allclose(law(SIZES), 7.5 * SIZES**exponent)


@pytest.mark.parametrize(("exponent", "constant"), [(-0.3, 1.7), (-0.08, 0.4), (-0.5, 0.0)])
def test_so_is_the_constant_that_no_size_gets_below(exponent: float, constant: float) -> None:
    y = 40 * SIZES**exponent + constant
    law = power_law.fit(SIZES, y, constant=True)
    assert (law.exponent, law.constant) == pytest.approx((exponent, constant), rel=1e-3, abs=1e-3)
    assert law.correlation == pytest.approx(-1, abs=1e-6)
    np.testing.assert_allclose(law(SIZES), y, rtol=1e-4)
    plain = power_law.fit(SIZES, y)
    assert constant == 0 or abs(plain.exponent - exponent) > 1e-3  # without it, another law


def test_noise_shows_in_the_correlation_and_little_in_the_exponent() -> None:
    noise = np.random.default_rng(0).normal(size=len(SIZES))
    law = power_law.fit(SIZES, 7.5 * SIZES**-0.2 * np.exp(0.05 * noise))
    logs = np.log(SIZES), np.log(7.5 * SIZES**-0.2) + 0.05 * noise
    assert law.correlation == pytest.approx(np.corrcoef(*logs)[0, 1]) and -1 < law.correlation < -0.99
    assert law.exponent == pytest.approx(-0.2, abs=0.02)


@pytest.mark.parametrize(
    ("x", "y", "constant", "told"),
    [
        ([1, 2], [3, 2], False, "at least 3 sizes, not 2"),
        ([1, 1, 1], [3, 2, 1], False, "at least 3 sizes, not 1"),
        ([1, 2, 3], [3, 2, 1], True, "with a constant takes runs of at least 4 sizes, not 3"),
        ([1, 2, 4], [3, 0, 1], False, "no metric such as 0"),
        ([1, 2, 4], [3, math.inf, 1], False, "finite and above 0"),
        ([-1, 2, 4], [3, 2, 1], False, "no size such as -1"),
        ([1, 2, 4, 8], [1, 2, 3, 4], True, "does not fall"),
    ],
)
def test_what_has_no_power_law_is_told(x: list[float], y: list[float], constant: bool, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        power_law.fit(x, y, constant)


def written_run(folder: Path, width: int, bits: float | None) -> str:
    """What training and eval.py would have left of a run, without its parameters."""
    workdir, config = folder / f"width{width}", of_width(width)
    (workdir / "eval").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(plain_values(config)))
    (workdir / "facts.json").write_text(json.dumps(runs._facts(runs.load_data(config))))
    rows = [
        {"step": 20, "loss": 3.0},
        {"step": 40, "loss": 2.0, "eval/bits_per_dim": 9.0, "eval/token_error_rate": 0.7},
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if bits is not None:
        (workdir / "eval" / "metrics.json").write_text(json.dumps({"step": 40, "bits_per_dim": bits, "samples": {}}))
    return str(workdir)


def test_the_command_fits_what_runs_have_left(tmp_path, capsys) -> None:
    """Sizes are counted on the configs: parameters of the layers, all of them, and FLOPs of the steps done."""
    workdirs = [written_run(tmp_path, width, None) for width in WIDTHS]
    points = [power_law.read_point(workdir) for workdir in workdirs]
    assert all(p.metrics == {"step": 40, "bits_per_dim": 9.0, "token_error_rate": 0.7} for p in points)  # of training
    layers, everything = ([p.sizes[name] for p in points] for name in ("layer_parameters", "parameters"))
    # Attention 4 w^2, MLP 8 w^2, modulation 6 w^2, of two layers, and 2 w^2 of the last norm; then biases and scales.
    biases = [2 * (4 * w + 4 + 5 * w - w + 6 * w) + 2 * w for w in WIDTHS]
    assert layers == [2 * 18 * w**2 + 2 * w**2 + b for w, b in zip(WIDTHS, biases, strict=True)]
    assert all(more > size for more, size in zip(everything, layers, strict=True))
    flops = [p.sizes["training_flops"] for p in points]
    assert 3 * flops[0] < flops[2] < 16 * flops[0] and flops[0] > 40 * 64 * 85 * 6 * layers[0]

    for workdir, size in zip(workdirs, layers, strict=True):
        (Path(workdir) / "eval" / "metrics.json").write_text(json.dumps({"step": 40, "bits_per_dim": 20 * size**-0.2}))
    plot = tmp_path / "law.png"
    power_law.main(["power_law", *workdirs, f"--out={plot}"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["metric"], found["x"], found["constant"]) == ("bits_per_dim", "layer_parameters", 0)
    assert (found["coefficient"], found["exponent"], found["correlation"]) == pytest.approx((20, -0.2, -1))
    assert plot.stat().st_size > 5000
    with pytest.raises(UsageError, match="has no metric 'token_error_rate'; its evaluation has bits_per_dim"):
        power_law.main(["power_law", *workdirs, "--metric=token_error_rate"])


def test_runs_that_do_not_compare_or_were_never_evaluated_are_refused(tmp_path) -> None:
    workdirs = [written_run(tmp_path, width, 3.0) for width in WIDTHS]
    with pytest.raises(UsageError, match="name them"):
        power_law.main(["power_law"])
    config = json.loads((Path(workdirs[1]) / "config.json").read_text())
    config["tokenizer"]["sides"] = [1, 8]
    (Path(workdirs[1]) / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"width16 and .*width32 do not compare, as config.tokenizer differs"):
        power_law.main(["power_law", *workdirs])
    other = Path(workdirs[2])
    (other / "eval" / "metrics.json").unlink()
    (other / "metrics.jsonl").write_text('{"step": 20, "loss": 3.0}\n')
    with pytest.raises(UsageError, match="was never evaluated; run python eval.py"):
        power_law.read_point(other)


@pytest.mark.slow
def test_a_power_law_of_three_trained_widths_of_var(tmp_path, capsys) -> None:
    """VAR (S023), sec. 5.2: loss and error rate of held-out images fall with the size, the rate more slowly."""
    workdirs = []
    for width in WIDTHS:
        workdirs.append(str(tmp_path / f"width{width}"))
        run = ar_jax.train(of_width(width), workdirs[-1])
        data = runs.load_data(run.config)
        metrics = {"step": run.step} | report.held_out(run, data) | report.mistaken(run, data)
        (Path(workdirs[-1]) / "eval").mkdir()
        (Path(workdirs[-1]) / "eval" / "metrics.json").write_text(json.dumps(metrics))
    laws = {}
    for metric in ("bits_per_dim", "token_error_rate"):
        power_law.main(["power_law", *workdirs, f"--metric={metric}", f"--out={tmp_path / metric}.png"])
        laws[metric] = json.loads(capsys.readouterr().out.splitlines()[-1])
    loss, errors = laws["bits_per_dim"], laws["token_error_rate"]
    assert -0.3 < loss["exponent"] < -0.02 and loss["correlation"] < -0.95, laws
    assert loss["exponent"] < errors["exponent"] < 0, laws
