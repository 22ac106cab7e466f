"""BatchNorm that is frozen, and BatchNorm over a batch of fixed shape of which not every row counts."""

from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """torchvision's, in one pass over the features instead of two."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class RowBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose statistics leave out the rows that are padding.

    Set `rows` (bool [N], of the N rows of the next inputs) before the forward pass; None counts all.
    """

    rows: Tensor | None = None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is None or not self.training:
            return super().forward(x)
        counts = self.rows[:, None, None, None]
        number = (self.rows.sum() * (x.shape[2] * x.shape[3])).clamp(min=1)
        wide = torch.where(counts, x.float(), 0.0)
        mean = wide.sum((0, 2, 3), keepdim=True) / number
        centred = torch.where(counts, wide - mean, 0.0)
        variance = centred.square().sum((0, 2, 3), keepdim=True) / number
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            share: Any = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            unbiased = variance * (number / (number - 1).clamp(min=1))
            self.running_mean.lerp_(mean.flatten(), share)
            self.running_var.lerp_(unbiased.flatten(), share)
        scale = self.weight[:, None, None] * (variance + self.eps).rsqrt()
        return (centred * scale + self.bias[:, None, None]).to(x.dtype)
