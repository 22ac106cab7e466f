"""Attributes of torchvision's detector that have no effect on fastdet's, and what to do instead."""

from typing import Any, ClassVar

_OVERRIDE = "model.settings = model.settings.override({}=...)"
_REBUILD = "give {} to the detector when it is built"
_NO_MASKS = "fastdet has no masks and no keypoints"
_SUBCLASS = "the step is another here: override {} in a subclass"

# By attribute, the advice and what it names.
DETECTOR_ATTRIBUTES = {
    "transform": _OVERRIDE.format("min_size=..., max_size=..., size_divisible")
    + ", and image_mean and image_std when the detector is built",
    **dict.fromkeys(("eager_outputs", "_has_warned"), _SUBCLASS.format("forward")),
    # Not torchvision's: to compile, it was assigned to in earlier versions.
    "core": "call model.compile(...)",
}
RPN_ATTRIBUTES = {
    "anchor_generator": _REBUILD.format("rpn_anchor_generator"),
    "box_coder": _OVERRIDE.format("bbox_xform_clip"),
    "box_similarity": "the matching is by IoU: see fastdet.ops.match",
    "proposal_matcher": _OVERRIDE.format("rpn_fg_iou_thresh=..., rpn_bg_iou_thresh"),
    "fg_bg_sampler": _OVERRIDE.format("rpn_batch_size_per_image=..., rpn_positive_fraction"),
    "nms_thresh": _OVERRIDE.format("rpn_nms_thresh"),
    "score_thresh": _OVERRIDE.format("rpn_score_thresh"),
    "min_size": _OVERRIDE.format("rpn_min_size"),
    "_pre_nms_top_n": _OVERRIDE.format("rpn_pre_nms_top_n_train=..., rpn_pre_nms_top_n_test"),
    "_post_nms_top_n": _OVERRIDE.format("rpn_post_nms_top_n_train=..., rpn_post_nms_top_n_test"),
    "pre_nms_top_n": _OVERRIDE.format("rpn_pre_nms_top_n_train=..., rpn_pre_nms_top_n_test"),
    "post_nms_top_n": _OVERRIDE.format("rpn_post_nms_top_n_train=..., rpn_post_nms_top_n_test"),
    "assign_targets_to_anchors": _SUBCLASS.format("assign_targets"),
    "filter_proposals": _SUBCLASS.format("generate_proposals"),
    "_get_top_n_idx": _SUBCLASS.format("generate_proposals"),
    "compute_loss": _SUBCLASS.format("forward"),
}
ROI_HEADS_ATTRIBUTES = {
    "box_coder": _OVERRIDE.format("bbox_reg_weights=..., bbox_xform_clip"),
    "box_similarity": "the matching is by IoU: see fastdet.ops.match",
    "proposal_matcher": _OVERRIDE.format("box_fg_iou_thresh=..., box_bg_iou_thresh"),
    "fg_bg_sampler": _OVERRIDE.format("box_batch_size_per_image=..., box_positive_fraction"),
    "box_roi_pool": _REBUILD.format("box_roi_pool (or box_pooling, box_pool_size, box_featmap_names, ...)"),
    "score_thresh": _OVERRIDE.format("box_score_thresh"),
    "nms_thresh": _OVERRIDE.format("box_nms_thresh"),
    "detections_per_img": _OVERRIDE.format("box_detections_per_img"),
    "assign_targets_to_proposals": _SUBCLASS.format("select_training_samples"),
    "subsample": _SUBCLASS.format("select_training_samples"),
    "add_gt_proposals": _SUBCLASS.format("select_training_samples"),
    "check_targets": _SUBCLASS.format("select_training_samples"),
    **dict.fromkeys(("has_mask", "mask_roi_pool", "mask_head", "mask_predictor"), _NO_MASKS),
    **dict.fromkeys(("has_keypoint", "keypoint_roi_pool", "keypoint_head", "keypoint_predictor"), _NO_MASKS),
}


class RefuseAttributes:
    """A module on which torchvision's attributes cannot be set or read where they would change nothing.

    `refused_attributes` maps their names to what to do instead. (A property would not see modules: `nn.Module` puts
    them aside before it looks at the class.)
    """

    refused_attributes: ClassVar[dict[str, str]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse(name)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        # Called where the usual lookup finds nothing.
        self._refuse(name)
        return super().__getattr__(name)  # type: ignore[misc]

    def _refuse(self, name: str) -> None:
        if name in self.refused_attributes:
            kind = type(self).__name__
            raise AttributeError(f"{name} has no effect on fastdet's {kind}: {self.refused_attributes[name]}")

    def __prepare_scriptable__(self) -> None:
        """Called by torch.jit.script, of a module that this one is part of too."""
        way_out = "use fastdet.export.export_pt2 or export_onnx"
        raise RuntimeError(f"torch.jit.script can't compile fastdet's {type(self).__name__}: {way_out}")
