"""The two-stage detector: a backbone, the region proposal network, the box head, and the door around them."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign

from fastdet.interop import torchvision_objects
from fastdet.models import backbones, padding, preprocessing
from fastdet.models.anchors import Size, inside
from fastdet.models.losses import NAMES
from fastdet.models.roi_heads import RoIHeads
from fastdet.models.rpn import RegionProposalNetwork
from fastdet.models.settings import MADE_FOR, TORCHVISION, VGG16, Settings
from fastdet.structures import Detections, Proposals, Seen, Targets


class FasterRCNN(nn.Module):
    """Faster R-CNN (Ren et al. 2015, arXiv:1506.01497) on fixed shapes, called as torchvision's is.

    Args:
        backbone: one of `fastdet.models.backbones.NAMED`, or a module with `out_channels` and, if it likes, `strides`
            (one number a level), that gives one feature map [B, C, H, W] or a dict of them.
        num_classes: with the background, so labels run from 1 to num_classes - 1. None takes those of `box_predictor`.
        weights_backbone: for a named backbone, torchvision's ImageNet weights (an enum or its name) or a file.
        progress: show the download of named weights.
        trainable_backbone_layers: for a named backbone, how many of its last blocks train.
        freeze_batchnorm: for a named backbone, use stored statistics; by default so with `weights_backbone`.
        rpn_head, box_head, box_predictor: modules in place of the usual ones.
        box_roi_pool: torchvision's `MultiScaleRoIAlign`, another way to say the settings of pooling.
        settings: every number. The defaults are those of the named backbone (torchvision's for a feature pyramid); for
            a module torchvision's, if it or another argument is torchvision's pyramid, anchors or pooling, and those
            of the VGG16 detector otherwise.
        overrides: any field of `Settings` by name, e.g. `rpn_post_nms_top_n_test=500`. As `rpn_anchor_generator`,
            torchvision's own is taken too.

    Images have as many channels as `image_mean` has numbers; a named backbone is made for that many.

    Raises:
        TypeError: an unknown setting (the message lists the near ones).
        ValueError: a number out of range.
    """

    _image_mean: Tensor
    _image_std: Tensor

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int | None = None,
        *,
        weights_backbone: torchvision_objects.Weights | None = None,
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
        known = backbones.NAMED.get(backbone) if isinstance(backbone, str) else None
        if settings is None:
            usual = TORCHVISION if torchvision_objects.is_torchvisions(backbone, overrides, box_roi_pool) else VGG16
            settings = usual if known is None else known.settings
        settings = settings.override(**torchvision_objects.overrides(overrides, box_roi_pool))
        num_classes = torchvision_objects.count_classes(num_classes, box_predictor)
        channels = len(settings.image_mean)
        if isinstance(backbone, str):
            choices = weights_backbone, trainable_backbone_layers, freeze_batchnorm
            backbone, named_head = backbones.build(backbone, *choices, in_channels=channels, progress=progress)
            box_head = named_head if box_head is None else box_head
        elif weights_backbone is not None or trainable_backbone_layers is not None or freeze_batchnorm is not None:
            raise ValueError(
                "weights_backbone, trainable_backbone_layers and freeze_batchnorm are for a backbone given by name; "
                "a module comes with its own weights"
            )
        width = getattr(backbone, "out_channels", None)
        if not isinstance(width, int):
            raise ValueError(f"backbone must have an integer attribute out_channels, got {width!r}")
        strides = getattr(backbone, "strides", None)
        if settings.rpn_anchor_generator.strides is None and strides is not None:
            anchors = replace(settings.rpn_anchor_generator, strides=tuple(strides))
            settings = settings.override(rpn_anchor_generator=anchors)
        settings.check_classes(num_classes)
        self._settings = settings
        self.backbone = backbone
        self.rpn = RegionProposalNetwork(width, self.settings, rpn_head)
        self.roi_heads = RoIHeads(width, num_classes, self.settings, box_head, box_predictor)
        self._num_classes = num_classes
        self._padding = padding.Mask()
        if settings.mask_padding:
            known_strides = strides if known is None else known.strides
            if known_strides is not None:
                pooled = known_strides[: len(settings.box_featmap_names or known_strides)]
                padding.require_multiples(max(pooled), settings.size_divisible)
            # A head that takes the place of this one afterwards is not masked: give it as `rpn_head`.
            self._padding.attach(self.backbone, self.rpn.head)
        # Convolutions are fastest so, on a GPU's matrix units and on a CPU; a state dict does not show it.
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.register_buffer("_image_mean", torch.tensor(self.settings.image_mean), persistent=False)
        self.register_buffer("_image_std", torch.tensor(self.settings.image_std), persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles have: all but a compiled core, which would go on with the weights of this model."""
        state: dict[str, Any] = super().__getstate__()
        state.pop("core", None)
        return state

    @property
    def settings(self) -> Settings:
        """Every number. `model.settings = model.settings.override(box_score_thresh=0.3)` changes some afterwards.

        Raises:
            ValueError: on a change of what the layers were made for.
        """
        return self._settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        fixed = [name for name in MADE_FOR if getattr(settings, name) != getattr(self._settings, name)]
        if fixed:
            raise ValueError(f"{', '.join(fixed)}: the layers are made for the old value; build another detector")
        self._settings = self.rpn.settings = self.roi_heads.settings = settings

    @property
    def num_classes(self) -> int:
        """With the background; of the predictor as it is now, which may have been replaced."""
        scores = getattr(self.roi_heads.box_predictor, "cls_score", None)
        return int(getattr(scores, "out_features", self._num_classes))

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]] | None = None,
        return_losses: bool = False,
        return_features: bool = False,
        return_class_scores: bool = False,
    ) -> Any:
        """Losses in training, detections in evaluation; with `return_losses` both, in either mode.

        Args:
            images: [C, H, W], floating point in 0..1 or uint8, of any sizes; moved to the model's device.
            targets: for each image a dict of boxes [N, 4] (pixels), labels [N] (1..num_classes - 1) and, if wanted,
                ignore bool [N] (regions that are not trained on, such as crowds: no anchor or proposal learns to be
                background where they are). Best left on the CPU, where they are checked.
            return_losses: give `(losses, detections)`; BatchNorm and dropout follow `self.training` all the same.
            return_features: give with each detection "features" [N, D], what the box head makes of the proposal that
                the detection comes from.
            return_class_scores: give with each detection "class_scores" [N, classes], the probabilities of all classes
                of that proposal, the background's first.

        Returns:
            A dict of "loss_classifier", "loss_box_reg", "loss_objectness" and "loss_rpn_box_reg"; or a list of dicts
            of boxes [N, 4] in pixels of the image as given, labels [N] and scores [N], best first.

        Raises:
            ValueError: naming the image's index, and the box's index and values, before any work.
        """
        want_losses = self.training or return_losses
        want_detections = not self.training or return_losses
        if not want_detections and (return_features or return_class_scores):
            raise ValueError(
                "return_features and return_class_scores are of detections: in training, return_losses too"
            )
        batch, padded, originals = self._open(images, targets, want_losses)
        wanted = {}
        if return_features or return_class_scores:
            losses, found = self._step(batch, padded, want_losses, want_detections)
            assert found is not None
            detections = found["detections"]
            if return_features:
                wanted["features"] = found["box_features"]
            if return_class_scores:
                wanted["class_scores"] = found["cls_scores"].float().softmax(-1)
        else:
            # By its name, so that a compiled one takes its place.
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
        results = preprocessing.unbatch(detections, originals, batch.sizes, wanted)
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

        `model.core = torch.compile(model.core, fullgraph=True)` compiles it for `model(...)` too, except with
        `return_features` or `return_class_scores`; a copy of the model is not compiled.

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
        losses, found = self._step(preprocessing.Batch(images, sizes, scales), targets, want_losses, want_detections)
        return losses, None if found is None else found["detections"]

    def _step(
        self, batch: preprocessing.Batch, targets: Targets | None, want_losses: bool, want_detections: bool
    ) -> tuple[dict[str, Tensor] | None, dict[str, Any] | None]:
        """The losses, and what `_detect` gives; None for what is not wanted."""
        seen = self._look(batch.images, batch.sizes)
        losses, found = None, None
        if want_losses:
            if targets is None or targets.boxes.shape[1] == 0:
                raise ValueError("targets are needed for the losses, with at least one row (label 0 is padding)")
            losses = self._train(seen, batch, targets)["losses"]
        if want_detections:
            found = self._detect(seen, batch)
        return losses, found

    def inspect(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Any]:
        """Every intermediate result of one pass, batched and padded, by name.

        Always: `images` [B, C, H, W], `features` (one level, or a list of them), `anchors` [K, 4], `anchors_inside`
        bool [B, K], `rpn_locs` [B, K, 4], `rpn_scores` [B, K, 2 or 1], `proposals` (Proposals), `pooled`
        [B, N, C, h, w], `box_features` [B, N, D], `cls_locs` [B, N, 4 * classes], `cls_scores` [B, N, classes].

        Without targets the numbers are those of evaluation, N is the number of proposals, and `detections`
        (Detections) is there. With targets they are those of training, N is the number of samples, and
        `anchor_labels` [B, K] in {-1, 0, 1}, `anchor_locs` [B, K, 4], `samples` (Samples) and `losses` are there.
        """
        batch, padded, _ = self._open(images, targets, targets is not None)
        seen = self._look(batch.images, batch.sizes)
        results = self._detect(seen, batch) if padded is None else self._train(seen, batch, padded)
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

    def _look(self, images: Tensor, sizes: Tensor) -> Seen:
        """Run the backbone and the RPN's head."""
        image_size = images.shape[-2], images.shape[-1]
        divisible = self.settings.size_divisible
        own = -(-sizes // divisible) * divisible
        with self._padding.over(own, image_size) if self.settings.mask_padding else nullcontext():
            features = self.backbone(images.contiguous(memory_format=torch.channels_last))
            named = features if isinstance(features, Mapping) else {"0": features}
            output = self.rpn(list(named.values()))
        wanted = self.settings.box_featmap_names
        missing = set(wanted or ()) - set(named)
        if missing:
            raise ValueError(f"box_featmap_names {sorted(missing)} are not among the backbone's {list(named)}")
        strides = dict(zip(named, self.rpn.strides(output, image_size), strict=True))
        pooled = list(wanted or named)
        scales = [1 / padding.stride_of(strides[name][0], 1) for name in pooled]
        seen = Seen(list(named.values()), [named[name] for name in pooled], scales, None, output, image_size, None)
        return padding.masked(seen, own, self.settings.size_divisible) if self.settings.mask_padding else seen

    def _train(self, seen: Seen, batch: preprocessing.Batch, targets: Targets) -> dict[str, Any]:
        anchors = self.rpn.anchors(seen.output, seen.image_size)
        anchor_targets = self.rpn.assign(anchors, batch.sizes, targets, seen.cells)
        proposals = self._propose(seen, batch, training=True)
        samples = self.roi_heads.sample(proposals, targets)
        found = self._classify(seen, samples.boxes, samples.weight > 0)
        rpn_losses = self.rpn.losses(*self.rpn.flatten(seen.output), anchor_targets)
        every = self.roi_heads.losses(found["cls_scores"], found["cls_locs"], samples) | rpn_losses
        return {
            "anchor_labels": anchor_targets.labels,
            "anchor_locs": anchor_targets.locs,
            "proposals": proposals,
            "samples": samples,
            **found,
            "losses": {
                name: every[name] if weight == 1 else every[name] * weight
                for name, weight in zip(NAMES, self.settings.loss_weights, strict=True)
            },
        }

    def _detect(self, seen: Seen, batch: preprocessing.Batch) -> dict[str, Any]:
        proposals = self._propose(seen, batch, training=False)
        found = self._classify(seen, proposals.boxes, proposals.taken)
        detections = self.roi_heads.detect(found["cls_scores"], found["cls_locs"], proposals, batch.sizes)
        return {"proposals": proposals, **found, "detections": detections}

    def _propose(self, seen: Seen, batch: preprocessing.Batch, training: bool) -> Proposals:
        return self.rpn.propose(seen.output, batch.sizes, batch.scales, seen.image_size, training, seen.cells)

    def _classify(self, seen: Seen, boxes: Tensor, valid: Tensor) -> dict[str, Tensor]:
        shifted = boxes if seen.pooled_shift is None else boxes + seen.pooled_shift[:, None]
        pooled = self.roi_heads.pool(seen.pooled_levels, shifted, valid, seen.pooled_scales)
        scores, locs, hidden = self.roi_heads(pooled, valid)
        return {"pooled": pooled, "box_features": hidden, "cls_scores": scores, "cls_locs": locs}

    def _open(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None, want_targets: bool
    ) -> tuple[preprocessing.Batch, Targets | None, list[Size]]:
        """Check lists of images and targets and turn them into padded tensors on the model's device."""
        if self._image_mean.dtype != torch.float32:
            raise TypeError(f"the model must be in float32, got {self._image_mean.dtype}; for less, use torch.autocast")
        preprocessing.check_images(images, len(self.settings.image_mean))
        if want_targets:
            self.settings.check_classes(self.num_classes)
        if want_targets and targets is None:
            raise ValueError("targets are needed for the losses")
        checked = preprocessing.check_targets(targets, images, self.num_classes) if want_targets else None
        originals = [(image.shape[-2], image.shape[-1]) for image in images]
        batch = preprocessing.batch_images(images, self.settings, self._image_mean, self._image_std, self.training)
        padded = None if checked is None else preprocessing.batch_targets(checked, originals, batch.sizes)
        return batch, padded, originals
