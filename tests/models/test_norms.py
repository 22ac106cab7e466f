"""BatchNorm that leaves out padding, against torch's on the valid rows."""

import pytest
import torch
from torch import nn

from fastdet.models.norms import FrozenBatchNorm2d, MaskedBatchNorm2d


@pytest.mark.parametrize("momentum", [0.1, None])
def test_rows_of_padding_have_no_effect(momentum):
    x = torch.randn(7, 3, 2, 4) * 3 + 1
    rows = torch.tensor([True, False, True, True, False, True, False])
    ours, theirs = MaskedBatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    for norm in (ours, theirs):
        nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(2))
    for _ in range(2):
        noisy = torch.where(rows[:, None, None, None], x, torch.full_like(x, torch.nan)).requires_grad_()
        plain = x[rows].requires_grad_()
        found, expected = ours(noisy, rows), theirs(plain)
        torch.testing.assert_close(found[rows], expected)
        (found[rows] ** 3).sum().backward()
        (expected**3).sum().backward()
        torch.testing.assert_close(noisy.grad[rows], plain.grad, rtol=1e-4, atol=1e-4)
        x = x * 2 + 1
    for (name, expected), found in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-3)
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


def test_without_a_mask_it_is_torchs():
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(MaskedBatchNorm2d(3)(x), nn.BatchNorm2d(3)(x))
    norm = MaskedBatchNorm2d(3)
    assert torch.isfinite(norm(x, torch.zeros(4, dtype=torch.bool))).all(), "no row at all"
    assert torch.isfinite(norm.running_var).all()


def test_frozen_is_batchnorm_in_evaluation():
    plain, frozen = nn.BatchNorm2d(3), FrozenBatchNorm2d(3)
    plain(torch.randn(8, 3, 4, 4))
    frozen.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(frozen(x), plain.eval()(x))
    assert not list(frozen.parameters())
