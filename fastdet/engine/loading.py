"""The batches of a run: planned by a seed, augmented in workers, brought to the device during the step before."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from fastdet.data import DataError, DetectionDataset, Item, Target, collate
from fastdet.data.augmentation import Preset, augment, build
from fastdet.data.transforms import make_item
from fastdet.engine.distributed import ALONE, Processes, count_on_machine
from fastdet.engine.recipes import TrainSettings
from fastdet.models.anchors import Size
from fastdet.models.settings import Settings
from fastdet.weights.files import one_line

Batch = tuple[list[Tensor], list[Target]]
# Processes that load images for a GPU, and how many batches each has ready, which is torch's default.
_WORKERS, _READY = 4, 2
# The images of a step: their indices, each with the seed of what is drawn for it.
BatchPlan = list[tuple[int, int]]


class AugmentedDataset(Dataset[Item]):
    """A data set whose keys are an index and the seed of all that is drawn for the item: workers draw nothing else."""

    def __init__(self, dataset: Dataset[Item], preset: Preset, sizes: tuple[int, int]) -> None:
        self.dataset, self.transform = dataset, build(preset, sizes)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        index, seed = key
        try:
            image, target = self.dataset[index]
            item = make_item(image, target)
        except ValueError as error:
            raise DataError(f"item {image_names(self.dataset, [index])} of the data set: {error}") from error
        image, target = augment(self.transform, item, seed)
        # What is sampled in the image then depends neither on what is beside it nor on which process has it.
        return image, {**target, "seed": torch.tensor(seed)}


def augment_for(model: nn.Module, dataset: Dataset[Item], settings: TrainSettings) -> AugmentedDataset:
    """The data set with the augmentation of the settings, for the sizes to which the model resizes."""
    of_model: Settings | None = getattr(model, "settings", None)
    if of_model is None and settings.augmentation == "scale-jitter":
        raise ValueError("augmentation 'scale-jitter' needs a model with settings, for the size of its images")
    sizes = (of_model.min_sizes[-1], of_model.max_size) if of_model else (0, 0)
    return AugmentedDataset(dataset, settings.augmentation, sizes)


def sizes_of(dataset: Any) -> list[tuple[int, int]] | None:
    """(height, width) of the images of a data set; None if it has no `sizes`.

    Raises:
        ValueError: it has another number of them, or one that is no size.
    """
    sizes = getattr(dataset, "sizes", None)
    if sizes is None:
        return None
    found = [tuple(map(int, size)) for size in sizes]
    if len(found) != len(dataset) or not all(len(size) == 2 and min(size) > 0 for size in found):
        raise ValueError(f"sizes must be (height, width) of each of the {len(dataset)} images, got {found!r:.100}")
    return found  # type: ignore[return-value]


def check_ids(dataset: Any) -> None:
    """Raises ValueError if a data set has another number of `ids`, which name its images, than images."""
    ids = getattr(dataset, "ids", None)
    if ids is not None and len(ids) != len(dataset):
        raise ValueError(f"ids must name each of the {len(dataset)} images, got {len(ids)} names")


def image_names(dataset: Any, indices: Sequence[int]) -> str:
    """What a data set calls its items, in a line: its `ids`, else their indices."""
    while isinstance(dataset, Subset):
        dataset, indices = dataset.dataset, [dataset.indices[index] for index in indices]
    return ", ".join(str(dataset.ids[index]) if hasattr(dataset, "ids") else str(index) for index in indices)


def digest(dataset: Any) -> str | None:
    """Of the names and boxes of a data set of `fastdet.data`, to know it again; None of others."""
    if not isinstance(dataset, DetectionDataset):
        return None
    sums = hashlib.blake2b(digest_size=16)
    for index, name in enumerate(dataset.ids):
        target = dataset.target(index)
        sums.update(repr((name, *(target[key].tolist() for key in ("boxes", "labels", "ignore")))).encode())
    return sums.hexdigest()


def plan_epoch(
    length: int, settings: TrainSettings, epoch: int, sizes: Sequence[Size] | None = None
) -> list[BatchPlan]:
    """The batches of an epoch, counted from 0: indices of images, each with the seed of its augmentation.

    It depends on nothing but the arguments, so an epoch is the same in a resumed run and with any number of workers.
    With `sizes` (height, width) of the images, those of a batch are of one group of aspect ratios, except in batches
    that are made of what is left of the groups. The number of batches does not depend on it.
    """
    rng = np.random.default_rng((settings.seed, epoch))
    order = rng.permutation(length)
    seeds = rng.integers(1 << 63, size=length)
    size, groups = settings.batch_size, _aspect_groups(length, settings.aspect_groups, sizes)
    batches, rest = list[np.ndarray](), list[np.ndarray]()
    for group in np.unique(groups):
        members = order[groups[order] == group]
        full = len(members) // size * size
        batches += np.split(members[:full], full // size) if full else []
        rest.append(members[full:])
    # What is left, of similar aspect ratios side by side.
    left = np.concatenate(rest) if rest else order
    batches += [left[start : start + size] for start in range(0, len(left), size)]
    if len(rest) > 1:
        batches = [batches[k] for k in rng.permutation(len(batches))]
    return [[(index, int(seeds[index])) for index in batch.tolist()] for batch in batches]


def _aspect_groups(length: int, steps: int, sizes: Sequence[Size] | None) -> np.ndarray:
    """The group of each image."""
    if not steps or sizes is None:
        return np.zeros(length, dtype=np.int64)
    height, width = np.array(sizes, dtype=np.float64).reshape(-1, 2).T
    return np.round(np.log2(width / height) * steps).astype(np.int64)


class EpochPlans:
    """The batches from a step of an epoch on to the end of another, for a loader.

    Args:
        length: images of the data set.
        settings: of the run.
        epochs: those to plan, counted from 0.
        first: steps of the first of them that are done already.
        sizes: (height, width) of the images, if they are known.
        processes: that share each batch.
    """

    def __init__(
        self,
        length: int,
        settings: TrainSettings,
        epochs: range,
        first: int,
        sizes: Sequence[Size] | None,
        processes: Processes = ALONE,
    ) -> None:
        self.length, self.settings, self.epochs, self.first, self.sizes = length, settings, epochs, first, sizes
        self.processes = processes

    @property
    def steps(self) -> int:
        """Of a whole epoch."""
        return -(-self.length // self.settings.batch_size)

    def __iter__(self) -> Iterator[BatchPlan]:
        for epoch in self.epochs:
            yield from map(self.share, self.of(epoch))

    def share(self, batch: BatchPlan) -> BatchPlan:
        """What this process loads of a batch: its share, and where that is nothing any image."""
        return self.processes.share(batch) or batch[:1]

    def of(self, epoch: int) -> list[BatchPlan]:
        """The batches of one epoch that are to be done, of all processes."""
        plan = plan_epoch(self.length, self.settings, epoch, self.sizes)
        return plan[self.first :] if epoch == self.epochs.start else plan


def load_batches(
    dataset: Dataset[Item], plans: EpochPlans, workers: int, seed: int, device: torch.device
) -> Iterator[Batch]:
    """The batches of all epochs that are left, with the images on the device and the targets on the CPU.

    One loader serves the whole run, so that its workers start once and load ahead over the end of an epoch.

    Args:
        dataset: takes the keys of the plans.
        plans: of the epochs.
        workers: processes that load; 0 loads in this one.
        seed: of torch's generators in the workers.
        device: on a GPU images come through pinned memory, each batch while the one before is used.

    Raises:
        DataError: a worker was killed.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=plans,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_sigterm,
        # Without this generator, a loader draws from the global one, which is the model's.
        generator=torch.Generator().manual_seed(seed),
    )
    batches = _name_killed_workers(loader)
    return _copy_ahead(batches, device) if device.type == "cuda" else batches


def default_workers(device: torch.device, batch_size: int, sizes: Sequence[Size]) -> int:
    """Processes that load images where their number is not given: none on a CPU, whose cores the step takes.

    On a GPU four, of each process of the run, as far as its machine has a core for each of them, and shared memory for
    twice what they have ready; a container mostly has 64 MB. `sizes` is (height, width) of each image.
    """
    if device.type != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    runs = count_on_machine()
    most = min(_WORKERS, cores // runs - 1)
    if os.path.isdir("/dev/shm"):
        ready = _READY * -(-batch_size // runs) * 3 * max((height * width for height, width in sizes), default=1)
        most = min(most, shutil.disk_usage("/dev/shm").free // (2 * runs * ready))
    return max(most, 0)


def ignore_sigterm(worker: int) -> None:
    """For workers: only the loader's SIGTERM ends them. Who asks a run to end often asks all of its processes, and the
    run has a step to take until then. Without effect where Python does not tell from whom a signal is."""
    if not hasattr(signal, "sigwaitinfo"):
        return

    def exit_for_parent() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=exit_for_parent, daemon=True).start()


def _name_killed_workers(loader: Iterable[Any]) -> Iterator[Any]:
    """What the loader gives; its RuntimeError of a worker that was killed as a DataError."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(f"{one_line(error)} (too little memory? fewer workers take less)") from error


def _copy_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches of pinned images on a GPU; each is copied, on a stream of its own, before the last one is given."""
    copies = torch.cuda.Stream(device)

    def give(images: list[Tensor], copied: torch.cuda.Event) -> list[Tensor]:
        stream = torch.cuda.current_stream(device)
        # For these, not for the whole of the other stream, which has the next batch by now.
        stream.wait_event(copied)
        for image in images:
            # Its memory is of the other stream, which must not use it anew before this one is done.
            image.record_stream(stream)
        return images

    last: tuple[list[Tensor], torch.cuda.Event, list[Target]] | None = None
    for images, targets in batches:
        with torch.cuda.stream(copies):
            on_device, copied = [image.to(device, non_blocking=True) for image in images], copies.record_event()
        if last is not None:
            yield give(*last[:2]), last[2]
        last = on_device, copied, targets
    if last is not None:
        yield give(*last[:2]), last[2]
