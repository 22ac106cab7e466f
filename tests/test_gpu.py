"""Tests that need a GPU, of packages whose other tests need packages that a GPU machine may lack."""

import pytest
import torch

from fastdet.cli import doctor
from fastdet.engine.recipes import TrainSettings, build_optimizer

pytestmark = pytest.mark.cuda


def test_doctor_finds_nothing():
    assert doctor.run_self_check(torch.device("cuda")) is None


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizers_are_fused(name):
    assert build_optimizer(torch.nn.Linear(3, 2).cuda(), TrainSettings(optimizer_name=name)).defaults["fused"]
