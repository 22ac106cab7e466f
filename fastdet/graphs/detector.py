"""A whole detection as one CUDA graph for each padded shape."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from fastdet.graphs import static_inputs
from fastdet.graphs.batch_losses import autocast, castable_layers
from fastdet.graphs.capture import GraphedModel, StaticStep
from fastdet.graphs.static_inputs import BatchShapes, Shape
from fastdet.models import preprocessing
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.models.fuse import fuse
from fastdet.models.layers import take_channels_last
from fastdet.structures import Detections


class GraphedDetector(GraphedModel):
    """Detection as one CUDA graph a bucket; called as the model is, with the same results up to rounding.

    A batch is padded to the smallest bucket that holds it; missing images are blank, and left out of the result.

    What is captured is a copy of the model that `fastdet.fuse` made, whose weights are cast once to the dtype of `amp`.
    A change of the model after a capture is refused, as of `GraphedTrainer`; but the copy takes over values of
    parameters and buffers that were changed in place since the last call, by operators, `load_state_dict`, an
    optimizer's step or `GraphedTrainer`. Not noticed are writes through `.data`: call `recapture` after these.

    Args:
        model: in evaluation mode; it may be compiled, but not in a mode of torch.compile that makes CUDA graphs itself.
        batch_shape, amp, memory_limit, check_every_step: as of `GraphedTrainer`.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        model: FasterRCNN,
        batch_shape: BatchShapes,
        *,
        amp: torch.dtype | None = None,
        memory_limit: int | None = None,
        check_every_step: bool = False,
    ) -> None:
        super().__init__(model, batch_shape, amp, memory_limit, check_every_step, training=False)
        self._copy: FasterRCNN | None = None
        # The model's parameters and buffers, and how often each was changed when the copy took their values.
        self._sources: list[Tensor] = []
        self._versions: list[int] = []
        weakref.finalize(self, register_optimizer_step_post_hook(_count_changes).remove)

    def __call__(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """As `model(images)`: for each image a dict of boxes [N, 4], labels [N] and scores [N], best first.

        Raises:
            ValueError: bad images, or a batch that fits no bucket.
            RuntimeError: what the captured graph depends on was changed; `recapture` takes the change over.
        """
        batch, _, original_sizes = self.model.preprocess(images)
        # The results must not change when the next call writes over the static tensors.
        found = Detections(*(tensor.clone() for tensor in self.padded(*batch)))
        return preprocessing.unbatch(found, original_sizes, batch.sizes, {})

    def padded(self, images: Tensor, sizes: Tensor, scales: Tensor | None = None) -> Detections:
        """As `model.forward_padded(images, sizes, None, scales)`; no host sync once captured.

        The next call writes over the result.
        """
        bucket = static_inputs.choose_bucket(self.buckets, images, exact=False)
        static_inputs.check_padded_shapes(images, sizes, scales)
        program = self._program(bucket)
        self._update_copy()
        static_inputs.fill_inputs(program.inputs, (images, sizes, scales))
        return Detections(*(tensor[: len(images)] for tensor in program.run()))

    @property
    def nbytes(self) -> int:
        """Memory in bytes that the graphs, their static tensors and the copy of the model keep."""
        return super().nbytes + sum(tensor.nbytes for tensor in _tensors(self._copy))

    def recapture(self) -> None:
        super().recapture()
        self._copy = None

    def _define_step(self, bucket: Shape) -> StaticStep:
        if self._copy is None:
            self._copy, self._sources = self._make_copy(), _tensors(self.model)
            self._versions = _versions(self._sources)
        return StaticStep(self._detect, static_inputs.allocate_batch(bucket, next(self.model.parameters())), ())

    @torch.no_grad()
    def _detect(self, images: Tensor, sizes: Tensor, scales: Tensor) -> Detections:
        assert self._copy is not None
        with autocast(self.device, self.amp):
            _, found = self._copy.forward_padded(
                images, sizes, None, scales, compute_losses=False, compute_detections=True
            )
        assert found is not None
        return found

    def _make_copy(self) -> FasterRCNN:
        """The model fused, with weights in the dtype to which autocast would cast them in every call, and on a GPU,
        where features are pooled channels-last, in the order in which the box head reads them then."""
        fused = fuse(self.model)
        head = fused.roi_heads.box_head
        if self.device.type == "cuda" and type(head) is TwoMLPHead:
            take_channels_last(head, self.model.settings.box_pool_size)
        if self.amp is not None:
            for layer in castable_layers(fused):
                layer.to(self.amp)
        return fused

    @torch.no_grad()
    def _update_copy(self) -> None:
        """Let the copy have the values that the model has now; its tensors stay where they are."""
        versions = _versions(self._sources)
        if versions != self._versions:
            for tensor, value in zip(_tensors(self._copy), _tensors(self._make_copy()), strict=True):
                tensor.copy_(value)
            self._versions = versions


def _tensors(model: FasterRCNN | None) -> list[Tensor]:
    """Parameters and buffers."""
    return [] if model is None else [*model.parameters(), *model.buffers()]


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was changed in place; 0 for tensors of inference mode, of which torch does not count it."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _count_changes(optimizer: Optimizer, *_: Any) -> None:
    """Count a step as a change of its parameters: fused optimizers, other than operators, do not."""
    torch.autograd.graph.increment_version(
        [parameter for group in optimizer.param_groups for parameter in group["params"]]
    )
