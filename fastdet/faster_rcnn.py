"""The two-stage detector: a backbone, the region proposal network, the box head, and the door around them."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backbones, batching
from .anchors import Size, inside
from .config import Settings
from .roi_heads import RoIHeads
from .rpn import HeadOutput, RegionProposalNetwork
from .structures import Detections, Targets


class FasterRCNN(nn.Module):
    """Faster R-CNN (Ren et al. 2015, arXiv:1506.01497) on fixed shapes, called as torchvision's is.

    Args:
        backbone: "vgg16" or "mobilenet_v2" (torchvision's, cut at a stride of 16 pixels), "small", or a module with
            `out_channels` and, if it likes, `strides` (one number a level), that gives one feature map [B, C, H, W]
            or a dict of them.
        num_classes: with the background, so labels run from 1 to num_classes - 1.
        weights_backbone: for a named backbone, the name of torchvision's ImageNet weights or a file.
        trainable_backbone_layers: for a named backbone, how many of its last blocks train.
        freeze_batchnorm: for a named backbone, use stored statistics; by default so with `weights_backbone`.
        rpn_head, box_head, box_predictor: modules in place of the usual ones.
        settings: every number; the defaults are those of the VGG16 detector.
        overrides: any field of `Settings` by name, e.g. `rpn_post_nms_top_n_test=500`.

    Raises:
        TypeError: an unknown setting (the message lists the near ones).
        ValueError: a number out of range.
    """

    _image_mean: Tensor
    _image_std: Tensor

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int,
        *,
        weights_backbone: str | os.PathLike[str] | None = None,
        trainable_backbone_layers: int | None = None,
        freeze_batchnorm: bool | None = None,
        rpn_head: nn.Module | None = None,
        box_head: nn.Module | None = None,
        box_predictor: nn.Module | None = None,
        settings: Settings | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        self.settings = (settings or Settings()).override(**overrides)
        if not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(f"num_classes counts the background, so it is at least 2, got {num_classes!r}")
        if isinstance(backbone, str):
            named = backbones.build(backbone, weights_backbone, trainable_backbone_layers, freeze_batchnorm)
            backbone, box_head = named[0], named[1] if box_head is None else box_head
        elif weights_backbone is not None or trainable_backbone_layers is not None or freeze_batchnorm is not None:
            raise ValueError(
                "weights_backbone, trainable_backbone_layers and freeze_batchnorm are for a backbone given by name; "
                "a module comes with its own weights"
            )
        channels = getattr(backbone, "out_channels", None)
        if not isinstance(channels, int):
            raise ValueError(f"backbone must have an integer attribute out_channels, got {channels!r}")
        strides = getattr(backbone, "strides", None)
        if self.settings.rpn_anchor_generator.strides is None and strides is not None:
            anchors = replace(self.settings.rpn_anchor_generator, strides=tuple(strides))
            self.settings = self.settings.override(rpn_anchor_generator=anchors)
        self.num_classes = num_classes
        self.backbone = backbone
        self.rpn = RegionProposalNetwork(channels, self.settings, rpn_head)
        self.roi_heads = RoIHeads(channels, num_classes, self.settings, box_head, box_predictor)
        self.register_buffer("_image_mean", torch.tensor(self.settings.image_mean), persistent=False)
        self.register_buffer("_image_std", torch.tensor(self.settings.image_std), persistent=False)

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]] | None = None,
        return_losses: bool = False,
    ) -> Any:
        """Losses in training, detections in evaluation; with `return_losses` both, in either mode.

        Args:
            images: floating point [3, H, W] in 0..1, of any sizes; moved to the model's device.
            targets: for each image a dict of boxes [N, 4] (pixels), labels [N] (1..num_classes - 1) and, if wanted,
                ignore bool [N] (boxes that are not trained on). Best left on the CPU, where they are checked.
            return_losses: give `(losses, detections)`; BatchNorm and dropout follow `self.training` all the same.

        Returns:
            A dict of "loss_classifier", "loss_box_reg", "loss_objectness" and "loss_rpn_box_reg"; or a list of dicts
            of boxes [N, 4] in pixels of the image as given, labels [N] and scores [N], best first.

        Raises:
            ValueError: naming the image's index, and the box's index and values, before any work.
        """
        want_losses = self.training or return_losses
        want_detections = not self.training or return_losses
        batch, padded, originals = self._open(images, targets, want_losses)
        losses, detections = self.core(
            batch.images,
            batch.sizes,
            padded,
            batch.scales,
            want_losses=want_losses,
            want_detections=want_detections,
        )
        if detections is None:
            return losses
        results = batching.unbatch(detections, originals, batch.sizes)
        return (losses, results) if return_losses else results

    def core(
        self,
        images: Tensor,
        sizes: Tensor,
        targets: Targets | None = None,
        scales: Tensor | None = None,
        *,
        want_losses: bool | None = None,
        want_detections: bool | None = None,
    ) -> tuple[dict[str, Tensor] | None, Detections | None]:
        """The whole detector on padded tensors: fixed shapes, no wait of the host.

        Args:
            images: fp32 [B, C, H, W], normalised and padded.
            sizes: int64 [B, 2], (height, width) of each image inside the padding.
            targets: ground truth, needed for the losses.
            scales: fp32 [B], by how much each image was resized; 1 if left out.
            want_losses, want_detections: default to training and evaluation, as `self.training` says.

        Returns:
            The dict of losses (with the numbers of training) and the Detections (with the numbers of evaluation), or
            None for what is not wanted.
        """
        want_losses = self.training if want_losses is None else want_losses
        want_detections = not self.training if want_detections is None else want_detections
        if scales is None:
            scales = torch.ones(images.shape[0], device=images.device)
        seen = self._look(images)
        losses, detections = None, None
        if want_losses:
            if targets is None or targets.boxes.shape[1] == 0:
                raise ValueError("targets are needed for the losses, with at least one row (label 0 is padding)")
            losses = self._train(seen, sizes, scales, targets)["losses"]
        if want_detections:
            detections = self._detect(seen, sizes, scales)["detections"]
        return losses, detections

    def inspect(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Any]:
        """Every intermediate result of one pass, batched and padded, by name.

        Always: `images` [B, C, H, W], `features` (one level, or a list of them), `anchors` [K, 4], `anchors_inside`
        bool [B, K], `rpn_locs` [B, K, 4], `rpn_scores` [B, K, 2 or 1], `proposals` (Proposals), `pooled`
        [B, N, C, h, w], `cls_locs` [B, N, 4 * classes], `cls_scores` [B, N, classes].

        Without targets the numbers are those of evaluation, N is the number of proposals, and `detections`
        (Detections) is there. With targets they are those of training, N is the number of samples, and
        `anchor_labels` [B, K] in {-1, 0, 1}, `anchor_locs` [B, K, 4], `samples` (Samples) and `losses` are there.
        """
        batch, padded, _ = self._open(images, targets, targets is not None)
        seen = self._look(batch.images)
        if padded is None:
            results = self._detect(seen, batch.sizes, batch.scales)
        else:
            results = self._train(seen, batch.sizes, batch.scales, padded)
        anchors = self.rpn.anchors(seen.output, seen.image_size)
        logits, locs = self.rpn.flatten(seen.output)
        return {
            "images": batch.images,
            "features": seen.features[0] if len(seen.features) == 1 else seen.features,
            "anchors": anchors,
            "anchors_inside": inside(anchors, batch.sizes),
            "rpn_locs": locs,
            "rpn_scores": logits,
            **results,
        }

    def _look(self, images: Tensor) -> "_Seen":
        """Run the backbone and the RPN's head."""
        features = self.backbone(images)
        named = features if isinstance(features, Mapping) else {"0": features}
        wanted = self.settings.box_featmap_names
        missing = set(wanted or ()) - set(named)
        if missing:
            raise ValueError(f"box_featmap_names {sorted(missing)} are not among the backbone's {list(named)}")
        levels = list(named.values())
        pooled = levels if wanted is None else [named[name] for name in wanted]
        output, image_size = self.rpn(levels), (images.shape[-2], images.shape[-1])
        strides = dict(zip(named, self.rpn.strides(output, image_size), strict=True))
        scales = [_cells_per_pixel(strides[name][0]) for name in wanted or named]
        return _Seen(levels, pooled, scales, output, image_size)

    def _train(self, seen: "_Seen", sizes: Tensor, scales: Tensor, targets: Targets) -> dict[str, Any]:
        anchor_targets = self.rpn.assign(self.rpn.anchors(seen.output, seen.image_size), sizes, targets)
        proposals = self.rpn.propose(seen.output, sizes, scales, seen.image_size, training=True)
        samples = self.roi_heads.sample(proposals, targets)
        pooled = self.roi_heads.pool(seen.pooled_levels, samples.boxes, samples.weight > 0, seen.pooled_scales)
        scores, locs = self.roi_heads(pooled)
        rpn_losses = self.rpn.losses(*self.rpn.flatten(seen.output), anchor_targets)
        return {
            "anchor_labels": anchor_targets.labels,
            "anchor_locs": anchor_targets.locs,
            "proposals": proposals,
            "samples": samples,
            "pooled": pooled,
            "cls_scores": scores,
            "cls_locs": locs,
            "losses": self.roi_heads.losses(scores, locs, samples) | rpn_losses,
        }

    def _detect(self, seen: "_Seen", sizes: Tensor, scales: Tensor) -> dict[str, Any]:
        proposals = self.rpn.propose(seen.output, sizes, scales, seen.image_size, training=False)
        pooled = self.roi_heads.pool(seen.pooled_levels, proposals.boxes, proposals.taken, seen.pooled_scales)
        scores, locs = self.roi_heads(pooled)
        return {
            "proposals": proposals,
            "pooled": pooled,
            "cls_scores": scores,
            "cls_locs": locs,
            "detections": self.roi_heads.detect(scores, locs, proposals, sizes),
        }

    def _open(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None, want_targets: bool
    ) -> tuple[batching.Batch, Targets | None, list[Size]]:
        """Check lists of images and targets and turn them into padded tensors on the model's device."""
        if self._image_mean.dtype != torch.float32:
            raise TypeError(f"the model must be in float32, got {self._image_mean.dtype}; for less, use torch.autocast")
        batching.check_images(images, len(self.settings.image_mean))
        if want_targets and targets is None:
            raise ValueError("targets are needed for the losses")
        checked = batching.check_targets(targets, images, self.num_classes) if want_targets else None
        originals = [(image.shape[-2], image.shape[-1]) for image in images]
        batch = batching.batch_images(images, self.settings, self._image_mean, self._image_std, self.training)
        padded = None if checked is None else batching.batch_targets(checked, originals, batch.sizes)
        return batch, padded, originals


class _Seen(NamedTuple):
    """What both passes start from: all feature levels, those that are pooled and their cells a pixel, the RPN head's
    outputs, and the padded (height, width)."""

    features: list[Tensor]
    pooled_levels: list[Tensor]
    pooled_scales: list[float]
    output: HeadOutput
    image_size: Size


def _cells_per_pixel(stride: int) -> float:
    """The power of two nearest to 1 / stride: strides are powers of two, but for what rounding down made of them."""
    return 2.0 ** -round(math.log2(stride))


def fasterrcnn_vgg16(
    num_classes: int = 21,
    *,
    weights: str | os.PathLike[str] | None = None,
    weights_backbone: str | os.PathLike[str] | None = None,
    trainable_backbone_layers: int | None = None,
    **overrides: Any,
) -> FasterRCNN:
    """The VGG16 detector of Ren et al. 2015: stride 16, RoI max-pooling, fc6 and fc7 from the classifier.

    Args:
        num_classes: with the background; 21 for PASCAL VOC.
        weights: a file with a state dict of this detector.
        weights_backbone: the name of torchvision's VGG16 weights, e.g. "IMAGENET1K_V1", or a file.
        trainable_backbone_layers: of the five blocks of convolutions, how many of the last train; 3 with pretrained
            weights (conv1 and conv2 frozen), else all.
        overrides: fields of `Settings`.
    """
    model = FasterRCNN(
        "vgg16",
        num_classes,
        weights_backbone=weights_backbone,
        trainable_backbone_layers=trainable_backbone_layers,
        **overrides,
    )
    if weights is not None:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model
