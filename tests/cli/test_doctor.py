"""`fastdet doctor`: its output, the problems it finds, and whether the memory that it measures is the step's."""

import pytest
import torch

from fastdet import Detections, FasterRCNN
from fastdet.cli import doctor
from fastdet.cli.main import main
from fastdet.engine.distributed import local_device
from tests.helpers.detectors import small_detector


def test_describes_the_environment(capsys):
    assert main(["doctor", "--device", "cpu", "--backbone", "small", "--height", "64", "--width", "96"]) == 0
    output = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in output
    assert "device: cpu" in output
    assert "self-check passed" in output
    assert "training small, 1 x 64 x 96: parameters" in output


def test_the_gpu_that_is_given_becomes_the_current_one(monkeypatch, capsys):
    """Of which pinned memory, and the formats that it supports, are asked; where torch has no CUDA it is an error."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for given in ("cuda:1", "cuda", "cpu"):
        assert local_device(torch.device(given)) == torch.device(given)
    assert chosen == [torch.device("cuda:1")]
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert main(["doctor", "--device", "cuda:1"]) == 2
    assert capsys.readouterr().err == "fastdet: --device cuda:1: torch is built without CUDA here\n"


def test_a_failed_self_check_exits_with_one(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "run_self_check", lambda device: "not finite: loss_classifier")
    assert main(["doctor", "--device", "cpu", "--backbone", "small", "--height", "64", "--width", "64"]) == 1
    captured = capsys.readouterr()
    assert "not finite: loss_classifier" in captured.out
    assert captured.err.startswith("fastdet: self-check failed on cpu: not finite: loss_classifier")


def test_the_self_check_finds_what_is_not_finite(monkeypatch):
    assert doctor.run_self_check(torch.device("cpu")) is None
    original = FasterRCNN.forward_padded

    def broken(self, *args, **kwargs):
        losses, detections = original(self, *args, **kwargs)
        return losses and {name: loss * torch.nan for name, loss in losses.items()}, detections

    monkeypatch.setattr(FasterRCNN, "forward_padded", broken)
    assert "loss_objectness" in doctor.run_self_check(torch.device("cpu"))


def test_activations_grow_with_the_batch_and_shrink_with_frozen_layers():
    model = FasterRCNN("small", 5, box_representation_size=16, box_batch_size_per_image=4)
    single, double = (doctor.measure_training_memory(model, batch, 128, 192) for batch in (1, 2))
    assert single.parameters == single.gradients == sum(p.numel() for p in model.parameters()) * 4
    assert 1.5 < double.activations / single.activations < 2.5
    for layer in list(model.backbone)[:4]:
        layer.requires_grad_(False)
    frozen = doctor.measure_training_memory(model, 1, 128, 192)
    assert frozen.gradients < single.gradients
    # Layers before the first that trains keep nothing for a backward pass.
    assert frozen.activations < 0.8 * single.activations


def test_frozen_first_layers_record_no_gradient():
    model = small_detector().train()
    model.backbone[0].requires_grad_(False)
    recorded = []
    model.backbone[0].register_forward_hook(lambda module, args, output: recorded.append(output.requires_grad))
    model.forward_padded(
        torch.rand(1, 3, 64, 64), torch.tensor([[64, 64]]), compute_losses=False, compute_detections=True
    )
    assert recorded == [False]


def test_the_measured_model_is_unchanged():
    model = FasterRCNN("mobilenet_v2", 2, box_representation_size=16, box_batch_size_per_image=4).train()
    model.backbone.eval()
    before = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    modes, generator = [module.training for module in model.modules()], torch.get_rng_state()
    assert doctor.measure_training_memory(model, 1, 64, 96).activations > 0
    doctor.run_self_check(torch.device("cpu"))
    for value, original in zip((*model.parameters(), *model.buffers()), before, strict=True):
        assert torch.equal(value, original)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)


def test_detections_are_compared_as_sets():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 40, 40], [0, 0, 0, 0]]])
    found = Detections(boxes, torch.ones(1, 3), torch.tensor([[1, 2, 0]]), torch.tensor([2]), torch.zeros(1, 3).long())
    swapped = Detections(*(part[:, [1, 0, 2]] if part.ndim > 1 else part for part in found))
    assert doctor.count_unmatched(found, swapped) == 0
    assert doctor.count_unmatched(found, found._replace(boxes=boxes + 0.05)) == 0
    assert doctor.count_unmatched(found, found._replace(boxes=boxes + 0.2)) == 2
    assert doctor.count_unmatched(found, found._replace(labels=torch.tensor([[1, 1, 0]]))) == 1
    assert doctor.count_unmatched(found, found._replace(scores=found.scores - 8)) == 2
    assert doctor.count_unmatched(found, found._replace(count=torch.tensor([1]))) == 1


def test_the_self_check_runs_with_the_libraries_that_a_model_runs_with(monkeypatch):
    original, recorded = doctor._detect_padded, []

    def record(*args):
        recorded.append((torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32))
        return original(*args)

    monkeypatch.setattr(doctor, "_detect_padded", record)
    assert doctor.run_self_check(torch.device("cpu")) is None
    assert recorded == [(torch.backends.cudnn.enabled, False)] * 2


def test_the_self_check_needs_detections(monkeypatch):
    original = doctor._detect_padded
    nothing = lambda *args: original(*args)._replace(count=torch.zeros(2, dtype=torch.int64))  # noqa: E731
    monkeypatch.setattr(doctor, "_detect_padded", nothing)
    assert doctor.run_self_check(torch.device("cpu")) == "no detections, neither on the CPU"


@pytest.mark.parametrize(("noise", "passes"), [(1e-6, True), (0.3, False)])
def test_the_self_check_tolerates_the_last_bits_and_no_more(monkeypatch, noise, passes):
    """As between two devices: scores that are nearly equal change places."""
    original, calls = doctor._detect_padded, []

    def noisy(model, images, sizes):
        calls.append(model)
        hooks = []
        if len(calls) == 2:
            hooks = [
                layer.register_forward_hook(lambda _, args, output: output * (1 + noise * torch.randn_like(output)))
                for layer in model.modules()
                if isinstance(layer, torch.nn.Conv2d)
            ]
        found = original(model, images, sizes)
        for hook in hooks:
            hook.remove()
        return found

    monkeypatch.setattr(doctor, "_detect_padded", noisy)
    problem = doctor.run_self_check(torch.device("cpu"))
    assert (problem is None) == passes, problem


def test_activations_are_kept_in_every_mode_of_the_caller():
    model = FasterRCNN("small", 2, box_representation_size=16, box_batch_size_per_image=4)
    with torch.no_grad():
        assert doctor.measure_training_memory(model, 1, 64, 96).activations > 0


def test_a_size_that_cannot_be_trained_is_a_user_error(capsys):
    assert main(["doctor", "--device", "cpu", "--backbone", "small", "--height", "1", "--width", "1"]) == 2
    assert capsys.readouterr().err.startswith("fastdet: --height, --width: ")
