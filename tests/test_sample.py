import math

import pytest
import torch
from support import check_operator
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from fastdet import ops
from fastdet.ops.sample import sample_cpu, sample_cuda


def loop_sample(label, key, num_samples, max_positive):
    """The rules for one image, by sorting lists."""

    def smallest(wanted, count):
        mine = sorted((k, i) for i, (one, k) in enumerate(zip(label, key, strict=True)) if one == wanted)
        return sorted(i for _, i in mine[:count])

    positives = smallest(1, min(max_positive, num_samples))
    index = positives + smallest(0, num_samples - len(positives))
    empty = num_samples - len(index)
    return index + [0] * empty, [1.0] * len(index) + [0.0] * empty


def case(batch, num_candidates, positive=0.2, negative=0.5, levels=0, seed=0):
    """Random labels of which some are ignored; with `levels`, so many distinct keys."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(batch, num_candidates, generator=generator)
    label = torch.where(draw < positive, 1, torch.where(draw < positive + negative, 0, -1))
    label[draw > 0.97] = 2**32 + 1
    key = torch.rand(batch, num_candidates, generator=generator)
    return label, (key * levels).floor() / levels if levels else key


def assert_equals_loop(result, label, key, num_samples, max_positive):
    index, weight = result
    assert index.shape == weight.shape == (len(label), num_samples)
    for image in range(len(label)):
        expected = loop_sample(label[image].tolist(), key[image].tolist(), num_samples, max_positive)
        assert index[image].tolist() == expected[0]
        assert weight[image].tolist() == expected[1]


QUOTAS = [(0, 0), (1, 1), (6, 0), (6, 2), (6, 99), (64, 16), (300, 128)]


@pytest.mark.parametrize("levels", [0, 5])
@pytest.mark.parametrize("num_candidates", [0, 1, 7, 150])
@pytest.mark.parametrize(("num_samples", "max_positive"), QUOTAS)
def test_equals_a_loop(num_candidates, num_samples, max_positive, levels):
    label, key = case(3, num_candidates, levels=levels)
    result = ops.sample(label, num_samples, max_positive, key)
    assert_equals_loop(result, label, key, num_samples, max_positive)
    assert (result.index.dtype, result.weight.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize(("positive", "negative"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.9, 0.05)])
def test_one_class_may_be_missing(positive, negative):
    label, key = case(2, 50, positive, negative)
    assert_equals_loop(ops.sample(label, 20, 8, key), label, key, 20, 8)


def test_images_are_independent_and_layout_does_not_matter():
    label, key = case(4, 90)
    result = ops.sample(label, 20, 5, key)
    for image in range(4):
        one = slice(image, image + 1)
        assert torch.equal(ops.sample(label[one], 20, 5, key[one]).index, result.index[one])
    strided = ops.sample(label.T.contiguous().T, 20, 5, key.T.contiguous().T)
    assert torch.equal(strided.index, result.index)
    assert torch.equal(ops.sample(label, 20, 5, key.half()).index, ops.sample(label, 20, 5, key.half().float()).index)


def test_keys_out_of_range_are_held_to_it():
    key = torch.tensor([[float("nan"), 2.0, 1.0, 0.5, 0.0, -1.0, -math.inf, -0.0]])
    label = torch.zeros(1, 8, dtype=torch.int64)
    for count, expected in ((3, [4, 5, 6]), (5, [3, 4, 5, 6, 7]), (6, [0, 3, 4, 5, 6, 7])):
        assert ops.sample(label, count, 0, key).index.tolist() == [expected]


def test_as_many_of_each_class_as_torchvision():
    for seed, (num_candidates, positive) in enumerate([(1000, 0.01), (1000, 0.4), (100, 0.2), (100, 0.001)]):
        label, _ = case(1, num_candidates, positive, 0.5, seed=seed)
        label = label.where(label < 2, -1)
        theirs = [int(mask[0].sum()) for mask in BalancedPositiveNegativeSampler(64, 0.25)([label[0]])]
        index, weight = ops.sample(label, 64, 16)
        chosen = label[0, index[0, weight[0] > 0]]
        assert [int((chosen == 1).sum()), int((chosen == 0).sum())] == theirs
        assert int(weight.sum()) == sum(theirs)


def test_a_seed_fixes_the_choice():
    label, _ = case(2, 500)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(ops.sample(label, 50, 10).index)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])


def test_the_choice_is_uniform():
    """Every candidate, and every pair of neighbours, as often as in a draw without replacement."""
    trials = 20_000
    label = torch.tensor([1, 0, -1] * 12).expand(trials, -1)
    index, _ = ops.sample(label, 9, 4)
    counts = torch.zeros(trials, 36).scatter_(1, index, 1.0)
    for wanted, chosen in ((1, 4), (0, 5)):
        mine = counts[:, (label[0] == wanted)]
        assert (mine.sum(1) == chosen).all()
        alone, together = mine.mean(0), (mine[:, :-1] * mine[:, 1:]).mean(0)
        for frequency, probability in ((alone, chosen / 12), (together, chosen * (chosen - 1) / (12 * 11))):
            spread = math.sqrt(probability * (1 - probability) / trials)
            assert (frequency - probability).abs().max() < 4.5 * spread


def test_operator_contract():
    label, key = case(2, 30)
    check_operator(torch.ops.fastdet.sample, label, key, 8, 3)


LABEL = torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"label": LABEL[0]}, ValueError, r"label .*\[5\]"),
        ({"label": LABEL.int()}, TypeError, "label must be int64"),
        ({"label": [0, 1]}, TypeError, "label .*list"),
        ({"key": torch.rand(2, 4)}, ValueError, r"key .*\[2, 5\].*\[2, 4\]"),
        ({"key": LABEL}, TypeError, "key .*int64"),
        ({"key": torch.rand(2, 5, device="meta")}, ValueError, "key is on meta"),
        ({"num_samples": -1}, ValueError, "num_samples must not be negative"),
        ({"max_positive": -1}, ValueError, "max_positive must not be negative"),
    ],
)
def test_bad_input_names_the_argument(arguments, error, words):
    with pytest.raises(error, match=words):
        ops.sample(**({"label": LABEL, "num_samples": 4, "max_positive": 2} | arguments))


def test_when_the_candidates_are_thinned_first():
    kernel = pytest.importorskip("fastdet.kernels.sample")
    assert kernel.thinning(4096, 256) == 0
    assert kernel.thinning(18648, 256) == 4096
    assert kernel.thinning(268_569, 256) == 16384
    assert kernel.thinning(30_000, 20_000) == 0
    for num_candidates in (5000, 18648, 60_000, 268_569):
        for num_samples in (32, 128, 256, 512):
            tile = kernel.thinning(num_candidates, num_samples)
            assert tile == 0 or -(-num_candidates // tile) * num_samples <= num_candidates // 2


@pytest.mark.kernel
@pytest.mark.parametrize("levels", [0, 4])
@pytest.mark.parametrize("num_candidates", [0, 1, 7, 300])
@pytest.mark.parametrize(("num_samples", "max_positive"), QUOTAS)
def test_kernel_equals_cpu(kernel_device, num_candidates, num_samples, max_positive, levels):
    label, key = case(2, num_candidates, levels=levels)
    actual = sample_cuda(label.to(kernel_device), key.to(kernel_device), num_samples, max_positive)
    for one, other in zip(actual, sample_cpu(label, key, num_samples, max_positive), strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.kernel
@pytest.mark.parametrize("levels", [0, 2, 9])
@pytest.mark.parametrize(("num_samples", "max_positive"), [(1, 1), (20, 8), (40, 0), (400, 80)])
def test_kernel_in_many_tiles_equals_cpu(kernel_device, monkeypatch, num_samples, max_positive, levels):
    """Small tiles: candidates are thinned first where that pays, and read tile by tile in every pass where not."""
    from fastdet.kernels import sample as kernel

    for name, value in (("SMALL_BLOCK_K", 128), ("MAX_BLOCK_K", 256), ("MAX_SCAN_K", 128)):
        monkeypatch.setattr(kernel, name, value)
    assert bool(kernel.thinning(1000, num_samples)) == (num_samples < 400)
    label, key = case(2, 1000, levels=levels)
    label[1, :500] = 1
    actual = sample_cuda(label.to(kernel_device), key.to(kernel_device), num_samples, max_positive)
    for one, other in zip(actual, sample_cpu(label, key, num_samples, max_positive), strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.kernel
def test_kernel_on_keys_out_of_range(kernel_device):
    key = torch.tensor([[float("nan"), 2.0, 1.0, 0.5, 0.0, -1.0, -math.inf, -0.0, 0.99999994]])
    label = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0, 0]])
    for count in range(10):
        actual = sample_cuda(label.to(kernel_device), key.to(kernel_device), count, 0)
        assert torch.equal(actual[0].cpu(), sample_cpu(label, key, count, 0)[0])


@pytest.mark.kernel
def test_thinning_marks_empty_slots(kernel_device):
    from fastdet.kernels import sample as kernel

    label = torch.tensor([[-1] * 150, [0] * 150], device=kernel_device)
    code = torch.zeros(2, 2, 30, dtype=torch.int32, device=kernel_device)
    kernel.launch_thin(
        label, torch.rand(2, 150, device=kernel_device), code, torch.empty_like(code), span=128, max_positive=5
    )
    used = (code != kernel.IGNORED.value).sum(-1)
    assert used.tolist() == [[0, 0], [30, 22]]
