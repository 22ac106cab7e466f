"""What a training run takes beside its steps: the loop, learning rates, rows, the bar, the average of the weights."""

import time
from itertools import count

import pytest
import torch
from torch.utils.data import Dataset

import fastdet
from fastdet.data import Item, Shapes
from fastdet.engine import TrainSettings, train
from fastdet.engine.step import Stepper

IMAGES, BATCH, LOG_EVERY = 80, 4, 10


class InMemory(Dataset[Item]):
    """Drawn shapes, drawn once, so that loading takes next to nothing."""

    def __init__(self) -> None:
        shapes = Shapes(8, size=320)
        self.items = [shapes[index] for index in range(8)]

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> Item:
        return self.items[index % len(self.items)]


@pytest.mark.parametrize("ema", [0.0, 0.999], ids=["", "ema"])
def test_overhead_of_a_step(benchmark, tmp_path, capsys, device, monkeypatch, ema):
    """The share of the time after the first reading that is neither in a step nor spent on loading."""
    durations, step, number = list[float](), Stepper.__call__, count()

    def timed(self, *batch):
        start = time.perf_counter()
        row = step(self, *batch)
        durations.append(time.perf_counter() - start)
        return row

    monkeypatch.setattr(Stepper, "__call__", timed)
    settings = TrainSettings(epochs=1, batch_size=BATCH, log_every=LOG_EVERY, ema=ema, augmentation="none")
    model = fastdet.FasterRCNN("mobilenet_v2_fpn", 5, min_size=320, max_size=320).to(device)
    shares = []

    def run() -> None:
        durations.clear()
        rows = train(model, InMemory(), tmp_path / str(next(number)), settings, progress=False)
        seconds = [LOG_EVERY * BATCH / row["images_per_second"] for row in rows[1:]]
        loading = sum(row["data_wait"] * length for row, length in zip(rows[1:], seconds, strict=True))
        shares.append(1 - (sum(durations[LOG_EVERY:]) + loading) / sum(seconds))

    benchmark.pedantic(run, rounds=1, iterations=1)
    benchmark.extra_info["overhead"] = shares[-1]
    with capsys.disabled():
        print(f"\n{'with' if ema else 'without'} an average: {shares[-1]:.2%} of the time is neither step nor data")
    if torch.device(device).type == "cpu":
        assert shares[-1] < 0.02
