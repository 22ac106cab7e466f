"""A whole training step as one CUDA graph for each padded shape.

At small batches a GPU waits for the host to launch some thousand kernels; a graph launches them at once. On a device
without CUDA the same step runs eagerly, through the same checks, so that a script does not branch.

    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.01), momentum=0.9, fused=True)
    trainer = GraphedTrainer(model.train(), optimizer, (4, 3, 608, 1024), max_boxes=64, amp=torch.float16)
    for images, targets in loader:
        trainer.step(images, targets)
    print(trainer.losses())
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastdet.graphs import static_inputs
from fastdet.graphs.batch_losses import PaddedLosses, batch_losses
from fastdet.graphs.capture import GraphedModel, StaticStep
from fastdet.graphs.guards import CaptureGuard
from fastdet.graphs.optimizers import prepare_optimizer, set_learning_rate
from fastdet.graphs.rows import UnreadRows, describe
from fastdet.graphs.static_inputs import BatchShapes, Shape
from fastdet.graphs.step import LossScale, checked_columns, training_step
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.models.preprocessing import draw_seeds
from fastdet.structures import Batch, Targets


class GraphedTrainer(GraphedModel):
    """Forward, losses, backward, clipping of gradients and the optimizer's step as one CUDA graph a bucket.

    A step takes what `model(images, targets)` takes and gives the same losses and weights as a loop of

        losses = model(images, targets)
        model.zero_grad()
        sum(losses.values()).backward()
        clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()

    over images padded to the bucket and ground truth padded to `max_boxes` rows. The first step of a bucket captures
    it, which is a host sync; the others are free of them. Two calls must not run at once, nor on two streams. A loss
    of an eager step that is still alive holds the parameters to that step's stream: let go of it before a capture.

    Gradients are not kept: `.grad` is None after a step, and gradients accumulated before are lost. What is drawn at
    random follows torch's generator of the device, so `torch.manual_seed` before any step fixes the run.

    A captured step goes on using what it was captured with, so a change of that is refused until `recapture`:

    - at every step: the trainer's `optimizer`, `max_boxes`, `amp`, `clip_norm`, `check_gradients`, `accumulate` and
      `loss_scale`; the mode of the model, its `settings`, `model.compile`, its first parameter (`model.to` moves, and
      `load_state_dict(assign=True)` replaces all); the optimizer's groups with their options, learning-rate tensors and
      numbers of parameters, and its state as a whole;
    - at a capture, at the bucket's three steps after it, and at every step with `check_every_step`: each layer and its
      mode, each parameter, buffer and tensor of the optimizer by identity and address, and which are frozen. By
      default a later change of these has no effect on the captured step, or makes it write to freed memory;
    - never: a plain attribute of a layer, such as a dropout's p.

    Args:
        model: in training mode, on the device where it is to train; compiled or not, as of `GraphedDetector`. The
            weights of its convolutions become channels-last.
        optimizer: torch.optim.SGD(..., fused=True) without dampening, or AdamW(..., fused=True, capturable=True), with
            `lr=torch.tensor(...)`. It gets its state at once, and for each group a learning rate on the device, to be
            changed by `set_lr` or in place; torch's schedulers do so, those that change the momentum too are refused.
        batch_shape: (batch, channels, height, width) of the padded images, or several of them: a batch takes the
            smallest that holds its images and has just as many. Without `settings.size_buckets`, heights and widths are
            multiples of `settings.size_divisible`.
        max_boxes: the most ground-truth boxes of an image.
        amp: torch.bfloat16 or torch.float16 for autocast; the latter with a loss scale on the device.
        clip_norm: largest norm of all gradients together; 0 does not clip.
        check_gradients: look for gradients that are not finite, by their norm. False saves a pass over all gradients
            where neither `clip_norm` nor fp16 needs the norm; then a step is skipped for its losses alone.
        accumulate: parts of a batch that go through the network one after another, for less memory; the step is that of
            the whole batch. With several it goes forward twice.
        memory_limit: bytes that graphs may keep; the least recently used are dropped, and captured again when they are
            needed. None: no limit, and graphs share their memory.
        check_every_step: compare everything at every step, for some tenths of a millisecond of the host's time.

    Raises:
        ValueError: an argument out of range, an optimizer that cannot be captured or is not of this model.
    """

    _arguments = ("model", "amp", "optimizer", "max_boxes", "clip_norm", "check_gradients", "accumulate", "loss_scale")

    def __init__(
        self,
        model: FasterRCNN,
        optimizer: Optimizer,
        batch_shape: BatchShapes,
        max_boxes: int,
        *,
        amp: torch.dtype | None = None,
        clip_norm: float = 0.0,
        check_gradients: bool = True,
        accumulate: int = 1,
        memory_limit: int | None = None,
        check_every_step: bool = False,
    ) -> None:
        super().__init__(model, batch_shape, amp, memory_limit, check_every_step, training=True)
        if isinstance(max_boxes, bool) or not isinstance(max_boxes, int) or max_boxes < 1:
            raise ValueError(f"max_boxes must be a whole number from 1 on, got {max_boxes!r}")
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate must be a whole number from 1 on, got {accumulate!r}")
        if not (clip_norm >= 0 and math.isfinite(clip_norm)):
            raise ValueError(f"clip_norm must be at least 0 and finite, got {clip_norm}")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("the model has no trainable parameters")
        self.optimizer, self.max_boxes, self.clip_norm = optimizer, max_boxes, clip_norm
        self.check_gradients, self.accumulate = check_gradients, accumulate
        self._steps = 0
        self._unread: UnreadRows[str] = UnreadRows()
        self._read: list[dict[str, float]] = []
        self._rates: list[Tensor] = []
        # Tensors of inference mode could not be changed outside it.
        with torch.inference_mode(False):
            self.loss_scale = LossScale.initial(amp, self.device)
        # As a GPU's matrix units take weights; a state dict does not show it.
        model.to(memory_format=torch.channels_last)
        self._prepare_optimizer()

    def step(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]], ids: Sequence[object] | None = None
    ) -> None:
        """Train on a batch; nothing is returned, as that would be a host sync.

        Args:
            images, targets: as `model(images, targets)` takes them.
            ids: the names of the images in errors; None: their indices in the batch.

        Raises:
            ValueError: bad images or targets, a batch that fits no bucket, or more boxes than `max_boxes`.
            RuntimeError: what the captured step depends on was changed; `recapture` takes the change over. Inside
                torch.autocast or torch.inference_mode.
        """
        batch, padded, _ = self.model.preprocess(images, targets)
        assert padded is not None
        # Without rows of padding that the step does not hold.
        rows = max(self.max_boxes, *(len(target["boxes"]) for target in targets))
        padded = Targets(padded.boxes[:, :rows], padded.labels[:, :rows], padded.ignore[:, :rows], padded.seeds)
        self.step_padded(batch.images, batch.sizes, padded, batch.scales, ids)

    def step_padded(
        self,
        images: Tensor,
        sizes: Tensor,
        targets: Targets,
        scales: Tensor | None = None,
        ids: Sequence[object] | None = None,
    ) -> None:
        """As `step`, of what `model.forward_padded` takes: only shapes are checked. Smaller tensors are padded.

        Args:
            images: fp32 [B, C, H, W], normalized.
            sizes: int64 [B, 2], (height, width) of each image inside the padding.
            targets: at most `max_boxes` rows an image.
            scales: fp32 [B], by how much each image was resized; None: 1.
        """
        if ids is not None and len(ids) != len(images):
            raise ValueError(f"{len(images)} images, but {len(ids)} ids")
        row = self.replay(images, sizes, targets, scales)
        self._steps += 1
        self._unread.add(self._steps, ", ".join(map(str, range(len(images)) if ids is None else ids)), row)

    def holds(self, batch: Batch, targets: Targets) -> bool:
        """Whether a bucket takes a batch, with its ground truth."""
        count, _, height, width = batch.images.shape
        fits = any(bucket[0] == count and bucket[2] >= height and bucket[3] >= width for bucket in self.buckets)
        return fits and targets.labels.shape[1] <= self.max_boxes

    def replay(self, images: Tensor, sizes: Tensor, targets: Targets, scales: Tensor | None = None) -> Tensor:
        """As `step_padded`, but the row of the step, as of `fastdet.graphs.step.training_step`, is given back at once,
        on the device, and not kept for `losses`."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError("inside torch.inference_mode nothing can be learned")
        bucket = static_inputs.choose_bucket(self.buckets, images, exact=True)
        static_inputs.check_padded_shapes(images, sizes, scales, targets)
        count = targets.labels.shape[1]
        if count > self.max_boxes:
            raise ValueError(
                f"an image has {count} boxes, but the step holds at most max_boxes={self.max_boxes}: give "
                f"GraphedTrainer max_boxes={count} or more"
            )
        program = self._program(bucket)
        seeds = draw_seeds(len(images), self.device) if targets.seeds is None else targets.seeds
        static_inputs.fill_inputs(program.inputs, (images, sizes, scales, *targets[:3], seeds))
        # The next run writes over the row.
        row: Tensor = program.run().clone()
        return row

    def losses(self) -> list[dict[str, float]]:
        """A row for each step since the last call, read from the device in one piece: a host sync.

        Rows are kept until they are read, so read them now and then.

        A row has the "step" (from 1), the "loss" and the four of `fastdet.models.losses.NAMES` that it is the sum of,
        the "gradient_norm" before clipping (NaN without `check_gradients`, where
        nothing needs it), "skipped" (1 where the update was), and the "loss_scale".

        Raises:
            FloatingPointError: a loss or gradient was not finite; names all such steps and their images. They changed
                no weights, and the rows of the other steps are there for the next call. Under fp16 a gradient that is
                not finite only shows as "skipped", as the loss scale looks for the largest that does not overflow.
        """
        checked = checked_columns(self.amp, self.clip_norm, self.check_gradients)
        finite, others = self._unread.read(checked)
        self._read += [{"step": row.step, **row.values} for row in finite]
        if others:
            errors = [describe(row, checked, row.about) for row in others]
            raise FloatingPointError("; ".join(errors) + "; nothing was learned from them")
        read, self._read = self._read, []
        return read

    def set_lr(self, lr: float) -> None:
        """The learning rate from the next step on, times the "lr_factor" of a group that has one; no host sync."""
        set_learning_rate(self.optimizer, lr)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model's and the optimizer's states: the steps taken, the loss scale.

        Losses that were not read are not in it.
        """
        scale = {name: tensor.clone() for name, tensor in self.loss_scale._asdict().items()}
        return {"steps": self._steps, "amp": self.amp, **scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; captured steps stay.

        Load the model's and the optimizer's states before the trainer is made: the optimizer's replaces what it holds.

        Raises:
            ValueError: other entries than `state_dict` gives; a loss scale where none is used, or none where one is.
        """
        names = {"steps", "amp", *LossScale._fields}
        if set(state) != names:
            raise ValueError(f"state must have the entries {sorted(names)}, got {sorted(state)}")
        if torch.float16 in (self.amp, state["amp"]) and self.amp != state["amp"]:
            raise ValueError(f"the state is of steps with amp={state['amp']}, and these have amp={self.amp}")
        self._steps = int(state["steps"])
        for name, tensor in self.loss_scale._asdict().items():
            tensor.copy_(state[name])

    def recapture(self) -> None:
        """Drop what was captured: the next step captures the model and the optimizer as they are then.

        Raises:
            ValueError: the optimizer cannot be captured any more.
        """
        super().recapture()
        self._prepare_optimizer()

    def _create_guard(self) -> CaptureGuard:
        return CaptureGuard(self.model, self.optimizer)

    def _prepare_optimizer(self) -> None:
        with torch.inference_mode(False):
            self._rates = prepare_optimizer(self.optimizer, self.model, self._rates)

    def _define_step(self, bucket: Shape) -> StaticStep:
        # What was changed since the last capture may need state of its own.
        self._prepare_optimizer()

        def step(*tensors: Tensor) -> Tensor:
            batch, targets = Batch(*tensors[:3]), Targets(*tensors[3:])
            return training_step(
                self.model,
                self.optimizer,
                self.loss_scale,
                batch_losses(PaddedLosses(self.model), batch, targets, amp=self.amp, accumulate=self.accumulate),
                amp=self.amp,
                clip_norm=self.clip_norm,
                check_gradients=self.check_gradients,
            )

        batch = static_inputs.allocate_batch(bucket, next(self.model.parameters()))
        targets = static_inputs.allocate_targets(bucket[0], self.max_boxes, self.device)
        state = [value for each in self.optimizer.state.values() for value in each.values() if torch.is_tensor(value)]
        changed = [*self.model.parameters(), *self.model.buffers(), *state, *self.loss_scale]
        inputs = *batch, *(tensor for tensor in targets if tensor is not None)
        return StaticStep(step, inputs, changed)
