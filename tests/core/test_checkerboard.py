"""Checkerboard: its draws, its density, and the distance that judges samples."""

import pytest
import torch

from gmflow_core.toys.checkerboard import (
    board_density,
    board_posterior_mean,
    draw_checkerboard,
    histogram,
    on_board,
    total_variation,
)


def uniform_box(count):
    return 8 * torch.rand(count, 2, generator=torch.Generator().manual_seed(1)) - 4


def exact_draws(count, seed=0):
    return draw_checkerboard(count, torch.Generator().manual_seed(seed))


def test_the_board_is_eight_squares_with_the_lower_left_one_filled():
    density = board_density(8)
    cells = density.reshape(4, 2, 4, 2).sum((1, 3))  # (row y, column x)
    expected = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]) / 8
    assert torch.equal(cells, expected)
    assert torch.equal(
        histogram(torch.tensor([[-3.0, -3.0], [3.0, -1.0]]), bins=4).nonzero(),
        torch.tensor([[0, 0], [1, 3]]),
    )


def test_draws_fill_the_board_evenly():
    x = exact_draws(100_000)
    assert on_board(x).all()
    assert x.abs().max() <= 4
    shares = histogram(x, bins=8) / len(x)
    assert (shares - board_density(8)).abs().max() < 4.5 * (1 / 32 / len(x)) ** 0.5
    assert torch.equal(exact_draws(10), exact_draws(10))


def test_on_board_agrees_with_the_density():
    x = uniform_box(20_000)
    row, column = ((x[:, axis] + 4).div(2).long() for axis in (1, 0))
    assert torch.equal(on_board(x), board_density(4)[row, column] > 0)
    assert not on_board(torch.tensor([[-5.0, -3.0], [float("nan"), 0.0], [4.1, 3.0]])).any()


def test_slack_widens_every_square():
    points = torch.tensor([[-4.2, -3.0], [-1.9, -3.0], [-3.0, -1.9], [4.2, 4.2], [-1.0, -3.0]])
    assert on_board(points).tolist() == [False] * 5
    assert on_board(points, slack=0.15).tolist() == [False, True, True, False, False]
    assert on_board(points, slack=0.25).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("seed", range(3))
def test_exact_samples_have_the_known_floor_of_total_variation(seed):
    assert total_variation(exact_draws(200_000, seed)) == pytest.approx(0.0405, abs=0.002)


def test_a_uniform_box_is_half_wrong():
    assert total_variation(uniform_box(200_000)) == pytest.approx(0.5, abs=0.002)


def test_samples_outside_count_as_wrong():
    inside, far = exact_draws(150_000), torch.full((50_000, 2), 100.0)
    lost = total_variation(torch.cat([inside, far]))
    # a quarter is missing inside; the distance of exact samples hides in it
    assert lost == pytest.approx(0.25, abs=0.005)
    assert total_variation(far) == pytest.approx(1)
    assert total_variation(
        torch.cat([inside, torch.full((50_000, 2), float("nan"))])
    ) == pytest.approx(lost)
    assert histogram(torch.tensor([[4.0, 0.0], [-4.0, -4.0], [-4.01, 0.0]])).sum() == 1


@pytest.mark.parametrize(("sigma", "error"), [(1.0, 1e-3), (0.9, 1e-4), (0.3, 1e-4), (0.1, 1e-3)])
def test_the_exact_posterior_mean_is_that_of_a_fine_grid(sigma, error):
    line = (torch.arange(1600, dtype=torch.float64) + 0.5) / 200 - 4
    grid = torch.cartesian_prod(line, line)
    grid, x = grid[on_board(grid)], uniform_box(8).double()
    surprise = ((x.unsqueeze(1) - (1 - sigma) * grid) / sigma).square().sum(-1)
    expected = (-0.5 * surprise).softmax(1) @ grid
    found = board_posterior_mean(x, torch.full((8,), sigma))
    assert (found - expected).abs().max() < error


def test_the_exact_posterior_mean_far_away_is_the_nearest_corner():
    x, sigma = torch.tensor([[30.0, 30.0], [-2.0, 9.0]]), torch.full((2,), 1e-3)
    expected = torch.tensor([[4.0, 4.0], [-2.0, 4.0]])
    found = board_posterior_mean(x, sigma)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 3e-3
