"""The hyperparameters that a run has where they are not given."""

import pytest

from fastdet.engine.recipes import RECIPES, default_rate


@pytest.mark.parametrize(
    ("backbone", "optimizer", "batch_size", "rate"),
    [
        ("mobilenet_v2_fpn", "sgd", 4, 0.02),
        ("mobilenet_v2_fpn", "sgd", 16, 0.08),
        ("vgg16", "sgd", 1, 1e-3),
        ("vgg16", "sgd", 2, 2e-3),
        ("vgg16", "adamw", 1, 5e-5),
        ("mobilenet_v2", "adamw", 8, 4e-4),
    ],
)
def test_the_rate_is_proportional_to_the_batch(backbone, optimizer, batch_size, rate):
    assert default_rate(RECIPES[backbone], optimizer, batch_size) == pytest.approx(rate)
