"""Patches that hold an object, by points and by the reference's blurred map."""

from __future__ import annotations

import torch

from counting_zoo.models.clip_count.loss import positive_patches, positive_patches_of_density
from counting_zoo.ops import points_to_counts, points_to_density


def test_patches_agree_with_the_reference_definition() -> None:
    # On corners, twice on one place, on a border of patches.
    some = torch.tensor([[0.0, 64.0], [96.0, 31.5], [40.2, 15.9], [40.2, 15.9], [70.0, 48.0]])
    points = [some, torch.zeros(0, 2)]
    density = points_to_density(points, (64, 96), sigma=1.0)
    official = positive_patches_of_density(density, (64, 96), 16)
    assert torch.equal(positive_patches(points, (64, 96), (4, 6), sigma=1.0), official)
    plain = positive_patches(points, (64, 96), (4, 6))
    assert torch.equal(plain, points_to_counts(points, (64, 96), 16) > 0)
    assert (official | ~plain).all()
    assert (official & ~plain).any()  # what the Gaussian alone reaches
    assert not official[1].any()
