"""The pictures to learn: scikit-learn's digits, or a folder of classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastblocks.cli.errors import UserError
from fastblocks.cli.photo import CROP, MEAN, RESIZE, STD, read_photo
from fastblocks.cli.training.distributed import World

__all__ = ["DIGITS", "Data", "Split", "batches", "load_data"]

DIGITS = "digits"
DIGITS_RESOLUTION, FOLDER_RESOLUTION = 32, 224
HELD_OUT = 0.2  # of each digit's pictures, for validation


@dataclass(frozen=True)
class Split:
    """Labels (N,), int64, and a function from indices (n,) to the network's input (n, 3, height, width), float32."""

    labels: Tensor
    pictures: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """These pictures, channels last, and their labels."""
        return self.pictures(indices).contiguous(memory_format=torch.channels_last), self.labels[indices]


@dataclass(frozen=True)
class Data:
    """What is learnt.

    Raises:
        ValueError: a label is not the number of a class, or there is nothing to learn from.
    """

    name: str
    """What to call it."""
    identity: str
    """Equal for data that give the same training."""
    classes: tuple[str, ...]
    resolution: int
    """Pixels of a side of the network's input."""
    train: Split
    val: Split

    def __post_init__(self) -> None:
        for name, split in (("train", self.train), ("val", self.val)):
            if not len(split):
                raise ValueError(f"{name}: expected pictures, got none")
            wrong = ((split.labels < 0) | (split.labels >= len(self.classes))).nonzero().flatten().tolist()
            if wrong:
                label = int(split.labels[wrong[0]])
                raise ValueError(
                    f"{name}: picture {wrong[0]} has the label {label}, expected 0 to {len(self.classes) - 1}"
                )


def batches(length: int, batch_size: int, seed: int, epoch: int, world: World) -> list[Tensor]:
    """The indices of each batch that this process takes in an epoch.

    The order follows from the sum of seed and epoch alone. It is repeated from its beginning up to a multiple of the
    number of processes, and dealt out one by one. A batch that would be smaller than the others is left out.
    """
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed + epoch))
    share = -(-length // world.size)
    mine = order[torch.arange(share * world.size) % length][world.rank :: world.size]
    return list(mine[: max(share // batch_size, 1) * batch_size].split(batch_size))


def load_data(source: str, resolution: int | None, seed: int) -> Data:
    """Read "digits", or the folder at this path; a UserError says why it cannot be.

    Args:
        source: "digits", or a folder that holds ``train/CLASS/PICTURE`` and ``val/CLASS/PICTURE``.
        resolution: pixels of a side of the network's input; None: 32 for digits, 224 for a folder.
        seed: decides which digits are held out for validation.
    """
    if source == DIGITS:
        return _digits(resolution or DIGITS_RESOLUTION, seed)
    return _folder(Path(source), resolution or FOLDER_RESOLUTION)


def _digits(resolution: int, seed: int) -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits come with scikit-learn: pip install 'fastblocks[train]'") from None
    bunch: Any = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1)  # (1797, 1, 8, 8), 0 to 16
    labels = torch.from_numpy(bunch.target).long()
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in labels.unique():
        own = (labels == digit).nonzero().flatten()
        held_out[own[torch.randperm(len(own), generator=generator)][: round(HELD_OUT * len(own))]] = True
    std, mean = torch.std_mean(images[~held_out])
    images = (images - mean) / std

    def split(chosen: Tensor) -> Split:
        own = images[chosen]

        def pictures(indices: Tensor) -> Tensor:
            large = torch.nn.functional.interpolate(own[indices], size=(resolution, resolution), mode="bilinear")
            return large.expand(-1, 3, -1, -1)

        return Split(labels[chosen], pictures)

    classes = tuple(map(str, bunch.target_names))
    return Data(DIGITS, DIGITS, classes, resolution, split(~held_out), split(held_out))


def _folder(path: Path, resolution: int) -> Data:
    for folder in (path, path / "train", path / "val"):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder, expected '{DIGITS}' or a folder with train/ and val/ in it")
    try:
        from torchvision import transforms
        from torchvision.datasets import ImageFolder
    except Exception as error:  # one built for another torch fails in its own ways
        raise UserError(f"a folder of pictures needs the torchvision of this torch ({_first_line(error)})") from error
    try:
        train, val = (ImageFolder(str(path / name)) for name in ("train", "val"))
    except OSError as error:  # no classes, a class without pictures, no permission
        raise UserError(f"{path}: {_first_line(error)}") from error
    classes = tuple(train.classes)
    if unknown := sorted(set(val.classes) - set(classes)):
        raise UserError(f"{path / 'val' / unknown[0]}: train has no class of this name")
    to_input = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    augment = [transforms.RandomResizedCrop(resolution), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(round(resolution * RESIZE / CROP)), transforms.CenterCrop(resolution)]

    def split(listing: Any, steps: list[Any]) -> Split:
        paths = [name for name, _ in listing.samples]
        labels = torch.tensor([classes.index(listing.classes[label]) for label in listing.targets])
        transform = transforms.Compose([*steps, *to_input])

        def pictures(indices: Tensor) -> Tensor:
            return torch.stack([transform(read_photo(paths[i]).image) for i in indices.tolist()])

        return Split(labels, pictures)

    names = [str(Path(name).relative_to(path)) for listing in (train, val) for name, _ in listing.samples]
    identity = f"{len(train)} + {len(val)} pictures of {len(classes)} classes, listing {_digest(names)}"
    return Data(path.name, identity, classes, resolution, split(train, augment), split(val, centre))


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()[:8]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
