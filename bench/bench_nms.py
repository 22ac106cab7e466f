import pytest
import scenes
import torch
import torchvision

from fastdet import ops


@pytest.mark.parametrize("scene", ["uniform", "clustered", "jittered_anchors"])
@pytest.mark.parametrize(("count", "keep"), [(12000, 2000), (6000, 300)])
def test_proposals(versus, device, scene, count, keep):
    boxes, scores = (tensor.to(device) for tensor in getattr(scenes, scene)(count))
    ours = lambda: ops.nms_padded(boxes[None], scores[None], 0.7, keep)  # noqa: E731
    theirs = lambda: torchvision.ops.nms(boxes, scores, 0.7)[:keep]  # noqa: E731
    kept = ours()
    assert torch.equal(kept.index[0, : int(kept.count[0])], theirs())
    versus(ours, theirs, op="nms", size=f"{scene} {count} -> {keep}, IoU 0.7", rounds=7)


@pytest.mark.parametrize(("images", "classes"), [(1, 20), (4, 90)])
def test_classes(versus, device, images, classes):
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

    versus(ours, theirs, op="batched nms", size=f"{images} x {classes} classes x 300 RoIs, IoU 0.3")
