"""A whole training step, or a whole detection, as one CUDA graph for each padded shape.

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
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastdet.graphs import static_inputs
from fastdet.graphs.capture import Baked, Graphed, Program
from fastdet.graphs.static_inputs import Shape
from fastdet.graphs.step import COLUMNS, LossScale, autocast, check_owner, prepare, training_step
from fastdet.models import preprocessing
from fastdet.models.faster_rcnn import FasterRCNN
from fastdet.models.losses import NAMES
from fastdet.structures import Batch, Detections, Targets


class GraphedTrainer(Graphed):
    """Forward, losses, backward, clipping of gradients and the optimizer's step as one CUDA graph a bucket.

    A step takes what `model(images, targets)` takes and gives the same losses and weights as a loop of

        losses = model(images, targets)
        model.zero_grad()
        sum(losses.values()).backward()
        clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()

    over images padded to the bucket and ground truth padded to `max_boxes` rows. The first step of a bucket captures
    it, which waits for the device; the others do not. Two calls must not run at once, nor on two streams. A loss of an
    eager step that is still alive holds the parameters to that step's stream: let go of it before a capture.

    Gradients are not kept: `.grad` is None after a step, and gradients accumulated before are lost. What is drawn at
    random follows torch's generator of the device, so `torch.manual_seed` before any step fixes the run.

    What a step was captured with stays: a change of parameters, of what is frozen, of layers, modes, settings or the
    optimizer's numbers is refused, but that of a number inside a layer (a dropout's p) is not seen before `recapture`.

    Args:
        model: in training mode, where it is to train.
        optimizer: torch.optim.SGD(..., fused=True) without dampening, or AdamW(..., fused=True, capturable=True), with
            `lr=torch.tensor(...)`. It gets its state at once, and for each group a learning rate on the device, to be
            changed by `set_lr` or in place; torch's schedulers do so, those that change the momentum too are refused.
        batch_shape: (batch, channels, height, width) of the padded images, or several of them: a batch takes the
            smallest that holds its images and has just as many. Heights and widths are multiples of
            `settings.size_divisible`.
        max_boxes: the most ground-truth boxes of an image.
        amp: torch.bfloat16 or torch.float16 for autocast; the latter with a loss scale on the device.
        clip_norm: largest norm of all gradients together; 0 does not clip.
        memory_limit: bytes that graphs may keep; those not used for longest are dropped, and captured again when they
            are needed. None: no limit, and graphs share their memory.

    Raises:
        ValueError: an argument out of range, an optimizer that cannot be captured or is not of this model.
    """

    def __init__(
        self,
        model: FasterRCNN,
        optimizer: Optimizer,
        batch_shape: Sequence[int] | Sequence[Sequence[int]],
        max_boxes: int,
        *,
        amp: torch.dtype | None = None,
        clip_norm: float = 0.0,
        memory_limit: int | None = None,
    ) -> None:
        super().__init__(model, batch_shape, amp, memory_limit, training=True)
        if isinstance(max_boxes, bool) or not isinstance(max_boxes, int) or max_boxes < 1:
            raise ValueError(f"max_boxes must be a whole number from 1 on, got {max_boxes!r}")
        if not (clip_norm >= 0 and math.isfinite(clip_norm)):
            raise ValueError(f"clip_norm must be at least 0 and finite, got {clip_norm}")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("the model has no trainable parameters")
        self.optimizer, self.max_boxes, self.clip_norm = optimizer, max_boxes, clip_norm
        self._steps = 0
        self._unread: list[tuple[int, str, Tensor]] = []
        self._rates: list[Tensor] = []
        # Tensors of inference mode could not be changed outside it.
        with torch.inference_mode(False):
            self.loss_scale = LossScale.start(amp, self.device)
            self._prepare()

    def step(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]],
        ids: Sequence[object] | None = None,
    ) -> None:
        """Train on a batch; nothing is returned, as that would wait.

        Args:
            images, targets: as `model(images, targets)` takes them.
            ids: what to call the images in errors; None: by their number in the batch.

        Raises:
            ValueError: bad images or targets, a batch that fits no bucket, or more boxes than `max_boxes`.
            RuntimeError: something was changed that the captured step has baked in; `recapture` takes it over. Inside
                torch.autocast or torch.inference_mode.
        """
        batch, padded, _ = self.model.preprocess(images, targets)
        assert padded is not None
        self._check_boxes(max(len(target["boxes"]) for target in targets))
        self.step_padded(
            batch.images, batch.sizes, Targets(*(t[:, : self.max_boxes] for t in padded)), batch.scales, ids
        )

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
            images: fp32 [B, C, H, W], normalised.
            sizes: int64 [B, 2], (height, width) of each image inside the padding.
            targets: at most `max_boxes` rows an image.
            scales: fp32 [B], by how much each image was resized; 1 if left out.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("inside torch.inference_mode nothing can be learnt")
        bucket = static_inputs.choose(self.buckets, images, exact=True)
        self._check_boxes(targets.boxes.shape[1])
        static_inputs.check_padded(images, sizes, scales, targets)
        if ids is not None and len(ids) != len(images):
            raise ValueError(f"{len(images)} images, but {len(ids)} ids")
        program = self._program(bucket)
        static_inputs.fill(program.inputs, (images, sizes, scales, *targets))
        self._steps += 1
        names = ", ".join(map(str, range(len(images)) if ids is None else ids))
        # The next run writes over the row.
        self._unread.append((self._steps, names, program.run().clone()))

    def losses(self) -> list[dict[str, float]]:
        """Of each step since the last call a row, read from the device in one piece: this waits.

        Rows are kept until they are read, so read them now and then.

        A row has the "step" (from 1), the "loss" and the four of `fastdet.models.losses.NAMES` that it is the sum of,
        the "gradient_norm" before clipping, "skipped" (1 where the update was), and the "loss_scale".

        Raises:
            FloatingPointError: a loss or gradient was not finite; names all such steps and their images. They changed
                no weights, and the rows of the other steps are there for the next call. Under fp16 a gradient that is
                not finite only shows as "skipped", as the loss scale looks for the largest that does.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return []
        rows = torch.stack([row for _, _, row in unread]).tolist()
        checked = COLUMNS[: len(NAMES) + (self.amp != torch.float16)]
        good, bad = [], []
        for (step, names, row), values in zip(unread, rows, strict=True):
            named = dict(zip(COLUMNS, values, strict=True))
            if all(math.isfinite(named[name]) for name in checked):
                self._unread.append((step, names, row))
                good.append({"step": step, "loss": sum(values[: len(NAMES)]), **named})
            else:
                found = ", ".join(f"{name} {named[name]:.3g}" for name in checked)
                bad.append(f"step {step}: a loss or gradient is not finite ({found}), images {names}")
        if bad:
            raise FloatingPointError("; ".join(bad) + "; nothing was learnt from them")
        self._unread = []
        return good

    def set_lr(self, lr: float) -> None:
        """The learning rate from the next step on, times the "lr_factor" of a group that has one; does not wait."""
        for group in self.optimizer.param_groups:
            group["lr"].fill_(lr * group.get("lr_factor", 1.0))

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
        """Forget what was captured: the next step captures the model and the optimizer as they are then.

        Raises:
            ValueError: the optimizer cannot be captured any more.
        """
        super().recapture()
        with torch.inference_mode(False):
            self._prepare()

    def _prepare(self) -> None:
        check_owner(self.optimizer, self.model)
        self._rates = prepare(self.optimizer, self.device, self._rates)

    def _check_boxes(self, count: int) -> None:
        if count > self.max_boxes:
            raise ValueError(
                f"an image has {count} boxes, but the step holds at most max_boxes={self.max_boxes}: give "
                f"GraphedTrainer max_boxes={count} or more"
            )

    def _make(self, bucket: Shape) -> Program:
        boxes = torch.zeros(bucket[0], self.max_boxes, 4, device=self.device)
        labels = torch.zeros(boxes.shape[:2], dtype=torch.int64, device=self.device)
        inputs = [*static_inputs.blank(bucket, self.device), boxes, labels, torch.zeros_like(labels, dtype=torch.bool)]
        step = partial(
            training_step, self.model, self.optimizer, self.loss_scale, amp=self.amp, clip_norm=self.clip_norm
        )
        state = [value for each in self.optimizer.state.values() for value in each.values() if torch.is_tensor(value)]
        changed = [*self.model.parameters(), *self.model.buffers(), *state, *self.loss_scale]
        return self._build(lambda *tensors: step(Batch(*tensors[:3]), Targets(*tensors[3:])), inputs, changed)

    def _bake(self) -> Baked:
        return Baked(self.model, self.optimizer)


class GraphedDetector(Graphed):
    """Detection as one CUDA graph a bucket; called as the model is, it finds what the model finds.

    A batch is padded to the smallest bucket that holds it; missing images are blank, and left out of the result.

    Args:
        model: in evaluation mode.
        batch_shape, amp, memory_limit: as of `GraphedTrainer`.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        model: FasterRCNN,
        batch_shape: Sequence[int] | Sequence[Sequence[int]],
        *,
        amp: torch.dtype | None = None,
        memory_limit: int | None = None,
    ) -> None:
        super().__init__(model, batch_shape, amp, memory_limit, training=False)

    def __call__(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """As `model(images)`: for each image a dict of boxes [N, 4], labels [N] and scores [N], best first.

        Raises:
            ValueError: bad images, or a batch that fits no bucket.
            RuntimeError: something was changed that the captured graph has baked in; `recapture` takes it over.
        """
        batch, _, original_sizes = self.model.preprocess(images)
        # What is handed out stays as it is when the next call writes over the static tensors.
        found = Detections(*(tensor.clone() for tensor in self.padded(*batch)))
        return preprocessing.unbatch(found, original_sizes, batch.sizes, {})

    def padded(self, images: Tensor, sizes: Tensor, scales: Tensor | None = None) -> Detections:
        """As `model.forward_padded(images, sizes, None, scales)`; no host sync once captured.

        The result is written over by the next call.
        """
        bucket = static_inputs.choose(self.buckets, images, exact=False)
        static_inputs.check_padded(images, sizes, scales)
        program = self._program(bucket)
        static_inputs.fill(program.inputs, (images, sizes, scales))
        return Detections(*(tensor[: len(images)] for tensor in program.run()))

    def _make(self, bucket: Shape) -> Program:
        return self._build(self._detect, static_inputs.blank(bucket, self.device), ())

    @torch.no_grad()
    def _detect(self, images: Tensor, sizes: Tensor, scales: Tensor) -> Detections:
        with autocast(self.device, self.amp):
            _, found = self.model.forward_padded(
                images, sizes, None, scales, compute_losses=False, compute_detections=True
            )
        assert found is not None
        return found

    def _bake(self) -> Baked:
        return Baked(self.model)
