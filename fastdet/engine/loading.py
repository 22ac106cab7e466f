"""The batches of a training run: drawn ahead, augmented in workers, brought to the device while the last step runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastdet.data import DataError, Item, Target, collate
from fastdet.data.augmentation import Preset, augment, build
from fastdet.data.transforms import make_item
from fastdet.engine.recipes import EpochPlans
from fastdet.weights.files import one_line

Batch = tuple[list[Tensor], list[Target]]


class AugmentedDataset(Dataset[Item]):
    """A data set whose keys are an index and the seed of all that is drawn for the item: workers draw nothing else."""

    def __init__(self, dataset: Dataset[Item], preset: Preset, sizes: tuple[int, int]) -> None:
        self.dataset, self.transform = dataset, build(preset, sizes)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        index, seed = key
        try:
            item = make_item(*self.dataset[index])
        except ValueError as error:
            raise DataError(f"item {index} of the data set: {error}") from error
        image, target = augment(self.transform, item, seed)
        # What is sampled in the image then depends neither on what is beside it nor on which process has it.
        return image, {**target, "seed": torch.tensor(seed)}


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


def digest(dataset: Any) -> str | None:
    """Of the names and boxes of a data set of `fastdet.data`, to know it again; None of others."""
    if not (hasattr(dataset, "ids") and callable(getattr(dataset, "target", None))):
        return None
    sums = hashlib.blake2b(digest_size=16)
    for index, name in enumerate(dataset.ids):
        target = dataset.target(index)
        sums.update(repr((name, *(target[key].tolist() for key in ("boxes", "labels", "ignore")))).encode())
    return sums.hexdigest()


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
        # Without this generator, a loader draws from the global one, which is the model's.
        generator=torch.Generator().manual_seed(seed),
    )
    batches = _name_killed_workers(loader)
    return _copy_ahead(batches, device) if device.type == "cuda" else batches


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

    def give(images: list[Tensor]) -> list[Tensor]:
        stream = torch.cuda.current_stream(device)
        stream.wait_stream(copies)
        for image in images:
            # Its memory is of the other stream, which must not use it anew before this one is done.
            image.record_stream(stream)
        return images

    last: Batch | None = None
    for images, targets in batches:
        with torch.cuda.stream(copies):
            copied = [image.to(device, non_blocking=True) for image in images]
        if last is not None:
            yield give(last[0]), last[1]
        last = copied, targets
    if last is not None:
        yield give(last[0]), last[1]
