import pytest
import torch
import torchvision

from bench import roofline, scenes
from fastdet import ops


@pytest.mark.parametrize("scene", ["uniform", "clustered", "jittered_anchors"])
@pytest.mark.parametrize(("count", "keep"), [(12000, 2000), (6000, 300)])
def test_proposals(compare, device, scene, count, keep):
    boxes, scores = (tensor.to(device) for tensor in getattr(scenes, scene)(count))
    ours = lambda: ops.nms_padded(boxes[None], scores[None], 0.7, keep)  # noqa: E731
    theirs = lambda: torchvision.ops.nms(boxes, scores, 0.7)[:keep]  # noqa: E731
    kept = ours()
    # On a GPU torchvision's own kernel may decide a pair at the threshold otherwise.
    expected = torchvision.ops.nms(boxes.cpu(), scores.cpu(), 0.7)[:keep]
    assert torch.equal(kept.index[0, : int(kept.count[0])].cpu(), expected)
    size = f"{scene} {count} -> {keep}, IoU 0.7"
    # Of 6000 boxes the 300th to be kept comes early: most pairs are never needed, and how many depends on the data.
    floor = roofline.nms(1, count) if keep == 2000 else ()
    compare(ours, theirs, op="nms", size=size, rounds=7, floor=floor, graph=True)


@pytest.mark.parametrize("scene", ["uniform", "clustered", "jittered_anchors"])
def test_every_class(compare, device, scene):
    """300 RoIs in 90 classes, each class with boxes of its own, and all of them candidates."""
    images, classes, num_rois = 16 if torch.cuda.is_available() else 1, 90, 300
    groups = images * classes
    boxes, scores = (tensor.to(device) for tensor in scenes.by_class(getattr(scenes, scene), images, classes, num_rois))
    group = torch.arange(groups, device=device).repeat_interleave(num_rois)
    flat_boxes, flat_scores = boxes.reshape(-1, 4), scores.reshape(-1)

    def ours() -> ops.Kept:
        return ops.nms_padded(boxes, scores, 0.5, num_rois)

    def theirs() -> torch.Tensor:
        return torchvision.ops.batched_nms(flat_boxes, flat_scores, group, 0.5)

    # torchvision separates groups by shifted coordinates, which rounds a few decisions the other way.
    assert abs(int(ours().count.sum()) - len(theirs())) <= groups * num_rois // 1000
    compare(
        ours,
        theirs,
        op="batched nms",
        size=f"{scene} {images} x {classes} x {num_rois}, IoU 0.5",
        rounds=7,
        floor=roofline.nms(groups, num_rois),
        graph=True,
    )


@pytest.mark.parametrize(("images", "classes"), [(1, 20), (4, 90)])
def test_classes_above_a_score(compare, device, images, classes):
    """300 RoIs in every class: of each image and class those with a score above 0.05, suppressed at 0.3."""
    boxes, _ = scenes.clustered(images * 300)
    boxes = boxes.reshape(images, 1, 300, 4).expand(-1, classes, -1, -1).reshape(-1, 300, 4)
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(images * classes, 300, generator=generator) ** 8
    boxes, scores = boxes.to(device), scores.to(device)
    valid = scores > 0.05
    group = torch.arange(images * classes, device=device)[:, None].expand_as(scores)

    def theirs() -> torch.Tensor:
        chosen = valid.nonzero(as_tuple=True)
        return torchvision.ops.batched_nms(boxes[chosen], scores[chosen], group[chosen], 0.3)

    def ours() -> ops.Kept:
        return ops.nms_padded(boxes, scores, 0.3, 300, valid)

    size = f"{images} x {classes} x 300 above 0.05, IoU 0.3"
    compare(ours, theirs, op="batched nms", size=size, rounds=7, graph=True)
