"""The two digit tasks: what is in which domain, and how colour and label go together."""

from __future__ import annotations

import pytest
import torch

from fastdg.studies.data.digits import (
    ANGLES,
    COLOUR_FLIPS,
    LABEL_FLIP,
    SHIFTS,
    TASKS,
    coloured,
    rotated,
    shifted,
    turn,
)


@pytest.mark.parametrize("name", TASKS)
def test_every_image_is_in_one_domain_and_seeds_decide(name: str) -> None:
    task, again, other = TASKS[name](0), TASKS[name](0), TASKS[name](1)
    assert sum(len(y) for y in task.labels) == 1797 * task.copies
    assert len(task.domains) == len(task.images) == len(task.labels)
    for x, y, x2, y2 in zip(task.images, task.labels, again.images, again.labels, strict=True):
        assert len(x) == len(y)
        assert float(x.min()) >= 0 and float(x.max()) <= 1
        assert torch.equal(x, x2) and torch.equal(y, y2)
    assert not torch.equal(task.labels[0], other.labels[0])


def test_colour_predicts_in_training_and_misleads_in_the_test_domain() -> None:
    wrong = torch.zeros(len(COLOUR_FLIPS))
    for seed in range(20):
        task = coloured(seed)
        for d, (x, y) in enumerate(zip(task.images, task.labels, strict=True)):
            ink = x.flatten(2).sum(2)
            assert ((ink > 0).sum(1) == 1).all()  # one channel holds the digit, the other nothing
            wrong[d] += float(((ink[:, 1] > 0) != y.bool()).float().mean()) / 20
    # 20 x 599 draws: a standard deviation of 0.004
    assert torch.allclose(wrong, torch.tensor(COLOUR_FLIPS), atol=0.02)


def test_the_label_is_below_five_but_for_the_flips() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    digit = {
        image.tobytes(): int(y) for image, y in zip(bunch.images / 16, bunch.target, strict=True)
    }
    flipped, seen = 0, 0
    for seed in range(5):
        task = coloured(seed)
        for xs, ys in zip(task.images, task.labels, strict=True):
            still = len(ys) // task.copies * (task.copies // 2)  # the copies that are not moved
            rows = slice(still, still + len(ys) // task.copies)
            x, y = xs[rows], ys[rows]
            for image, label in zip(x.sum(1).double().numpy(), y.tolist(), strict=True):
                flipped += (digit[image.tobytes()] < 5) != bool(label)
                seen += 1
    assert seen == 5 * 1797
    assert abs(flipped / seen - LABEL_FLIP) < 0.02


def test_rotation_is_counter_clockwise_and_keeps_the_centre() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 7] = 1  # right of the centre
    turned = turn(image, 90)
    assert turned[0, 0].flatten().argmax() == 1 * 9 + 4  # above it
    assert torch.allclose(turn(image, 0), image, atol=1e-6)
    task = rotated(0)
    assert task.domains == tuple(f"{a}°" for a in ANGLES) and task.classes == 10


def test_shifts_move_by_up_to_a_pixel() -> None:
    image = torch.arange(1.0, 17).view(1, 4, 4)
    moved = shifted(image)
    assert len(moved) == SHIFTS and torch.equal(moved[SHIFTS // 2], image[0])
    assert len(moved.flatten(1).unique(dim=0)) == SHIFTS
    assert torch.equal(moved[0, 1:, 1:], image[0, :-1, :-1]) and not moved[0, 0].any()
