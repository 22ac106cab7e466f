"""Layers that torch does not have so: BatchNorm that is frozen or leaves padding out, a convolution with its ReLU, a
box head for channels-last features, tensors that follow from settings."""

import copy
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead


class Constants(nn.Module):
    """fp32 tensors that follow from settings, as buffers: on the module's device, and not in its state dict.

    Their values are set again after each move, as `to_empty` leaves no values, and other dtypes would round them.
    """

    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        self._values = {name: value.to("cpu", torch.float32) for name, value in values.items()}
        for name, value in self._values.items():
            self.register_buffer(name, value.to(torch.empty(0).device), persistent=False)

    @torch.no_grad()
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Constants":
        super()._apply(fn, recurse)
        for name, value in self._values.items():
            # In place, as captured graphs read where they are.
            self._buffers[name] = self.get_buffer(name).float().copy_(value)
        return self

    def on(self, device: torch.device) -> list[Tensor]:
        """The tensors, which are on the device of the weights already; but for weights that were put, by a call or in
        parts, into a model from the meta device."""
        buffers = zip(self.buffers(), self._values.values(), strict=True)
        return [value.to(device) if buffer.is_meta else buffer for buffer, value in buffers]

    def leave_meta(self, device: torch.device) -> None:
        """Where weights were assigned to a model from the meta device, its buffers are still there."""
        for name, value in self._values.items():
            if self.get_buffer(name).is_meta:
                self._buffers[name] = value.to(device)


def place_constants(model: nn.Module, _: Any = None) -> None:
    """After a state dict was loaded: the constants on the device of the weights."""
    device = next(model.parameters()).device
    for module in model.modules():
        if isinstance(module, Constants):
            module.leave_meta(device)


def narrow(levels: Iterable[Tensor]) -> list[Tensor]:
    """float64 in fp32, the dtype in which the steps between the layers are computed; others as they are."""
    return [level.float() if level.dtype == torch.float64 else level for level in levels]


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
        wide = torch.where(mask, x.to(torch.promote_types(x.dtype, torch.float32)), 0.0)
        mean = wide.sum((0, 2, 3), keepdim=True) / number
        centered = torch.where(mask, wide - mean, 0.0)
        variance = centered.square().sum((0, 2, 3), keepdim=True) / number
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            dtype = self.running_mean.dtype
            momentum: Any = (1 / self.num_batches_tracked).to(dtype) if self.momentum is None else self.momentum
            unbiased = variance * (number / (number - 1).clamp(min=1))
            self.running_mean.lerp_(mean.flatten().to(dtype), momentum)
            self.running_var.lerp_(unbiased.flatten().to(dtype), momentum)
        scale = self.weight[:, None, None] * (variance + self.eps).rsqrt()
        return (centered * scale + self.bias[:, None, None]).to(x.dtype)


class ConvReLU2d(nn.Conv2d):
    """`nn.Conv2d` and the ReLU after it: one call of cuDNN on an NVIDIA GPU where no gradient is recorded, else two."""

    def forward(self, input: Tensor) -> Tensor:
        if self._is_one_call(input):
            # Autocast casts for a convolution, and not for this call.
            dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else input.dtype
            bias = None if self.bias is None else self.bias.to(dtype)
            shape: Any = self.stride, self.padding, self.dilation, self.groups
            return torch.cudnn_convolution_relu(input.to(dtype), self.weight.to(dtype), bias, *shape)
        return F.relu(super().forward(input), inplace=True)

    def _is_one_call(self, input: Tensor) -> bool:
        """Whether cuDNN's call computes the same here. It has no deterministic variant, and is not for few channels a
        group. It has no implementation for fake tensors; and a compiler joins the two itself, and would break off at
        the questions below."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        recorded = torch.is_grad_enabled() and (input.requires_grad or any(p.requires_grad for p in self.parameters()))
        cudnn = torch.backends.cudnn
        return (
            input.is_cuda
            and torch.version.hip is None
            and cudnn.is_available()
            and cudnn.enabled
            and not (cudnn.deterministic or torch.are_deterministic_algorithms_enabled())
            and not isinstance(input, FakeTensor)
            and not recorded
            and self.groups == 1
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
            and input.ndim == 4
            and (input.dtype == self.weight.dtype or torch.is_autocast_enabled("cuda"))
            and input.dtype in (torch.float16, torch.bfloat16, torch.float32)
        )


def join_relu(layers: nn.Sequential) -> None:
    """Let the convolutions of a chain that a ReLU follows compute it too; an `nn.Identity` takes the ReLU's place."""
    for first, second in pairwise(range(len(layers))):
        convolution = layers[first]
        if type(convolution) is nn.Conv2d and type(layers[second]) is nn.ReLU:
            layers[first], layers[second] = with_relu(convolution), nn.Identity()


def with_relu(convolution: nn.Conv2d) -> ConvReLU2d:
    """The convolution with a ReLU after it, of the same parameters."""
    joined: Any = copy.copy(convolution)
    joined.__class__ = ConvReLU2d
    return joined


class ConvFCHead(FastRCNNConvFCHead):
    """torchvision's head of convolutions, whose BatchNorm leaves padding out of its statistics.

    `RoIHeads` calls a head that has `takes_valid` with which rows are not padding.
    """

    takes_valid = True

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """`x` [N, C, h, w] to [N, D]; rows that are not `valid` (bool [N]) are padding.

        Raises ValueError without `valid` in training, where statistics over padding would be wrong unseen.
        """
        if self.training and valid is None:
            raise ValueError("in training the box head needs `valid`: a module around it must have `takes_valid` too")
        for block in self.children():
            for layer in block.children() if isinstance(block, nn.Sequential) else (block,):
                x = layer(x, valid) if isinstance(layer, MaskedBatchNorm2d) else layer(x)
        return x


class ChannelsLastMLPHead(TwoMLPHead):
    """`TwoMLPHead` that takes channels-last features without a copy; the columns of `fc6` are in their order."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [N, C, h, w]."""
        return super().forward(x.permute(0, 2, 3, 1))


def take_channels_last(head: TwoMLPHead, pool_size: int) -> None:
    """Let a head that is for inference alone take channels-last features, of `pool_size` x `pool_size` cells."""
    columns = head.fc6.weight.detach().unflatten(1, (-1, pool_size, pool_size)).permute(0, 2, 3, 1).flatten(1)
    head.fc6.weight = nn.Parameter(columns, requires_grad=False)
    head.__class__ = ChannelsLastMLPHead


def init_normal(layer: nn.Conv2d | nn.Linear, std: float) -> None:
    """Draw the weights from N(0, std) and set the biases to 0 (Ren et al. 2015, arXiv:1506.01497)."""
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
