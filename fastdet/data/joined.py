"""Several data sets as one, with one list of classes; parts of data sets."""

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import Dataset

from fastdet.data.findings import Finding, Kind, warn_of
from fastdet.data.images import DataError, error_at
from fastdet.data.records import collect, describe_unknown
from fastdet.data.transforms import Item, make_item


@runtime_checkable
class DetectionDataset(Protocol):
    """What the data sets of this package have in common.

    Attributes:
        class_names: of labels 1, 2, ...
        ids: the names of the items.
        sizes: (height, width) of the images.
    """

    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def sizes(self) -> Sequence[tuple[int, int]]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Item: ...
    def image_path(self, index: int) -> Path | None:
        """The file of an image, if it is in one."""

    def target(self, index: int) -> dict[str, np.ndarray]:
        """The target of an item as arrays, without decoding its image."""


class JoinedImages(Dataset[Item]):
    """The items of several data sets one after another, with labels of one list of classes.

    Args:
        datasets: at least one.
        class_names: label k is `class_names[k - 1]`; when None, the names of the first, then new ones of the others.
        leave_out_others: boxes of other classes are left out, with a warning that counts them, and not an error.
        problems: where a list is given, such errors are appended to it, and the boxes left out.

    Attributes: as of `DetectionDataset`.

    Raises:
        DataError: a box is of a class that is not among `class_names`.
    """

    def __init__(
        self,
        datasets: Sequence[DetectionDataset],
        class_names: Sequence[str] | None = None,
        *,
        leave_out_others: bool = False,
        problems: list[DataError] | None = None,
    ) -> None:
        known = tuple(dict.fromkeys(name for dataset in datasets for name in dataset.class_names))
        self.class_names = known if class_names is None else tuple(class_names)
        labels = {name: k for k, name in enumerate(self.class_names, start=1)}
        self._datasets = tuple(datasets)
        # The label here of each label there; 0 is for boxes that are left out.
        self._labels = [np.array([0, *(labels.get(name, 0) for name in dataset.class_names)]) for dataset in datasets]
        self._places = [(k, index) for k, dataset in enumerate(datasets) for index in range(len(dataset))]
        self.ids = tuple(name for dataset in datasets for name in dataset.ids)
        self.sizes = [size for dataset in datasets for size in dataset.sizes]
        others: Counter[str] = Counter()
        for dataset, new_labels in zip(datasets, self._labels, strict=True):
            for index in range(0 if new_labels[1:].all() else len(dataset)):
                found = dataset.target(index)["labels"]
                names = [dataset.class_names[label - 1] for label in found[new_labels[found] == 0].tolist()]
                if names and not leave_out_others:
                    place = dataset.image_path(index) or dataset.ids[index]
                    with collect(problems):
                        raise error_at(
                            place, f"{describe_unknown(names[0], labels)}; others can be left out (--classes)"
                        )
                others.update(names)
        self._findings = [Finding(Kind.CLASS_LEFT_OUT, f"{name} ({times} boxes)") for name, times in others.items()]
        warn_of("classes", self._findings)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Item:
        k, inner = self._places[index]
        image, target = self._datasets[k][inner]
        labels = torch.from_numpy(self._labels[k])[target["labels"]]
        kept = labels > 0
        boxes, ignore = target["boxes"].as_subclass(torch.Tensor)[kept], target["ignore"][kept]
        return make_item(image, {"boxes": boxes, "labels": labels[kept], "ignore": ignore})

    def image_path(self, index: int) -> Path | None:
        k, inner = self._places[index]
        return self._datasets[k].image_path(inner)

    def target(self, index: int) -> dict[str, np.ndarray]:
        k, inner = self._places[index]
        target = self._datasets[k].target(inner)
        labels = self._labels[k][target["labels"]]
        kept = labels > 0
        return {"boxes": target["boxes"][kept], "labels": labels[kept], "ignore": target["ignore"][kept]}

    @property
    def findings(self) -> list[Finding]:
        """What the data sets warned of, but for what is about images that are not among these."""
        indices = {place: index for index, place in enumerate(self._places)}
        return self._findings + [
            finding if finding.item is None else finding._replace(item=indices[k, finding.item])
            for k, dataset in enumerate(self._datasets)
            for finding in getattr(dataset, "findings", ())
            if finding.item is None or (k, finding.item) in indices
        ]

    def select(self, indices: Sequence[int]) -> "JoinedImages":
        """The items of these indices alone, in their order."""
        part = copy.copy(self)
        part._places = [self._places[index] for index in indices]
        part.ids = tuple(self.ids[index] for index in indices)
        part.sizes = [self.sizes[index] for index in indices]
        return part

    def split(self, share: float, seed: int) -> tuple["JoinedImages", "JoinedImages"]:
        """The items without, and a random share of them, each in their order; at least one in either.

        Raises:
            DataError: there are fewer than two items.
        """
        count = len(self)
        if count < 2:
            raise DataError(f"{count} image(s) cannot be split")
        held_out = np.random.default_rng(seed).permutation(count)[: min(max(round(share * count), 1), count - 1)]
        return self.select(np.setdiff1d(np.arange(count), held_out).tolist()), self.select(np.sort(held_out).tolist())
