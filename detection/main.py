"""Train, evaluate or time a detector on a dataset in COCO's layout.

    torchrun --nproc_per_node 8 -m detection.main --cfg detection/configs/cascade_mask_rcnn_msg_tiny_3x.yaml \
        --data-path <coco> --pretrained <classifier>

docs/detection.md has the commands for other machines.
"""

import argparse
import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data.device_copies import DeviceCopies
from detection.config import TREE, get_config
from detection.confusion import BACKGROUND, confusion_matrix, draw_confusion
from detection.data import build_eval_loader, build_loaders, with_classes_of_data
from detection.draw import beside, draw_detections, draw_ground_truth
from detection.evaluation import CocoEvaluation
from detection.lr_scheduler import build_scheduler
from detection.models import build_detector
from detection.models.backbone import Backbone, freeze_batch_norms
from detection.models.build import Detector
from detection.models.norm import synchronize_norms
from detection.tta import build_detect_fn
from engine.checkpoint import fit_weights, load_weights
from engine.config_tree import ConfigError
from engine.evaluation import EvaluationLoop, Poll, evaluate_with_ema, load_ema, no_poll
from engine.experiment import describe_run, log_notes, warn_of_other_classes
from engine.meter import peak_memory_mb
from engine.resume import Start, begin_training, find_start
from engine.run import Run, build_state, run_parser, start_run
from engine.timing import time_callable
from engine.trainer import Trainer
from optimizer import build_optimizer
from utils import exit_on_user_error, report_write_errors

# Images per update that the config's learning rate is for.
BASE_BATCH = 16


def parse_option(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a flag not given is None and overrides nothing."""
    return run_parser(
        'Train, evaluate or time a detector. Every setting is a key of the config tree (docs/configuration.md): flags '
        'override --opts, --opts override the file, the file overrides the defaults.',
        TREE,
        example='detection/configs/cascade_mask_rcnn_msg_tiny_3x.yaml',
    ).parse_args(argv)


def main(config: CfgNode) -> None:
    """Train, evaluate or time as the config says."""
    is_training_run = not (config.EVAL_MODE or config.BENCHMARK_MODE)
    config = with_classes_of_data(config)
    with start_run(config, is_training_run) as run:
        start = find_start(run, TREE)
        model = build_detector(config).to(run.process.device)
        run.logger.info(f'{config.MODEL.NAME}: {sum(p.numel() for p in model.parameters()):,} parameters')
        if is_training_run:
            train(run, model, start)
            return
        if start is not None:
            load_initial_weights(run, model, start)
        model, _ = run.precision.prepare(model)
        if config.EVAL_MODE:
            evaluate(run, model, start)
        else:
            benchmark(run, model)


def load_initial_weights(run: Run, model: Detector, start: Start, classes: Sequence[str] | None = None) -> None:
    """Load a detector's weights, or those of a classifier into the backbone of a new run; see `Start.load_weights`."""
    if start.is_new_run and not any(name.startswith('backbone.') for name in start.checkpoint['model']):
        notes = load_classifier(model, start.checkpoint, start.path)
        for note in ('it is a classifier: its weights start the backbone', *notes):
            run.logger.info(f'{start.path}: {note}')
    else:
        start.load_weights(run, model, Detector.HEAD, classes)


def load_classifier(model: Detector, checkpoint: dict[str, Any], path: str) -> list[str]:
    """Load a classifier's weights, except its head; norms of feature maps before the last stage stay new.

    Weights of other windows are fitted.

    Args:
        model: the detector.
        checkpoint: from `load_checkpoint`.
        path: the checkpoint's path, for messages.

    Returns:
        What was fitted; see `fit_weights`.

    Raises:
        CheckpointError: it holds a different network; the message names the weights.
    """
    body = model.backbone.body
    weights, notes = fit_weights(body, checkpoint['model'], path, body.fit_classifier)
    load_weights(body, {'model': weights}, path)
    return notes


def train(run: Run, model: Detector, start: Start | None) -> None:
    """Train to the last epoch, evaluating after each."""
    config, process = run.config, run.process

    # Data
    train_loader, eval_loader = build_loaders(config, process.rank, process.world_size)
    classes = eval_loader.dataset.classes
    datasets = {'train': train_loader.dataset.dataset, 'val': eval_loader.dataset}
    record = describe_run(run, classes, datasets)

    # Weights
    if start is not None:
        load_initial_weights(run, model, start, classes)
    freeze(run, model.backbone.body, start)

    # Optimizer, schedule
    model = synchronize_norms(model, process.device, process.world_size)
    lr = config.TRAIN.BASE_LR * run.images_per_update / BASE_BATCH
    optimizer = build_optimizer(config, model, lr, decay_biases=True)  # as published
    network, state = build_state(run, model, optimizer, train_loader, partial(build_scheduler, config))
    record = begin_training(run, state, start, record, TREE)

    # Losses, metrics
    to_device = DeviceCopies(process.device)

    def loss_fn(batch: tuple[list[Tensor], list[dict[str, Any]]]) -> dict[str, Tensor]:
        return network(*to_device(batch))

    def evaluate_fn(model: nn.Module, poll: Poll) -> dict[str, float]:
        return validate(run, model, eval_loader, poll).metrics

    Trainer(run, state, network, train_loader, loss_fn, evaluate_fn, 'box_AP', record, 'box AP').fit()


def evaluate(run: Run, model: Detector, start: Start) -> None:
    """Evaluate a checkpoint's weights, already loaded, and its EMA weights if it has any.

    Written to the run's folder: detections as `results.json`, AP per class as `classes.csv`, the confusion matrix as
    `confusion.csv` and `confusion.png`; for the EMA weights the same with `_ema`.
    """
    loader = build_eval_loader(run.config, run.process.rank, run.process.world_size)
    warn_of_other_classes(run, start.checkpoint, loader.dataset.classes)
    log_notes(run, {'val': loader.dataset})
    evaluation, ema_evaluation = evaluate_with_ema(
        run,
        lambda network: validate(run, network, loader, show=run.config.SHOW if network is model else 0),
        model,
        load_ema(model, start.checkpoint),
    )
    for suffix, result in (('', evaluation), ('_ema', ema_evaluation)):
        if result is not None:
            result.write(run.output_dir / f'results{suffix}.json')
            if loader.dataset.is_labelled and run.process.rank == 0:
                run.logger.info(f'AP of each class, results{suffix}.json:\n{result.class_table()}')
                write_class_report(result, run.output_dir, suffix, run.config.SHOW_SCORE)


def write_class_report(evaluation: CocoEvaluation, folder: Path, suffix: str, min_score: float) -> None:
    """Write `classes<suffix>.csv`, and `confusion<suffix>.csv` and `.png` of detections above a score."""
    names = [*evaluation.class_names, BACKGROUND]
    counts = confusion_matrix(evaluation.ground_truth, evaluation.results(), min_score)
    rows = [['', *names], *([name, *row] for name, row in zip(names, counts.tolist(), strict=True))]
    with report_write_errors(folder):
        for name, table in (('classes', evaluation.class_rows()), ('confusion', rows)):
            with (folder / f'{name}{suffix}.csv').open('w', newline='') as file:
                csv.writer(file).writerows(table)
        draw_confusion(counts, evaluation.class_names).savefig(folder / f'confusion{suffix}.png', dpi=100)


def freeze(run: Run, backbone: Backbone, start: Start | None) -> None:
    """Freeze stages and batch norms as the config says, where they are trained ones.

    Raises:
        ConfigError: stages are to be frozen, but have no weights.
    """
    train = run.config.TRAIN
    if train.FROZEN_STAGES >= 0:
        if start is None:
            raise ConfigError('TRAIN.FROZEN_STAGES freezes trained weights: give them with --pretrained')
        backbone.freeze_stages(train.FROZEN_STAGES)
    if train.FROZEN_BATCH_NORM and start is not None and start.pretrained is not None:
        count = freeze_batch_norms(backbone)
        if count:
            run.logger.info(f'{count} batch norms of the backbone stay as they were loaded')


@torch.inference_mode()
def validate(run: Run, model: nn.Module, loader: DataLoader, poll: Poll = no_poll, show: int = 0) -> CocoEvaluation:
    """Evaluate a detector, not wrapped, on every image once.

    Args:
        run: the run.
        model: the detector.
        loader: this process's shard; rank 0 has the largest.
        poll: called after each batch, equally often in every process.
        show: how many images to draw, ground truth on the left, into the run's folder.

    Returns:
        The finished evaluation.
    """
    device, process = run.process.device, run.process
    model.eval()
    evaluation, class_names = CocoEvaluation(loader.dataset), loader.dataset.classes
    loop, detect = EvaluationLoop(run, loader, poll), build_detect_fn(run.config, model)
    to_device = DeviceCopies(device)
    for images, targets in loop:
        with run.precision.autocast():
            detections = detect(to_device(images))
        evaluation.update(targets, detections)
        counts = [len(x['boxes']) for x in detections]
        loop.log(lambda counts=counts: f'detections {sum(counts) / len(counts):.1f}')
        if process.rank + loop.step * process.world_size < show:  # one image per batch: its index in the dataset
            picture = draw_detections(images[0], detections[0], class_names, run.config.SHOW_SCORE)
            if loader.dataset.is_labelled:
                picture = beside(draw_ground_truth(images[0], targets[0], class_names), picture)
            save_picture(picture, run.output_dir / 'show', targets[0]['image_id'])
    evaluation.finish()
    run.logger.info(f'{len(loader.dataset)} images, by {evaluation.evaluator.name}:\n{evaluation.table()}')
    return evaluation


def save_picture(picture: Image.Image, folder: Path, image_id: Any) -> None:
    """Save a picture under its image's id."""
    with report_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f'{image_id}.png')


@torch.inference_mode()
def benchmark(run: Run, model: Detector) -> float:
    """Log images/s of the whole detector with all its detections, one image at a time: the median of several rounds.

    The image is random, as high as in evaluation and 1.6 times as wide (1280 x 800). What is found in it depends on the
    weights, so the minimum score is lowered until there are MODEL.BOX.DETECTIONS, each with its mask.
    """
    model.eval()
    height = run.config.INPUT.TEST_SHORT
    image = torch.rand(3, height, round(1.6 * height), device=run.process.device)

    def forward() -> list[dict[str, Tensor]]:
        with run.precision.autocast():
            return model([image])

    model.roi_heads.min_score = 0.0
    scores = forward()[0]['scores']
    if len(scores):  # as low as needed: NMS of every candidate would take time of its own
        model.roi_heads.min_score = scores.min().item() * (1 - 1e-6)
    images_per_s = 1 / time_callable(forward, run.process.device).median
    run.logger.info(
        f'image {image.shape[2]} x {height} throughput {images_per_s:.2f} images/s, '
        f'{len(scores)} detections, mem {peak_memory_mb(run.process.device):.0f}MB'
    )
    return images_per_s


if __name__ == '__main__':
    with exit_on_user_error():
        main(get_config(parse_option()))
