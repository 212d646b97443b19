"""Train, evaluate or benchmark a detector on a dataset in COCO's layout.

    torchrun --nproc_per_node 8 -m detection.main --cfg detection/configs/cascade_mask_rcnn_msg_tiny_3x.yaml \
        --data-path <coco> --pretrained <classifier>

docs/detection.md has the commands for other machines. This file holds what is specific to detection: its losses, its
metrics, and which parts of the network are trained. engine/run_task.py has the steps of a run, which all tasks share.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data.device_copies import DeviceCopies
from detection.config import TREE, check_schedule, get_config
from detection.data import build_eval_loader, build_loaders, with_classes_of_data
from detection.data.coco import CocoDataset
from detection.data.transforms import resize
from detection.detections import Detections
from detection.draw import beside, draw_detections, draw_ground_truth
from detection.evaluation import CocoEvaluation
from detection.lr_scheduler import build_scheduler
from detection.models import build_detector
from detection.models.backbone import Backbone, freeze_batch_norms
from detection.models.build import Detector
from detection.models.norm import synchronize_norms
from detection.tta import build_detect_fn
from engine.evaluation import EvaluateFn, EvaluationLoop, Poll, no_poll
from engine.run import Run, run_parser
from engine.run_task import run_task
from engine.task import LossFn, Task
from engine.weights import fit_weights, load_weights
from optimizer import build_optimizer
from utils import exit_on_user_error, random_states, report_write_errors, set_random_states


def parse_option(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a flag not given is None and overrides nothing."""
    return run_parser(
        'python -m detection.main',
        'Train, evaluate or benchmark a detector. Every setting is a key of the config tree (docs/configuration.md); a '
        "flag's key is in parentheses. Flags override --opts, --opts override the file, and the file overrides the "
        'defaults.',
        TREE,
        example='detection/configs/cascade_mask_rcnn_msg_tiny_3x.yaml',
    ).parse_args(argv)


def main(config: CfgNode, until: tuple[int, int] | None = None) -> None:
    """Train, evaluate or benchmark as the config says; `until` ends training early, see `engine.trainer.Trainer`."""
    config = with_classes_of_data(config)
    if config.THROUGHPUT_MODE:
        from tools.benchmark.throughput import log_throughput  # programs of tools/ know this file

        log_throughput(TASK, config)
    else:
        run_task(TASK, config, until)


class Detection(Task):
    """Object detection, with or without masks."""

    name = 'detection'
    program = 'detection.main'
    tree = TREE
    metric = 'box_AP'
    metric_name = 'box AP'
    first_label = 1

    def build_network(self, config: CfgNode) -> Detector:
        """A Cascade, Mask or Faster R-CNN."""
        return build_detector(config)

    def build_loaders(self, config: CfgNode, rank: int = 0, world_size: int = 1) -> tuple[DataLoader, DataLoader]:
        """Loaders of lists of images and of their targets."""
        return build_loaders(config, rank, world_size)

    def build_eval_loader(self, config: CfgNode, rank: int = 0, world_size: int = 1) -> DataLoader:
        """A loader of one image at a time."""
        return build_eval_loader(config, rank, world_size)

    def head_pattern(self, network: Detector) -> str:
        """The names of the last layers of the box and mask heads."""
        return Detector.HEAD

    def backbone(self, network: Detector) -> Backbone:
        """The network in front of the feature pyramid."""
        return network.backbone.body

    def build_optimizer(self, config: CfgNode, network: nn.Module, lr: float) -> Optimizer:
        """Two groups; biases decay, as published."""
        return build_optimizer(config, network, lr, decay_biases=True)

    def build_scheduler(
        self, config: CfgNode, optimizer: Optimizer, updates_before: Callable[[int], int], lr_scale: float
    ) -> Scheduler:
        """Linear warm-up and drops, relative to the optimizer's peak learning rate."""
        return build_scheduler(config, optimizer, updates_before(1))

    def check_schedule(self, config: CfgNode, steps_per_epoch: int | None = None) -> None:
        """Refuse a warm-up or drops that do not end within the run."""
        check_schedule(config, steps_per_epoch)

    def build_loss(self, run: Run, network: nn.Module, dataset: CocoDataset) -> LossFn:
        """The detector's losses: RPN, classes, boxes and masks."""
        to_device = DeviceCopies(run.process.device)

        def loss_fn(batch: tuple[list[Tensor], list[dict[str, Any]]]) -> dict[str, Tensor]:
            return network(*to_device(batch))

        return loss_fn

    def build_evaluation(self, run: Run, loader: DataLoader) -> EvaluateFn:
        """COCO's metrics."""
        return lambda network, poll, suffix: validate(run, network, loader, poll, suffix)

    def prepare_training(self, run: Run, network: Detector, is_pretrained: bool) -> nn.Module:
        """Freeze trained batch norms, as `TRAIN.FROZEN_BATCH_NORM` says, and synchronise the others."""
        network = synchronize_norms(network, run.process.device, run.process.world_size)
        if run.config.TRAIN.FROZEN_BATCH_NORM and is_pretrained:
            count = freeze_batch_norms(network.backbone.body)
            if count:
                run.logger.info(f'{count} batch norms of the backbone stay as they were loaded')
        return network

    def load_other_task(
        self, network: Detector, checkpoint: Mapping[str, Any], path: str | Path, missing: str = 'error'
    ) -> list[str]:
        """Load a classifier's weights into the backbone; see `load_classifier`."""
        notes = load_classifier(network, checkpoint, path, missing)
        return ['it is a classifier: its weights start the backbone', *notes]


TASK = Detection()


def load_classifier(
    model: Detector, checkpoint: Mapping[str, Any], path: str | Path, missing: str = 'error'
) -> list[str]:
    """Load a classifier's weights, except its head, into the backbone.

    Weights of other window sizes are fitted. Norms of the feature maps before the last stage, which a classifier does
    not have, keep their initial values.

    Args:
        model: the detector.
        checkpoint: from `load_checkpoint`.
        path: the checkpoint's path, for messages.
        missing: see `load_weights`.

    Returns:
        What was fitted, and what was not loaded; see `fit_weights` and `load_weights`.

    Raises:
        CheckpointError: it holds a different network; the message names the weights.
    """
    body = model.backbone.body
    weights, notes = fit_weights(body, checkpoint['model'], path, body.fit_classifier)
    loaded = load_weights(body, {'model': weights}, path, missing=missing)
    return notes + loaded.notes


@torch.inference_mode()
def validate(run: Run, network: Detector, loader: DataLoader, poll: Poll = no_poll, suffix: str = '') -> CocoEvaluation:
    """Evaluate a detector on every image once; draw the first `SHOW` images into the run's folder.

    Args:
        run: the run.
        network: the detector, not wrapped in DDP.
        loader: this process's shard of the images; rank 0 has the largest.
        poll: called after each batch, equally often in every process.
        suffix: appended to the name of the folder of the drawn images, which have the ground truth on the left.

    Returns:
        The finished evaluation.
    """
    device, process, classes = run.process.device, run.process, loader.dataset.classes
    network.eval()
    evaluation = CocoEvaluation(loader.dataset)
    loop, detect = EvaluationLoop(run, loader, poll), build_detect_fn(run.config, network)
    to_device = DeviceCopies(device)
    with_loss = run.config.TEST.LOSS and loader.dataset.is_labelled
    for images, targets in loop:
        index = process.rank + loop.step * process.world_size  # in the dataset, as there is one image per batch
        with run.precision.autocast():
            detections = detect(to_device(images))
            losses = evaluation_losses(run, network, images[0], targets[0], index) if with_loss else None
        evaluation.update(targets, detections, losses)
        counts = [len(x['boxes']) for x in detections]
        loop.log(lambda counts=counts: f'detections {sum(counts) / len(counts):.1f}')
        if index < run.config.SHOW:
            shown = Detections.from_output(detections[0], classes, images[0].shape[1:]).above(run.config.SHOW_SCORE)
            picture = draw_detections(images[0], shown)
            if loader.dataset.is_labelled:
                picture = beside(draw_ground_truth(images[0], targets[0], classes), picture)
            save_picture(picture, run.output_dir / f'show{suffix}', targets[0]['image_id'])
    evaluation.finish()
    run.logger.info(f'{len(loader.dataset)} images, by {evaluation.evaluator.name}:\n{evaluation.table()}')
    return evaluation


def evaluation_losses(
    run: Run, network: Detector, image: Tensor, target: dict[str, Any], index: int
) -> dict[str, float]:
    """Compute the training losses of one evaluation image, at its size in evaluation.

    Training leaves out images without objects, unless `DATA.EMPTY_IMAGES` says otherwise, and so does this. Anchors and
    RoIs are sampled by the image's index, so that each evaluation samples the same; the run's random numbers are not
    touched.

    Args:
        run: the run.
        network: the detector, in evaluation mode.
        image: (3, H, W), in [0, 1].
        target: its objects.
        index: of the image in the dataset.

    Returns:
        Losses by name, already weighted; nothing for an image that is left out.
    """
    config, device = run.config, run.process.device
    if not len(target['boxes']) and not config.DATA.EMPTY_IMAGES:
        return {}
    sample = DeviceCopies(device)((image, target))
    image, target = resize(*sample, config.INPUT.TEST_SHORT, config.INPUT.MAX_LONG)
    states = random_states(device)
    torch.manual_seed(index)
    try:
        losses = network.losses([image], [target])
        return dict(zip(losses, torch.stack([*losses.values()]).tolist(), strict=True))
    finally:
        set_random_states(states, device)


def save_picture(picture: Image.Image, folder: Path, image_id: Any) -> None:
    """Save a picture under its image's id."""
    with report_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f'{image_id}.png')


if __name__ == '__main__':
    with exit_on_user_error():
        main(get_config(parse_option()))
