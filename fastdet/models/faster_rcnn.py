"""The two-stage detector: a backbone, the region proposal network and the RoI heads."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign

from fastdet import inputs
from fastdet.interop.attributes import DETECTOR_ATTRIBUTES, RefuseAttributes
from fastdet.interop.torchvision_objects import Weights, settings_arguments
from fastdet.models import backbones, losses, preprocessing
from fastdet.models.anchors import AnchorGenerator, Size
from fastdet.models.layers import Constants, place_constants
from fastdet.models.roi_heads import RoIHeads, count_classes
from fastdet.models.rpn import RegionProposalNetwork
from fastdet.models.settings import FIXED_FIELDS, Settings
from fastdet.structures import Batch, Detections, Targets
from fastdet.weights.names import rename_former

Step = tuple[dict[str, Tensor] | None, Detections | None, dict[str, Tensor]]


class FasterRCNN(RefuseAttributes, nn.Module):
    """Faster R-CNN (Ren et al. 2015, arXiv:1506.01497) on fixed shapes, called as torchvision's is.

    Args:
        backbone: one of `fastdet.models.backbones.NAMED`, or a module with `out_channels` and, if it has them,
            `strides` (one number a level), that gives one feature map [B, C, H, W] or a dict of them.
        num_classes: with the background, so labels run from 1 to num_classes - 1. None takes those of `box_predictor`.
        weights_backbone: for a named backbone, torchvision's ImageNet weights (an enum or its name) or a file.
        progress: show the download of named weights.
        trainable_backbone_layers: for a named backbone, how many of its last blocks train.
        freeze_batchnorm: for a named backbone, use stored statistics; by default so with `weights_backbone`.
        rpn_head, box_head, box_predictor: modules in place of the default ones.
        box_roi_pool: torchvision's `MultiScaleRoIAlign`, another way to give the settings of pooling.
        settings: every hyperparameter. None takes torchvision's for a module, and for a named backbone its own.
        overrides: any field of `Settings` by name, e.g. `rpn_post_nms_top_n_test=500`. As `rpn_anchor_generator`,
            torchvision's own is taken too.

    Images have as many channels as `image_mean` has numbers; a named backbone is built for that many.

    Raises:
        TypeError: an unknown setting (the message lists similar names).
        ValueError: an argument or setting out of range.
    """

    refused_attributes = DETECTOR_ATTRIBUTES

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int | None = None,
        *,
        weights_backbone: Weights | None = None,
        progress: bool = True,
        trainable_backbone_layers: int | None = None,
        freeze_batchnorm: bool | None = None,
        rpn_head: nn.Module | None = None,
        box_head: nn.Module | None = None,
        box_predictor: nn.Module | None = None,
        box_roi_pool: MultiScaleRoIAlign | None = None,
        settings: Settings | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        settings = settings or backbones.default_settings(backbone)
        settings = settings.override(**settings_arguments(overrides, box_roi_pool, AnchorGenerator))
        num_classes = count_classes(num_classes, box_predictor)
        settings.check_classes(num_classes)
        choices = weights_backbone, trainable_backbone_layers, freeze_batchnorm
        if isinstance(backbone, str):
            channels = len(settings.image_mean)
            backbone, named_head = backbones.build(backbone, *choices, in_channels=channels, progress=progress)
            box_head = named_head if box_head is None else box_head
        elif choices != (None, None, None):
            names = "weights_backbone, trainable_backbone_layers and freeze_batchnorm"
            raise ValueError(f"{names} are for a backbone given by name; a module comes with its own weights")
        out_channels = getattr(backbone, "out_channels", None)
        if not isinstance(out_channels, int):
            raise ValueError(f"backbone must have an integer attribute out_channels, got {out_channels!r}")
        anchors = settings.rpn_anchor_generator.with_default_strides(getattr(backbone, "strides", None))
        settings = settings.override(rpn_anchor_generator=anchors)
        self._settings = settings
        self._compiled_step: Callable[..., Step] | None = None
        self.backbone, self._least_side = backbone, backbones.least_side(backbone)
        self.rpn = RegionProposalNetwork(out_channels, settings, rpn_head)
        self.roi_heads = RoIHeads(out_channels, num_classes, settings, box_head, box_predictor)
        mean, std = (torch.tensor(values, device="cpu") for values in (settings.image_mean, settings.image_std))
        self._pixel_statistics = Constants(mean=mean, std=std)
        self.register_load_state_dict_post_hook(place_constants)

    @property
    def settings(self) -> Settings:
        """Every hyperparameter. `model.settings = model.settings.override(box_score_thresh=0.3)` changes some; a change
        of what the layers were built for raises ValueError."""
        return self._settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        fixed = [name for name in FIXED_FIELDS if getattr(settings, name) != getattr(self._settings, name)]
        if fixed:
            raise ValueError(f"{', '.join(fixed)}: the layers are built for the old value; build another detector")
        self._settings = self.rpn._settings = self.roi_heads._settings = settings

    @property
    def num_classes(self) -> int:
        """With the background; of the predictor as it is now, which may have been replaced."""
        return self.roi_heads.num_classes

    def forward(
        self,
        images: Sequence[Tensor] | Tensor,
        targets: Sequence[Mapping[str, Tensor]] | None = None,
        return_losses: bool = False,
        return_features: bool = False,
        return_class_scores: bool = False,
    ) -> Any:
        """Losses in training, detections in evaluation; with `return_losses` both, in either mode.

        Args:
            images: [C, H, W], or one channel for all, floating point in 0..1 or uint8, of any sizes; or a stacked batch
                [B, C, H, W]. Moved to the model's device.
            targets: for each image a dict of boxes [N, 4] (pixels), labels [N] (1..num_classes - 1) and optionally
                ignore bool [N] (regions that are not trained on, such as crowds: no anchor or proposal learns to be
                background there) and seed int64 [] of what is sampled (in all or none; torch's generator draws it
                otherwise). Best left on the CPU, where they are checked.
            return_losses: give `(losses, detections)`; BatchNorm and dropout still follow `self.training`.
            return_features: give with each detection "features" [N, D], the output of the box head for the proposal
                that the detection comes from.
            return_class_scores: give with each detection "class_scores" [N, classes], the probabilities of all classes
                of that proposal, the background's first.

        Returns:
            A dict of "loss_classifier", "loss_box_reg", "loss_objectness" and "loss_rpn_box_reg"; or a list of dicts
            of boxes [N, 4] in pixels of the image as given, labels [N] and scores [N], best first.

        Raises:
            ValueError: naming the image's index, and the box's index and values, before any work.
        """
        _refuse_trace()
        compute_losses, compute_detections = self.training or return_losses, not self.training or return_losses
        if not compute_detections and (return_features or return_class_scores):
            raise ValueError("return_features and return_class_scores need detections: in training, return_losses too")
        if compute_losses and targets is None:
            inputs.check_images(images, self.settings.image_mean, self.settings.image_format)
            raise ValueError("targets are needed for the losses")
        batch, padded, original_sizes = self.preprocess(images, targets if compute_losses else None)
        step = self._compiled_step or FasterRCNN._step
        outputs = step(self, batch, padded, compute_losses, compute_detections, return_features, return_class_scores)
        weighted, detections, by_proposal = outputs
        if detections is None:
            return weighted
        results = preprocessing.unbatch(detections, original_sizes, batch.sizes, by_proposal)
        return (weighted, results) if return_losses else results

    def forward_padded(
        self,
        images: Tensor,
        sizes: Tensor,
        targets: Targets | None = None,
        scales: Tensor | None = None,
        *,
        compute_losses: bool | None = None,
        compute_detections: bool | None = None,
        divisors: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[dict[str, Tensor] | None, Detections | None]:
        """The whole detector on padded tensors: fixed shapes, no host sync. `compile` compiles it.

        Args:
            images: [B, C, H, W], normalized and padded, in the dtype of the backbone.
            sizes: int64 [B, 2], (height, width) of each image inside the padding.
            targets: ground truth, needed for the losses with at least one row (else ValueError).
            scales: fp32 [B], by how much each image was resized; None: 1.
            compute_losses, compute_detections: by default losses in training, detections in evaluation.
            divisors: given the fp32 [4] of `losses.count`, what to divide the losses by instead: that of all parts of
                a batch that is divided among processes or passes.

        Returns:
            The losses (by the hyperparameters of training) and Detections (of evaluation), None if not computed.
        """
        _refuse_trace()
        compute_losses = self.training if compute_losses is None else compute_losses
        compute_detections = not self.training if compute_detections is None else compute_detections
        if scales is None:
            scales = torch.ones(images.shape[0], dtype=torch.float32, device=images.device)
        step, batch = self._compiled_step or FasterRCNN._step, Batch(images, sizes, scales)
        return step(self, batch, targets, compute_losses, compute_detections, divisors=divisors)[:2]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the step behind `forward_padded` and `model(...)`, but not of copies and pickles of the model. The
        arguments are `torch.compile`'s; `fullgraph=True` works."""
        # Not of the bound method: replicas of DataParallel have this attribute too.
        self._compiled_step = torch.compile(FasterRCNN._step, *args, **kwargs)

    @property
    def compiled_step(self) -> Callable[..., Step] | None:
        """What `compile` made; None if it was not called."""
        return self._compiled_step

    def preprocess(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> tuple[Batch, Targets | None, list[Size]]:
        """Lists of images and targets, taken and refused as by `forward`, as padded tensors on the model's device: the
        batch and the targets for `forward_padded`, and the (height, width) of the images as given."""
        images = inputs.check_images(images, self.settings.image_mean, self.settings.image_format)
        checked = None
        if targets is not None:
            self.settings.check_classes(self.num_classes)
            checked = inputs.check_targets(targets, images, self.num_classes)
        weight, how = next(self.parameters()), (self.training, self._least_side)
        mean, std = self._pixel_statistics.on(weight.device)
        return preprocessing.make_batch(images, checked, self.settings, mean, std, weight.dtype, *how)

    def normalize(self, pixels: Tensor) -> Tensor:
        """The input of the backbone for `pixels` [B, C, H, W] in 0..1."""
        return preprocessing.normalize(pixels, self.settings, *self._pixel_statistics.on(pixels.device))

    def inspect(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Any]:
        """Every intermediate result of one pass, batched and padded, by name.

        Always: `images` [B, C, H, W], `features` (one level, or a list), `anchors` [K, 4], `anchors_inside` [B, K],
        `rpn_deltas` [B, K, 4], `rpn_logits` [B, K, 2 or 1], `proposals`, `pooled` [B, N, C, h, w], `box_features`
        [B, N, D], `box_deltas` [B, N, 4 * classes], `class_logits` [B, N, classes]. Without targets, by the
        hyperparameters of evaluation, N proposals and `detections`; with targets, by those of training, N samples,
        `anchor_labels` [B, K] in {-1, 0, 1}, `anchor_deltas` [B, K, 4], `samples` and `losses`.
        """
        batch, padded, _ = self.preprocess(images, targets)
        features = self.extract_features(batch.images)
        levels = list(features.values())
        rpn = self.rpn(levels, batch, padded, return_intermediates=True)
        proposals = rpn.proposals if padded is None else rpn.training_proposals
        roi = self.roi_heads(features, proposals, batch, padded)
        results = {
            "images": batch.images,
            "features": levels[0] if len(levels) == 1 else levels,
            "anchors": rpn.anchors,
            "anchors_inside": rpn.anchors_inside,
            "rpn_deltas": rpn.deltas,
            "rpn_logits": rpn.logits,
            "proposals": proposals,
            **{name: value for name, value in roi._asdict().items() if value is not None},
        }
        if padded is not None:
            results["losses"] = losses.weigh({**roi.losses, **rpn.losses}, self.settings.loss_weights)
            results["anchor_labels"], results["anchor_deltas"] = rpn.anchor_targets
        return results

    def extract_features(self, images: Tensor) -> dict[str, Tensor]:
        """The backbone's levels by name, [B, C, H, W] each, of `images` as `forward_padded` takes them: a ValueError if
        they have fewer pixels a side than the backbone needs."""
        if min(images.shape[-2:]) < self._least_side:
            raise ValueError(f"the backbone needs {self._least_side} pixels a side, got images {list(images.shape)}")
        features = self.backbone(images.contiguous(memory_format=torch.channels_last))
        return dict(features) if isinstance(features, Mapping) else {"0": features}

    def _step(
        self,
        batch: Batch,
        targets: Targets | None,
        compute_losses: bool,
        compute_detections: bool,
        return_features: bool = False,
        return_class_scores: bool = False,
        divisors: Callable[[Tensor], Tensor] | None = None,
    ) -> Step:
        """Losses and detections, None for what is not computed, and what `unbatch` gathers by proposal."""
        features = self.extract_features(batch.images)
        outputs = {"compute_losses": compute_losses, "compute_detections": compute_detections}
        rpn = self.rpn(list(features.values()), batch, targets, **outputs)
        weighted, detections, by_proposal = None, None, {}
        if compute_losses:
            roi = self.roi_heads(features, rpn.training_proposals, batch, targets)
            weighted = losses.weigh({**roi.losses, **rpn.losses}, self.settings.loss_weights)
            if divisors is not None:
                counts = losses.count(rpn.anchor_targets, roi.samples, self.roi_heads.class_weights)
                weighted = losses.divide_anew(weighted, counts, divisors(counts))
        if compute_detections:
            roi = self.roi_heads(features, rpn.proposals, batch)
            detections = roi.detections
            if return_features:
                by_proposal["features"] = roi.box_features
            if return_class_scores:
                by_proposal["class_scores"] = roi.class_logits.float().softmax(-1)
        return weighted, detections, by_proposal

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename_former(state_dict, self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compiled_step": None}  # it would go on with the weights of this model


def _refuse_trace() -> None:
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace would keep the batch's sizes: use fastdet.export.export_pt2 or export_onnx")
