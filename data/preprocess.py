"""Prepare a batch for the network, on the device: normalisation and random erasing of the fast pipeline."""

import torch
from torch import Tensor
from yacs.config import CfgNode

from data.dataset import Sample
from data.device_copies import DeviceCopies
from data.images import DataError
from data.transforms import mean_and_std


class Preprocess:
    """Moves a batch to the device and, in the fast pipeline, normalises it and fills the rectangles to erase there.

    Args:
        config: the config tree.
        device: the network's device.
    """

    def __init__(self, config: CfgNode, device: torch.device):
        self.device, self.fill = device, config.AUG.REMODE
        self.copies = DeviceCopies(device)
        self.mean, self.std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in mean_and_std(config))

    def __call__(self, batch: Sample) -> tuple[Tensor, Tensor]:
        """Normalised images (B, C, H, W), float32, and targets, see `Sample`.

        Raises:
            DataError: images are already normalised, so that their rectangles to erase would not be filled.
        """
        if batch.image.dtype != torch.uint8 and batch.erasing.numel():
            raise DataError(
                f'the transform gives images of {batch.image.dtype} and rectangles to erase, which are for images of '
                f'torch.uint8: erase within the transform, and give data.dataset.NO_ERASING'
            )
        images, targets = self.copies([batch.image, batch.target])
        images = self.normalise(images)
        if batch.image.dtype == torch.uint8:
            self.erase(images, batch.erasing)
        return images, targets

    def prepare(self, images: Tensor) -> Tensor:
        """Move images of either pipeline to the device and normalise them, without erasing: (B, C, H, W)."""
        return self.normalise(self.copies(images))

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise uint8 images (B, H, W, C) like torchvision's ToTensor and Normalize; keep normalised images."""
        if images.dtype != torch.uint8:
            return images
        images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return images.div_(255).sub_(self.mean).div_(self.std)

    def erase(self, images: Tensor, erasing: Tensor) -> None:
        """Fill rectangles of normalised images in place: with zeros, a random colour, or a random colour per pixel.

        The colours are a function of each rectangle's own seed, so they depend neither on the batch nor on the rank.

        Args:
            images: (B, C, H, W), on the device.
            erasing: (B, boxes, 5), on the CPU; see `Sample`.
        """
        generator = torch.Generator(self.device)
        for image, rectangles in zip(images, erasing.tolist(), strict=True):
            for top, left, height, width, seed in rectangles:
                shape = (len(image), height, width) if self.fill == 'pixel' else (len(image), 1, 1)
                colours = 0.0
                if self.fill != 'const' and height:
                    colours = torch.randn(shape, generator=generator.manual_seed(seed), device=self.device)
                image[:, top : top + height, left : left + width] = colours
