import pytest
import torch
import torchvision

from bench import roofline, scenes
from fastdet import ops

SCENES = ["uniform", "clustered", "jittered_anchors"]
# Where many boxes are kept, torchvision takes several seconds for a call: those are left out.
ALL = [(count, threshold) for count in (100, 300, 1000, 3000, 10000) for threshold in (0.3, 0.5, 0.7, 0.9)]
ALL += [(30000, 0.3), (30000, 0.5), (30000, 0.7), (100_000, 0.3), (100_000, 0.5)]
FEW = [(1000, 0.5), (1000, 0.7), (10000, 0.7)]


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize(("count", "threshold"), FEW if torch.cuda.is_available() else ALL)
def test_all_that_are_kept(compare, device, scene, count, threshold):
    """The plain call, which gives all boxes that are kept."""
    boxes, scores = (tensor.to(device) for tensor in getattr(scenes, scene)(count))
    expected = torchvision.ops.nms(boxes.cpu(), scores.cpu(), threshold)
    assert torch.equal(ops.nms(boxes, scores, threshold).cpu(), expected)
    compare(
        lambda: ops.nms(boxes, scores, threshold),
        lambda: torchvision.ops.nms(boxes, scores, threshold),
        op="nms, all kept",
        size=f"{scene}, IoU {threshold}",
        num_boxes=count,
    )


@pytest.mark.parametrize("scene", SCENES)
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
    compare(ours, theirs, op="nms, first kept", size=size, rounds=7, floor=floor, graph=True)


@pytest.mark.parametrize("count", [100, 1000, 5000])
def test_80_classes(compare, device, count):
    """The plain call for the candidates of an image, a tenth of them clustered in each object, in any class."""
    boxes, scores = (tensor.to(device) for tensor in scenes.clustered(count))
    classes = torch.randint(80, (count,), generator=torch.Generator().manual_seed(2)).to(device)
    assert (
        abs(
            len(ops.batched_nms(boxes, scores, classes, 0.5))
            - len(torchvision.ops.batched_nms(boxes, scores, classes, 0.5))
        )
        <= 1 + count // 1000
    )
    compare(
        lambda: ops.batched_nms(boxes, scores, classes, 0.5),
        lambda: torchvision.ops.batched_nms(boxes, scores, classes, 0.5),
        op="batched_nms",
        size="clustered, 80 classes, IoU 0.5",
        num_boxes=count,
    )


@pytest.mark.parametrize("scene", SCENES)
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
        op="nms by class",
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
    compare(ours, theirs, op="nms by class", size=size, rounds=7, graph=True)
