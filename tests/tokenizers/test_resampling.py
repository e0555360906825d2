import numpy as np
import pytest

from ar_jax.tokenizers.resampling import area_matrix, bicubic_matrix

SIZES = [(1, 5), (2, 5), (3, 16), (5, 5), (8, 3)]


@pytest.mark.parametrize("matrix", [area_matrix, bicubic_matrix])
@pytest.mark.parametrize(("length", "size"), SIZES)
def test_a_constant_stays_and_equal_sizes_change_nothing(matrix, length, size):
    np.testing.assert_allclose(matrix(length, size).sum(axis=1), 1, atol=1e-6)  # float32
    np.testing.assert_allclose(matrix(size, size), np.eye(size), atol=1e-6)


def test_bins_of_averages_overlap_where_sides_do_not_divide():
    np.testing.assert_allclose(area_matrix(5, 2), [[1 / 3] * 3 + [0] * 2, [0] * 2 + [1 / 3] * 3], atol=1e-6)


def test_cubic_weights_halfway_between_two_cells_are_those_of_a_three_quarters():
    """(-3, 19, 19, -3) / 32 is Keys' kernel with a = -0.75 at 3/2, 1/2, 1/2 and 3/2."""
    np.testing.assert_allclose(bicubic_matrix(12, 4)[1], np.eye(12)[4], atol=1e-6)  # falls on a cell
    np.testing.assert_allclose(bicubic_matrix(12, 6)[2, 3:7], np.array([-3, 19, 19, -3]) / 32, atol=1e-6)


def test_cubic_interpolation_near_an_edge_repeats_the_edge():
    row = bicubic_matrix(4, 2)[0]
    np.testing.assert_allclose(row, [16 / 32, 19 / 32, -3 / 32, 0], atol=1e-6)
