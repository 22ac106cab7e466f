import pytest
import torch
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou

from bench import roofline, scenes
from fastdet import ops


@pytest.mark.parametrize("num_gt", [1, 5, 50, 500, 5000])
def test_anchor_targets(compare, device, num_gt):
    """Match, label and encode, as the region proposal network's targets need it."""
    anchors = scenes.anchors().to(device)
    gt_boxes = scenes.uniform(num_gt)[0].to(device)
    matcher, coder = Matcher(0.7, 0.3, allow_low_quality_matches=True), BoxCoder((1.0, 1.0, 1.0, 1.0))

    def ours():
        matches = ops.match(anchors, gt_boxes[None], high=0.7, low=0.3, allow_low_quality=True)
        return matches.label[0], matches.deltas[0]

    def theirs():
        matched = matcher(box_iou(gt_boxes, anchors))
        return matched, coder.encode_single(gt_boxes[matched.clamp(min=0)], anchors)

    (label, deltas), (matched, their_deltas) = ours(), theirs()
    assert torch.equal(label == 1, matched >= 0)
    torch.testing.assert_close(deltas[label == 1], their_deltas[label == 1])
    compare(
        ours,
        theirs,
        op="match",
        size=f"{len(anchors)} anchors, encoded",
        num_boxes=num_gt,
        floor=roofline.match(len(anchors), num_gt),
        graph=True,
    )
