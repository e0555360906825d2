"""Calibration: a trained model becomes one that ranks keys by their principal components."""

from __future__ import annotations

import numpy as np
import pytest

from ar_jax.calibrate import calibrate, main
from ar_jax.config import UsageError
from ar_jax.run import Run, build_run, load_data
from configs import digits, digits_linear


@pytest.fixture(scope="module")
def trained() -> tuple[Run, object]:
    """A small model of the digits, as it starts, and the digits."""
    config = digits.get_config("smoke")
    config.model.update(dict(embed_dim=16, num_layers=2, mlp_dim=16))
    data = load_data(config)
    run = build_run(config, data)
    assert isinstance(run, Run)
    return run, data


def test_with_all_keys_the_likelihoods_stay_and_components_hold_the_variance(trained: tuple[Run, object]) -> None:
    run, data = trained
    found, shares = calibrate(run, data, num_keys=99, rank=2, batches=1)
    assert found.config.model.mixer.kind == "loki"
    for share in shares.values():
        np.testing.assert_allclose(share.sum(axis=-1), 1, atol=1e-6)  # parts of a whole
        assert (share[..., 0] > 1 / share.shape[-1]).all()
    batch = data.test.take(np.arange(3))  # type: ignore[attr-defined]
    before, after = (r.log_prob(batch["image"], batch["label"]) for r in (run, found))
    np.testing.assert_allclose(after, before, rtol=1e-4)  # float32, 64 tokens, keys and queries turned


def test_other_mixers_are_refused(trained: tuple[Run, object]) -> None:
    run, data = trained
    other = Run(run.system, run.params, digits_linear.get_config("smoke"))
    with pytest.raises(UsageError, match="needs mixers of kind 'softmax', not 'linear'"):
        calibrate(other, data, num_keys=4, rank=2)


def test_a_directory_that_exists_is_not_overwritten(tmp_path: object) -> None:
    with pytest.raises(UsageError, match="There is no run in|exists"):
        main(["calibrate", f"--workdir={tmp_path}", f"--out={tmp_path}"])
