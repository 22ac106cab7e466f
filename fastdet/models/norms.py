"""BatchNorm that is frozen, and BatchNorm over a batch of fixed shape of which some rows are padding."""

from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """torchvision's, in one pass over the features instead of two."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class MaskedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics leave out the rows that are padding."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """`x` [N, C, H, W]; `valid` bool [N] is False for padding, None counts every row."""
        if valid is None or not self.training:
            return super().forward(x)
        mask = valid[:, None, None, None]
        number = (valid.sum() * (x.shape[2] * x.shape[3])).clamp(min=1)
        wide = torch.where(mask, x.float(), 0.0)
        mean = wide.sum((0, 2, 3), keepdim=True) / number
        centered = torch.where(mask, wide - mean, 0.0)
        variance = centered.square().sum((0, 2, 3), keepdim=True) / number
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            momentum: Any = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            unbiased = variance * (number / (number - 1).clamp(min=1))
            self.running_mean.lerp_(mean.flatten(), momentum)
            self.running_var.lerp_(unbiased.flatten(), momentum)
        scale = self.weight[:, None, None] * (variance + self.eps).rsqrt()
        return (centered * scale + self.bias[:, None, None]).to(x.dtype)
