"""Progressive image sizes: the phases of a run that trains on images of several sizes, one after the other."""

import copy

from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data.build import build_sample_transform, build_train_loader, check_pairs


def phase_configs(config: CfgNode) -> list[tuple[int, CfgNode]]:
    """Split a run into phases by `DATA.IMG_SIZES`: the first epoch and the config of each phase.

    Without `DATA.IMG_SIZES`, one phase with the given config.
    """
    data = config.DATA
    sizes, epochs, batches = data.IMG_SIZES, data.IMG_SIZE_EPOCHS, data.IMG_SIZE_BATCHES
    if not sizes:
        return [(0, config)]
    configs = []
    for size, batch in zip(sizes, batches or [data.BATCH_SIZE] * len(sizes), strict=True):
        phase = config.clone()
        phase.defrost()
        phase.DATA.IMG_SIZE, phase.DATA.BATCH_SIZE = size, batch
        phase.freeze()
        configs.append(phase)
    return list(zip(epochs, configs, strict=True))


def size_phases(config: CfgNode, loader: DataLoader) -> list[tuple[int, CfgNode, DataLoader]]:
    """Build the training loader of each phase. All phases share the dataset's samples and the sampler of `loader`.

    Args:
        config: the config tree.
        loader: from `build_loaders`.

    Returns:
        First epoch, config and loader of each phase.

    Raises:
        DataError: the data do not make a batch.
    """
    phases = []
    for first_epoch, phase in phase_configs(config):
        if phase is config:
            return [(0, config, loader)]
        key = 'DATA.IMG_SIZE_BATCHES' if config.DATA.IMG_SIZE_BATCHES else 'DATA.BATCH_SIZE'
        check_pairs(phase, key)
        dataset = copy.copy(loader.dataset.dataset)
        dataset.transform = build_sample_transform(phase, is_train=True)
        sampler = loader.batch_sampler.sampler
        phases.append((first_epoch, phase, build_train_loader(phase, dataset, sampler, key=key)))
    return phases
