"""The four losses, each a weighted sum over a padded batch divided by the sum of the weights, if that is not 0.

All take logits flattened to [rows, classes]: the two-dimensional cross-entropy has no deterministic gradient on a GPU.
Ren et al. 2015 (arXiv:1506.01497), equation 1; smooth L1 from Girshick 2015 (arXiv:1504.08083), section 2.3, where
sigma is 1 / sqrt(beta).
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdet.structures import AnchorTargets, Samples, Targets

# torchvision's names for them.
NAMES = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")


def require_targets(targets: Targets | None) -> Targets:
    """Raises ValueError if there are none, or no row of them."""
    if targets is None or targets.boxes.shape[1] == 0:
        raise ValueError("targets are needed for the losses, with at least one row (label 0 is padding)")
    return targets


def count(anchor_targets: AnchorTargets, samples: Samples, class_weights: Tensor | None = None) -> Tensor:
    """fp32 [4]: what each loss is divided by, in the order of `NAMES`, unless it is 0; arguments as of the losses."""
    labeled, sampled = _count_labeled(anchor_targets), samples.weight.sum()
    weighted = sampled if class_weights is None else _class_weight(samples, class_weights).sum()
    return torch.stack([weighted, sampled, labeled, labeled]).float()


def divisor(counts: Tensor) -> Tensor:
    """Numbers to divide sums by: 1 where there was nothing to add up."""
    return torch.where(counts > 0, counts, 1)


def divide_anew(values: Mapping[str, Tensor], counts: Tensor, divisors: Tensor) -> dict[str, Tensor]:
    """The losses `values` by name, divided by `divisors` [4] where they were divided by `counts` [4]."""
    factors = (divisor(counts) / divisors).unbind()
    return {name: values[name] * factor for name, factor in zip(NAMES, factors, strict=True)}


def weigh(values: Mapping[str, Tensor], weights: Sequence[float]) -> dict[str, Tensor]:
    """The losses `values` by name, each times its weight; `weights` in the order of `NAMES`."""
    return {
        name: values[name] if weight == 1 else values[name] * weight
        for name, weight in zip(NAMES, weights, strict=True)
    }


def objectness(logits: Tensor, targets: AnchorTargets) -> Tensor:
    """Cross-entropy of the anchors with label 0 or 1. `logits` [B, K, 2] (background, object) or [B, K, 1] (object)."""
    labels = targets.labels.flatten()
    labeled = labels >= 0
    flat = logits.flatten(0, 1).float()
    if flat.shape[1] == 2:
        total = F.cross_entropy(flat, labels, ignore_index=-1, reduction="sum")
    else:
        each = F.binary_cross_entropy_with_logits(flat[:, 0], labels.clamp(min=0).float(), reduction="none")
        total = torch.where(labeled, each, 0.0).sum()
    return total / divisor(_count_labeled(targets))


def rpn_box(deltas: Tensor, targets: AnchorTargets, beta: float) -> Tensor:
    """Smooth L1 of `deltas` [B, K, 4] over the positive anchors, by the number of labeled ones."""
    total = _smooth_l1(deltas, targets.deltas, targets.labels == 1, beta)
    return total / divisor(_count_labeled(targets))


def classifier(scores: Tensor, samples: Samples, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of `scores` [B, S, classes] over the samples.

    With `class_weights` fp32 [classes] it is the weighted mean, as that of `torch.nn.functional.cross_entropy`.
    """
    each = F.cross_entropy(scores.flatten(0, 1).float(), samples.labels.flatten(), reduction="none")
    weight = samples.weight if class_weights is None else _class_weight(samples, class_weights)
    return (each * weight.flatten()).sum() / divisor(weight.sum())


def box(deltas: Tensor, samples: Samples, beta: float) -> Tensor:
    """Smooth L1 of the true class's row of `deltas` [B, S, 4 * classes] over the positives, by the samples' number."""
    per_class = deltas.unflatten(-1, (-1, 4))
    chosen = samples.labels[..., None] == torch.arange(per_class.shape[2], device=deltas.device)
    # A masked sum picks the row: unlike a gather, its gradient is written once and so the same in every run.
    picked = torch.where(chosen[..., None], per_class.float(), 0.0).sum(2)
    positive = (samples.labels > 0) & (samples.weight > 0)
    return _smooth_l1(picked, samples.deltas, positive, beta) / divisor(samples.weight.sum())


def _count_labeled(targets: AnchorTargets) -> Tensor:
    return (targets.labels >= 0).sum()


def _class_weight(samples: Samples, class_weights: Tensor) -> Tensor:
    """The weight of each sample, [B, S]."""
    return samples.weight * class_weights[samples.labels]


def _smooth_l1(deltas: Tensor, target: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Sum over the rows of `mask`; what other rows hold, NaN and infinities included, does not matter."""
    difference = torch.where(mask[..., None], deltas.float() - target, 0.0)
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), beta=beta, reduction="sum")
