"""Transforms of albumentations and torchvision, as a module of --import has them."""

import albumentations
import torch
from torchvision.transforms import v2

from data.transforms import register_transform


@register_transform('mixed')
def build_mixed(config):
    noise = albumentations.OneOf([albumentations.GaussNoise(p=1), albumentations.MotionBlur(p=1)], p=0.8)
    return albumentations.Compose([albumentations.RandomRotate90(), noise, albumentations.CoarseDropout(p=0.5)])


@register_transform('jitter')
def build_jitter(config):
    return v2.Compose([v2.RandomVerticalFlip(), v2.ColorJitter(0.5, 0.5)])


@register_transform('to_float')
def build_to_float(config):
    return v2.ToDtype(torch.float32, scale=True)


@register_transform('flip')
def build_flip(config):
    return albumentations.HorizontalFlip(p=1)
