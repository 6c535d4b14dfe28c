"""Test the order of samples and their noise, which do not depend on the processes."""

import itertools

import torch

from training.data.batches import Order, draw_noise, pieces_of


def test_every_epoch_shows_every_sample_once_whatever_the_division():
    whole = Order(count=10, batch_size=4, rows=range(4), pieces=1, seed=3, first=0)
    steps = [indices for indices, _ in zip(whole, range(5), strict=False)]
    seen = list(itertools.chain.from_iterable(steps))
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    halves = [Order(10, 4, rows, 2, 3, first=1) for rows in (range(2), range(2, 4))]
    pieces = list(zip(*(zip(half, range(8), strict=False) for half in halves), strict=True))
    found = [
        pieces[2 * i][0][0]
        + pieces[2 * i + 1][0][0]
        + pieces[2 * i][1][0]
        + pieces[2 * i + 1][1][0]
        for i in range(4)
    ]
    assert found == steps[1:]
    assert pieces_of(range(4, 10), 3) == [range(4, 6), range(6, 8), range(8, 10)]


def test_noise_belongs_to_the_row():
    whole = draw_noise(0, 7, range(40), (3,), torch.device("cpu"))
    assert torch.equal(draw_noise(0, 7, range(13, 37), (3,), torch.device("cpu")), whole[13:37])
    assert not torch.equal(draw_noise(0, 8, range(40), (3,), torch.device("cpu")), whole)
    assert abs(draw_noise(0, 0, range(4000), (5,), torch.device("cpu")).std().item() - 1) < 0.02
