"""Train, evaluate or time a detector on a data set in COCO's layout.

    python -m detection.main --cfg detection/configs/cascade_mask_rcnn_msg_tiny_3x.yaml --data-path <coco>

README has the commands for several GPUs.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from checkpoint import load_weights
from detection.config import TREE, get_config
from detection.data import build_eval_loader, build_loaders
from detection.draw import draw_detections
from detection.evaluation import CocoEvaluation
from detection.models import build_detector
from detection.models.build import Detector
from detection.models.norm import synchronize_norms
from detection.schedule import build_scheduler
from job import compare_classes, continue_run, job_parser, load_start, prepare_training, started
from logger import peak_memory_mb
from lr_scheduler import learning_rate_scale
from optimizer import build_optimizer
from timing import alone
from trainer import Run, Trainer, batches_short, progress
from utils import mistakes_in_one_line, writing_in

# Images an update that the config's learning rate is for.
PUBLISHED_BATCH = 16


def parse_option(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a flag that is not given is None and overrides nothing."""
    parser = job_parser(
        'Train, evaluate or time a detector. Every setting is a key of the config tree '
        '(detection/config.py); flags go before --opts, --opts before the file, the file before the defaults.',
        cfg='detection/configs/cascade_mask_rcnn_msg_tiny_3x.yaml',
        data='annotations/instances_<split>.json and a folder of images for each split',
    )
    add = parser.add_argument
    add('--benchmark', action='store_true', default=None, help='measure images/s of the whole detector and stop')
    add('--show', type=int, metavar='N', help='with --eval, draw the first N images with their detections')
    return parser.parse_args(argv)


def main(config: CfgNode) -> None:
    """Do the config's job in this process; its folder is `<OUTPUT>/<MODEL.NAME>/<TAG>`."""
    trains = not (config.EVAL_MODE or config.BENCHMARK_MODE)
    with started(config) as run:
        model = build_detector(config).to(run.process.device)
        run.logger.info(f'{config.MODEL.NAME}: {sum(p.numel() for p in model.parameters()):,} parameters')
        checkpoint = load_start(run, trains, load_into(run, model))
        if trains:
            train(run, model, checkpoint)
        elif config.BENCHMARK_MODE:
            benchmark(run, run.precision.prepare(model)[0])
        else:
            evaluate(run, run.precision.prepare(model)[0], checkpoint)


def load_into(run: Run, model: Detector) -> Callable[[dict[str, Any], str, bool], None]:
    """What puts a checkpoint's weights into the detector, for `load_start`.

    A new run may start from a classifier's, or from those of a detector of other classes.
    """

    def load(checkpoint: dict[str, Any], path: str, is_new_run: bool) -> None:
        if is_new_run and not any(name.startswith('backbone.') for name in checkpoint['model']):
            load_classifier(model, checkpoint, path)
            run.logger.info(f'{path} is a classifier: its weights start the backbone')
        else:
            of_classes = r'roi_heads\..*(logits|offsets)\.'
            if load_weights(model, checkpoint, path, of_classes if is_new_run else None):
                run.logger.info(f'{path} has other classes: the last layers of the heads are trained anew')

    return load


def load_classifier(model: Detector, checkpoint: dict[str, Any], path: str) -> None:
    """Take over a classifier's weights, all but its head; the norms of the maps before the last stay new.

    Args:
        model: the detector.
        checkpoint: from `load_checkpoint`.
        path: where it came from, for messages.

    Raises:
        CheckpointError: it is of another network; the message names the weights.
    """
    body = model.backbone.body
    own = {name: value for name, value in body.state_dict().items() if name.startswith('out_norms.')}
    theirs = {name: value for name, value in checkpoint['model'].items() if not name.startswith('head.')}
    load_weights(body, {'model': theirs | own}, path)


def train(run: Run, model: Detector, checkpoint: dict[str, Any] | None) -> None:
    """Train to the last epoch, evaluating after each; continue the checkpoint if there is one."""
    config, process, logger = run.config, run.process, run.logger

    # Data, losses
    train_loader, eval_loader = build_loaders(config, process.rank, process.world_size)
    for note in train_loader.dataset.dataset.notes:
        logger.info(f'training images: {note}')

    def losses_of(network: nn.Module, batch: tuple[list[Tensor], list[dict[str, Any]]]) -> dict[str, Tensor]:
        images, targets = batch
        return network(*to_device(images, targets, process.device))

    def figures_of(network: nn.Module, poll: Callable[[], None]) -> dict[str, float]:
        return validate(run, network, eval_loader, poll).figures

    # Optimizer, schedule
    model = synchronize_norms(model, process.device, process.world_size)
    scale = learning_rate_scale(config, process.world_size, PUBLISHED_BATCH)
    optimizer = build_optimizer(config, model, lr=config.TRAIN.BASE_LR * scale, decay_biases=True)  # as published
    network, state = prepare_training(run, model, optimizer, train_loader, partial(build_scheduler, config))
    classes = class_names(eval_loader)
    if checkpoint is not None:
        compare_classes(run, checkpoint, classes)
        continue_run(run, state, checkpoint, TREE.changed_keys(config, checkpoint.get('config', {})))
    entries = {'classes': classes}
    Trainer(run, state, network, train_loader, losses_of, figures_of, 'box_AP', entries, 'box AP').fit()


def evaluate(run: Run, model: Detector, checkpoint: dict[str, Any]) -> None:
    """Evaluate the checkpoint's weights, which the detector has, and their average if it holds one.

    What is found is written into the run's folder: `results.json`, and `results_average.json`.
    """
    loader = build_eval_loader(run.config, run.process.rank, run.process.world_size)
    compare_classes(run, checkpoint, class_names(loader))
    validate(run, model, loader, show=run.config.SHOW).write(run.output_dir / 'results.json')
    if 'model_ema' in checkpoint:
        average = copy.deepcopy(model)
        load_weights(average, {'model': checkpoint['model_ema']}, 'model_ema of the checkpoint')
        run.logger.info('average of the weights:')
        validate(run, average, loader).write(run.output_dir / 'results_average.json')


def to_device(
    images: list[Tensor], targets: list[dict[str, Any]], device: torch.device
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A batch's images and what the losses need of its targets, on the device."""
    needed = ('boxes', 'labels', 'masks')
    return (
        [image.to(device, non_blocking=True) for image in images],
        [{name: target[name].to(device, non_blocking=True) for name in needed} for target in targets],
    )


def class_names(loader: DataLoader) -> list[str]:
    """Names of the labels, from that of label 1 on."""
    return [category['name'] for category in loader.dataset.categories]


@torch.inference_mode()
def validate(
    run: Run, model: nn.Module, loader: DataLoader, poll: Callable[[], None] = lambda: None, show: int = 0
) -> CocoEvaluation:
    """Evaluate the detector, not wrapped, on every image once.

    Args:
        run: the job.
        model: the detector.
        loader: this process's share of the images; rank 0 has the most.
        poll: called after each batch, as often in every process.
        show: how many images to draw, into the run's folder.

    Returns:
        The finished evaluation.
    """
    device, process = run.process.device, run.process
    model.eval()
    evaluation, names = CocoEvaluation(loader.dataset), class_names(loader)
    began, seen = time.time(), 0
    for number, (images, targets) in enumerate(progress(loader, 'evaluation', process)):
        with run.precision.autocast():
            detections = model([image.to(device, non_blocking=True) for image in images])
        evaluation.update(targets, detections)
        for image, target, found in zip(images, targets, detections, strict=True):
            if process.rank + seen * process.world_size < show:  # its place in the data set
                picture = draw_detections(image, found, names, run.config.SHOW_SCORE)
                save_picture(picture, run.output_dir / 'show', target['image_id'])
            seen += 1
        if number % run.config.PRINT_FREQ == 0:
            count = sum(len(found['boxes']) for found in detections) / len(detections)
            run.logger.info(
                f'Test: [{number}/{len(loader)}]\tTime {(time.time() - began) / (number + 1):.3f}\t'
                f'detections {count:.1f}\tMem {peak_memory_mb(device):.0f}MB'
            )
        poll()
    images = len(loader.dataset)
    for _ in range(batches_short(loader, process.world_size)):
        poll()
    evaluation.finish()
    run.logger.info(f'{images} images:\n{evaluation.table()}')
    return evaluation


def save_picture(picture: Any, folder: Path, image_id: Any) -> None:
    """Save a picture under its image's id."""
    with writing_in(folder):
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f'{image_id}.png')


@torch.inference_mode()
def benchmark(run: Run, model: Detector) -> float:
    """Log images/s of the whole detector, one image a time, the median of ten turns.

    The image is random, as high as in evaluation and 1.6 times as wide (1280 x 800). What it holds depends on the
    weights: a new detector finds nothing, and so spends no time on masks.
    """
    model.eval()
    side = run.config.INPUT.TEST_SHORT
    image = torch.rand(3, side, round(1.6 * side), device=run.process.device)

    def forward() -> list[dict[str, Tensor]]:
        with run.precision.autocast():
            return model([image])

    found = len(forward()[0]['boxes'])
    images_per_s = 1 / alone(forward, run.process.device).median
    run.logger.info(
        f'image {image.shape[2]} x {side} throughput {images_per_s:.2f} images/s, '
        f'{found} detections, mem {peak_memory_mb(run.process.device):.0f}MB'
    )
    return images_per_s


if __name__ == '__main__':
    with mistakes_in_one_line():
        main(get_config(parse_option()))
