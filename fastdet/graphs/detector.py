"""A whole detection as one CUDA graph for each padded shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdet.graphs import static_inputs
from fastdet.graphs.capture import GraphedModel, StaticStep
from fastdet.graphs.static_inputs import BatchShapes, Shape
from fastdet.graphs.step import autocast
from fastdet.models import preprocessing
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.structures import Detections


class GraphedDetector(GraphedModel):
    """Detection as one CUDA graph a bucket; called as the model is, with the same results.

    A batch is padded to the smallest bucket that holds it; missing images are blank, and left out of the result.

    A change of the model after a capture is refused, as of `GraphedTrainer`.

    Args:
        model: in evaluation mode.
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
        static_inputs.fill_inputs(program.inputs, (images, sizes, scales))
        return Detections(*(tensor[: len(images)] for tensor in program.run()))

    def _define_step(self, bucket: Shape) -> StaticStep:
        return StaticStep(self._detect, static_inputs.allocate_batch(bucket, self.device), ())

    @torch.no_grad()
    def _detect(self, images: Tensor, sizes: Tensor, scales: Tensor) -> Detections:
        with autocast(self.device, self.amp):
            _, found = self.model.forward_padded(
                images, sizes, None, scales, compute_losses=False, compute_detections=True
            )
        assert found is not None
        return found
