"""From a photograph to the network's input: torchvision's ImageNet preprocessing, with Pillow and torch alone."""

from __future__ import annotations

import os
import warnings
from typing import NamedTuple

import click
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastblocks.cli.errors import UserError

__all__ = ["Photo", "default_photo", "preprocess", "read_photo"]

RESIZE, CROP = 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_ASPECT = 100  # beyond it the resized picture would take gigabytes, and its centre shows nothing


class Photo(NamedTuple):
    """A picture in RGB and what to call it."""

    title: str
    image: Image.Image


def default_photo() -> Photo:
    """Chelsea, the cat that comes with scikit-image."""
    from skimage import data

    return Photo("chelsea (scikit-image)", Image.fromarray(data.chelsea()))


def read_photo(path: str) -> Photo:
    """Open the picture at `path`, upright and in RGB; a UserError says why it cannot be."""
    name = click.format_filename(path)
    if not os.path.exists(path):
        raise UserError(f"{name}: no such file")
    if os.path.isdir(path):
        raise UserError(f"{name} is a folder, expected a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # large photographs are fine; bombs still raise
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file).convert("RGB")
    except Image.UnidentifiedImageError:
        raise UserError(f"{name} is not a picture that Pillow can read") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name} is too large a picture") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files, by format
        raise UserError(f"{name} cannot be read as a picture ({error})") from None
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise UserError(f"{name} is too narrow to classify ({image.width} x {image.height})")
    return Photo(click.format_filename(path, shorten=True), image)


def preprocess(image: Image.Image) -> Tensor:
    """Make a picture the network's input: (1, 3, 224, 224), float32.

    Shorter side to 256 (bilinear, antialiased), centre crop of 224, ImageNet's mean and standard deviation. Sizes,
    offsets and the rounding to whole grey levels are those of torchvision's transforms on a uint8 tensor, so the input
    equals theirs. (On a PIL image they let Pillow resize; a pixel then differs by one grey level at most.)
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0).contiguous().float()
    height, width = pixels.shape[-2:]
    short = min(height, width)
    if short != RESIZE:
        size = [height * RESIZE // short, width * RESIZE // short]
        pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True).round_()
    height, width = pixels.shape[-2:]
    top, left = round((height - CROP) / 2), round((width - CROP) / 2)
    pixels = pixels[..., top : top + CROP, left : left + CROP] / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std
