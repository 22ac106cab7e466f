"""BatchNorm that leaves out padding, against torch's on the valid rows; a convolution with its ReLU."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from fastdet.models.layers import ConvReLU2d, FrozenBatchNorm2d, MaskedBatchNorm2d, join_relu, take_channels_last
from tests.helpers.checks import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_rows_of_padding_have_no_effect(momentum, dtype):
    x = torch.randn(7, 3, 2, 4, dtype=dtype) * 3 + 1
    rows = torch.tensor([True, False, True, True, False, True, False])
    ours, theirs = MaskedBatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    for norm in (ours, theirs):
        nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(2))
        norm.to(dtype)
    for _ in range(2):
        noisy = torch.where(rows[:, None, None, None], x, torch.full_like(x, torch.nan)).requires_grad_()
        plain = x[rows].requires_grad_()
        found, expected = ours(noisy, rows), theirs(plain)
        torch.testing.assert_close(found[rows], expected)
        (found[rows] ** 3).sum().backward()
        (expected**3).sum().backward()
        torch.testing.assert_close(noisy.grad[rows], plain.grad, rtol=1e-4, atol=1e-4)
        x = x * 2 + 1
    for (name, expected), found in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-3)
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_of_a_layer_in_half_precision(dtype, momentum):
    x, rows = (torch.randn(9, 3, 2, 4) * 3 + 1).to(dtype), torch.ones(9, dtype=torch.bool)
    ours, theirs = MaskedBatchNorm2d(3, momentum=momentum).to(dtype), nn.BatchNorm2d(3, momentum=momentum)
    assert_close(ours(x, rows), theirs(x.float()), dtype)
    for (name, expected), found in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        assert found.dtype == (dtype if expected.is_floating_point() else expected.dtype), name
        assert_close(found, expected, dtype)


def test_without_a_mask_it_is_torchs():
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(MaskedBatchNorm2d(3)(x), nn.BatchNorm2d(3)(x))
    norm = MaskedBatchNorm2d(3)
    assert torch.isfinite(norm(x, torch.zeros(4, dtype=torch.bool))).all(), "no row at all"
    assert torch.isfinite(norm.running_var).all()


def test_frozen_is_batchnorm_in_evaluation():
    plain, frozen = nn.BatchNorm2d(3), FrozenBatchNorm2d(3)
    plain(torch.randn(8, 3, 4, 4))
    frozen.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(frozen(x), plain.eval()(x))
    assert not list(frozen.parameters())


def test_a_head_takes_channels_last_features_without_a_copy():
    head, x = TwoMLPHead(3 * 4 * 4, 5), torch.randn(6, 3, 4, 4)
    expected = head(x)
    take_channels_last(head, 4)
    torch.testing.assert_close(head(x), expected)
    inputs: list[torch.Tensor] = []
    head.fc6.register_forward_pre_hook(lambda _, args: inputs.extend(args))
    features = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(head(features), expected)
    assert inputs[0].data_ptr() == features.data_ptr()


def test_a_convolution_and_its_relu_are_those_of_two_layers():
    chain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1))
    x = torch.randn(2, 3, 6, 8)
    expected, keys = chain(x), list(chain.state_dict())
    weights = list(chain.parameters())
    join_relu(chain)
    assert [type(layer) for layer in chain] == [ConvReLU2d, nn.Identity, nn.MaxPool2d, nn.Conv2d]
    assert list(chain.state_dict()) == keys
    assert all(a is b for a, b in zip(chain.parameters(), weights, strict=True))
    assert torch.equal(chain(x), expected)
    assert chain[0](x).min() == 0
    chain(x).sum().backward()
    assert chain[0].weight.grad.abs().max() > 0


class OnCuda(torch.Tensor):
    """A tensor of the CPU whose `is_cuda` is true."""

    is_cuda = True


@pytest.fixture
def one_call(monkeypatch):
    """The calls of cuDNN, with a stub that computes on the CPU in its place."""
    calls = []

    def stub(input, weight, bias, stride, padding, dilation, groups):
        calls.append([None if each is None else each.dtype for each in (input, weight, bias)])
        return F.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups))

    monkeypatch.setattr(torch, "cudnn_convolution_relu", stub)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    torch.use_deterministic_algorithms(False)
    return calls


def on_cuda(x: torch.Tensor) -> torch.Tensor:
    return x.as_subclass(OnCuda)


def test_one_call_where_no_gradient_is_recorded(one_call, monkeypatch):
    layer, x = ConvReLU2d(3, 4, 3, stride=2, padding=1), on_cuda(torch.randn(2, 3, 6, 8))
    assert torch.equal(layer(x), F.relu(nn.Conv2d.forward(layer, x)))
    assert one_call == [], "its weights take a gradient"
    with torch.no_grad():
        assert torch.equal(layer(x), F.relu(nn.Conv2d.forward(layer, x)))
    assert len(one_call) == 1
    layer.requires_grad_(False)
    assert torch.equal(layer(x), F.relu(nn.Conv2d.forward(layer, x)))
    assert len(one_call) == 2, "a frozen layer in training"
    layer(x.clone().requires_grad_())
    assert len(one_call) == 2, "its input takes a gradient"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    layer(x)
    assert one_call[-1] == [torch.bfloat16] * 3
    layer(x.as_subclass(torch.Tensor))
    assert len(one_call) == 3, "on the CPU"


@pytest.mark.parametrize(
    "options",
    [{"groups": 2}, {"padding_mode": "reflect", "padding": 1}, {"padding": "same"}, {"dtype": torch.float64}],
    ids=lambda options: next(iter(options)),
)
@torch.no_grad()
def test_two_calls_where_one_does_not_fit(one_call, options):
    layer = ConvReLU2d(4, 4, 3, **options)
    x = on_cuda(torch.randn(2, 4, 6, 8, dtype=options.get("dtype")))
    assert torch.equal(layer(x), F.relu(nn.Conv2d.forward(layer, x)))
    assert layer(x[0]).ndim == 3
    assert one_call == []


@torch.no_grad()
def test_two_calls_where_results_must_repeat(one_call):
    layer, x = ConvReLU2d(3, 4, 3), on_cuda(torch.randn(2, 3, 6, 8))
    torch.use_deterministic_algorithms(True)
    layer(x)
    assert one_call == []
    torch.use_deterministic_algorithms(False)
    layer(x)
    assert len(one_call) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_the_call_of_cudnn_computes_the_same(dtype, monkeypatch):
    torch.use_deterministic_algorithms(False)
    # One of the two calls may take TF32, and the other not.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    layer = ConvReLU2d(64, 128, 3, padding=1).cuda().to(dtype, memory_format=torch.channels_last)
    x = torch.randn(2, 64, 37, 56, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    for bias in (layer.bias, None):
        layer.bias = bias
        expected = F.relu(nn.Conv2d.forward(layer, x))
        # Its output takes memory that holds NaN.
        torch.full_like(expected, torch.nan)
        with mock.patch.object(torch, "cudnn_convolution_relu", wraps=torch.cudnn_convolution_relu) as call:
            found = layer(x)
        assert call.call_count == 1
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert_close(found, expected, torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)


@torch.no_grad()
def test_shapes_on_a_fake_gpu():
    torch.use_deterministic_algorithms(False)
    with FakeTensorMode(), torch.device("cuda"):
        found = ConvReLU2d(3, 4, 3, padding=1)(torch.empty(2, 3, 6, 8))
    assert (found.shape, found.device.type) == ((2, 4, 6, 8), "cuda")
