import pytest
import torch
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from bench import roofline
from fastdet import ops

# Candidates, share of positives, samples, positives at most.
CASES = {"anchors": (18648, 0.002, 256, 128), "proposals": (2000, 0.1, 128, 32)}


@pytest.mark.parametrize("batch", [1, 16] if torch.cuda.is_available() else [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_labels(compare, device, case, batch):
    """From labels to the indices of the chosen."""
    num_candidates, share, num_samples, max_positive = CASES[case]
    draw = torch.rand(batch, num_candidates, generator=torch.Generator().manual_seed(0))
    label = torch.where(draw < share, 1, torch.where(draw < 0.6, 0, -1)).to(device)
    sampler = BalancedPositiveNegativeSampler(num_samples, max_positive / num_samples)

    def ours():
        return ops.sample(label, num_samples, max_positive)

    def theirs():
        chosen = sampler(list(label.unbind()))
        return [torch.where(positive | negative)[0] for positive, negative in zip(*chosen, strict=True)]

    assert int(ours().weight.sum()) == sum(len(index) for index in theirs())
    size = f"{batch} x {num_candidates} {case}, {num_samples} drawn"
    floor = roofline.sample(label.numel(), batch * num_samples)
    compare(ours, theirs, op="sample", size=size, dtype="int64", rounds=20, floor=floor, graph=True)
