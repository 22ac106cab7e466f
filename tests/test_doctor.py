"""`fastdet doctor`: what it says, what it finds wrong, and whether the memory that it measures is the step's."""

import torch
from scenes_of_detection import small_detector

from fastdet import FasterRCNN, doctor
from fastdet.cli import main


def test_says_what_there_is(capsys):
    assert main(["doctor", "--device", "cpu", "--backbone", "small", "--height", "64", "--width", "96"]) == 0
    said = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in said
    assert "device: cpu" in said
    assert "as it should be" in said
    assert "training small, 1 x 64 x 96: parameters" in said


def test_a_fault_is_told_and_exits_with_one(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "probe", lambda device: "not finite: loss_classifier")
    assert main(["doctor", "--device", "cpu", "--backbone", "small", "--height", "64", "--width", "64"]) == 1
    captured = capsys.readouterr()
    assert "not finite: loss_classifier" in captured.out
    assert captured.err.startswith("fastdet: the detector does not run as it should on cpu")


def test_probe_sees_what_is_not_finite(monkeypatch):
    assert doctor.probe(torch.device("cpu")) is None
    original = FasterRCNN.core

    def broken(self, *args, **kwargs):
        losses, detections = original(self, *args, **kwargs)
        return losses and {name: loss * torch.nan for name, loss in losses.items()}, detections

    monkeypatch.setattr(FasterRCNN, "core", broken)
    assert "loss_objectness" in doctor.probe(torch.device("cpu"))


def test_activations_grow_with_the_batch_and_shrink_with_frozen_layers():
    model = FasterRCNN("small", 5, box_representation_size=16, box_batch_size_per_image=4)
    one, two = (doctor.training_memory(model, batch, 128, 192) for batch in (1, 2))
    assert one.parameters == one.gradients == sum(p.numel() for p in model.parameters()) * 4
    assert 1.5 < two.activations / one.activations < 2.5
    for layer in list(model.backbone)[:4]:
        layer.requires_grad_(False)
    frozen = doctor.training_memory(model, 1, 128, 192)
    assert frozen.gradients < one.gradients
    # Layers before the first that trains keep nothing for a backward pass.
    assert frozen.activations < 0.8 * one.activations


def test_frozen_first_layers_record_no_gradient():
    model = small_detector().train()
    model.backbone[0].requires_grad_(False)
    seen = []
    model.backbone[0].register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    model.core(torch.rand(1, 3, 64, 64), torch.tensor([[64, 64]]), want_losses=False, want_detections=True)
    assert seen == [False]
