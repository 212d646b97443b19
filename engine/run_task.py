"""The steps of a run of any task: training with evaluation, or evaluation of a checkpoint."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from data.samplers import VirtualRankSampler
from engine.config_tree import ConfigError
from engine.distributed import distribute, on_main_process
from engine.evaluation import evaluate_with_ema, load_ema
from engine.experiment import describe_run, log_notes, warn_of_other_classes
from engine.memory import reset_peak_memory
from engine.run import Run, start_run
from engine.start import SCRATCH, Start, find_start, record_teacher, resume_training
from engine.state import Phase, TrainingState, updates_before
from engine.task import Task
from engine.trainer import Trainer
from engine.virtual_ranks import VirtualRanks, broadcast_weights, check_network, check_processes
from trackers import check_trackers

# Options of an optimizer that are not logged: they differ between parameter groups
_GROUP_OPTIONS = ('lr', 'weight_decay')


def run_task(task: Task, config: CfgNode, until: tuple[int, int] | None = None) -> None:
    """Train a task's network, or evaluate a checkpoint with `EVAL_MODE`, as the config says.

    Args:
        task: the task.
        config: the config tree.
        until: epoch and update at which training ends early; see `Trainer`.
    """
    is_training_run = not config.EVAL_MODE
    with start_run(config, is_training_run, task.compiles(config)) as run:
        if is_training_run and config.TRAIN.VIRTUAL_RANKS:
            check_processes(config.TRAIN.VIRTUAL_RANKS, run.process)
        start = find_start(run, task.tree)
        network = build_network(run, task)
        if is_training_run:
            train(run, task, network, start, until)
        else:
            evaluate(run, task, network, start)


def build_network(run: Run, task: Task) -> nn.Module:
    """Build the run's network on its device, and log its size."""
    network = task.build_network(run.config).to(run.process.device)
    if run.config.MODEL.CHANNELS_LAST:
        use_channels_last(network)
    multiply_adds = f', {network.flops():,} multiply-adds' if hasattr(network, 'flops') else ''
    parameters = sum(parameter.numel() for parameter in network.parameters())
    run.logger.info(f'{run.config.MODEL.NAME}: {parameters:,} parameters{multiply_adds}')
    return network


def use_channels_last(network: nn.Module) -> None:
    """Store the weights of 2-D convolutions with channels last in memory; their outputs follow."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)


def train(run: Run, task: Task, network: nn.Module, start: Start, until: tuple[int, int] | None = None) -> None:
    """Train until the last epoch or until `until`, with evaluations every `EVAL_FREQ` epochs."""
    if start.kind == SCRATCH and run.config.TRAIN.FROZEN_STAGES >= 0:
        raise ConfigError('TRAIN.FROZEN_STAGES freezes trained weights: give them with --pretrained')
    check_run_length(run, task, start)
    on_main_process(lambda: check_trackers(run.config))
    log_config(run, task)
    run = run._replace(teacher=task.build_teacher(run))
    start = record_teacher(run, start)
    train_loader, eval_loader = task.build_loaders(run.config, run.process.rank, run.process.world_size)
    phases = task.phases(run.config, train_loader)
    for first_epoch, config, loader in phases:
        check_run_length(run._replace(config=config), task, start, run.batches_per_rank(loader))
        if len(phases) > 1:
            run.logger.info(
                f'from epoch {first_epoch} on: images of {config.DATA.IMG_SIZE} px, {config.DATA.BATCH_SIZE} per '
                f'{"virtual rank" if config.TRAIN.VIRTUAL_RANKS else "process"} and batch'
            )
    provenance = describe_run(run, {'train': train_loader.dataset.dataset, 'val': eval_loader.dataset}, start.origin)
    start.load_weights(run, task, network, provenance['classes'])
    trainer = build_trainer(run, task, network, start, phases, eval_loader, provenance, until)
    del train_loader, phases, loader  # so that worker processes end when the trainer leaves a phase
    if start.resumes:
        resume_training(run, task, trainer.state, start, provenance)
    reset_peak_memory()
    trainer.fit()


def check_run_length(run: Run, task: Task, start: Start, batches: int | None = None) -> None:
    """Refuse settings that would not take effect before the run ends; a run that resumes only gets a warning.

    Args:
        run: the run.
        task: its task.
        start: where the run starts.
        batches: training batches per epoch of each rank; None before the data are open.

    Raises:
        ConfigError: a setting would not take effect.
    """
    train = run.config.TRAIN
    steps_per_epoch = None if batches is None else run.steps_per_epoch(batches)
    evaluations = math.ceil(train.EPOCHS / run.config.EVAL_FREQ)
    try:
        if 0 < train.PATIENCE >= evaluations - 1:
            raise ConfigError(
                f'TRAIN.PATIENCE is {train.PATIENCE}, and the run has {evaluations} evaluations, so that it never '
                f'stops early: write {f"at most {evaluations - 2}" if evaluations > 2 else 0}, or more TRAIN.EPOCHS'
            )
        if not start.resumes and train.START_EPOCH >= train.EPOCHS:
            raise ConfigError(f'TRAIN.START_EPOCH is {train.START_EPOCH}: write less than TRAIN.EPOCHS, {train.EPOCHS}')
        if batches is not None and run.accumulation_steps > batches:
            raise ConfigError(
                f'TRAIN.ACCUMULATION_STEPS is {run.accumulation_steps}, and an epoch has {batches} batches, while the '
                f'learning rate is scaled for {run.images_per_update:,} images per update: write at most {batches}'
            )
        task.check_schedule(run.config, steps_per_epoch)
    except ConfigError as error:
        if not start.resumes:
            raise
        run.logger.warning(str(error))
    if steps_per_epoch and steps_per_epoch <= run.config.SAVE_STEPS:
        run.logger.warning(f'SAVE_STEPS has no effect: an epoch has {steps_per_epoch} updates')


def log_config(run: Run, task: Task) -> None:
    """Log which keys differ from their defaults, and which of them have no effect; config.yaml has all keys."""
    differences = ', '.join(task.tree.differences(run.config))
    run.logger.info(
        f'config: {run.output_dir / "config.yaml"}; differs from the defaults in: {differences or "nothing"}'
    )
    for unused in task.tree.unused(run.config):
        run.logger.warning(unused)


def build_trainer(
    run: Run,
    task: Task,
    network: nn.Module,
    start: Start,
    phases: Sequence[tuple[int, CfgNode, DataLoader]],
    eval_loader: DataLoader,
    provenance: Mapping[str, Any],
    until: tuple[int, int] | None = None,
) -> Trainer:
    """Build a trainer in the state of a new run.

    Args:
        run: the run.
        task: its task.
        network: the network, with its starting weights.
        start: where the run starts.
        phases: training batches of this rank, from `Task.phases`.
        eval_loader: evaluation shard of this rank.
        provenance: further entries of every checkpoint, from `describe_run`.
        until: epoch and update at which training ends early; see `Trainer`.
    """
    config = run.config
    if config.TRAIN.FROZEN_STAGES >= 0:
        task.backbone(network).freeze_stages(config.TRAIN.FROZEN_STAGES)
    network = task.prepare_training(run, network, start.is_pretrained)
    distributed, state = build_state(run, task, network, phases)
    loss_fn = task.build_loss(run, distributed, phases[0][2].dataset.dataset)
    evaluate = task.build_evaluation(run, eval_loader)
    return Trainer(
        run,
        state,
        distributed,
        [loader for _, _, loader in phases],
        loss_fn,
        evaluate,
        metric=task.metric,
        provenance=provenance,
        metric_name=task.metric_name,
        compiles=task.compiles(config),
        until=until,
    )


def build_state(
    run: Run, task: Task, network: nn.Module, phases: Sequence[tuple[int, CfgNode, DataLoader]]
) -> tuple[nn.Module, TrainingState]:
    """Build the training state, as a new run starts with it.

    Args:
        run: the run.
        task: its task.
        network: the network, on the device.
        phases: from `Task.phases`; each has the learning rate of its own images per update.

    Returns:
        The network, wrapped in DDP where there are several processes and no virtual ranks, with rank 0's weights; and
        the training state.

    Raises:
        ConfigError: virtual ranks do not work with the network.
    """
    config, process, virtual_ranks = run.config, run.process, None
    batches = [
        (first, config.DATA.BATCH_SIZE * run.rank_count, run.batches_per_rank(loader))
        for first, config, loader in phases
    ]
    lengths = [
        Phase(first, run.steps_per_epoch(count), images * count, images * run.accumulation_steps)
        for first, images, count in batches
    ]
    lr_scale = lengths[0].images_per_update / config.TRAIN.BASE_BATCH
    optimizer = task.build_optimizer(config, network, config.TRAIN.BASE_LR * lr_scale)
    options = ', '.join(f'{name} {value}' for name, value in optimizer.defaults.items() if name not in _GROUP_OPTIONS)
    run.logger.info(f'optimizer: {type(optimizer).__name__}, {len(optimizer.param_groups)} parameter groups, {options}')
    network, optimizer = run.precision.prepare(network, optimizer)
    if config.TRAIN.VIRTUAL_RANKS:
        samplers = [loader.batch_sampler for _, _, loader in phases]
        if not all(isinstance(x, VirtualRankSampler) and x.sampler.ranks == run.own_ranks for x in samplers):
            raise ConfigError(
                "TRAIN.VIRTUAL_RANKS needs batches by virtual rank, and this task's loader has none: give its "
                'TrainSampler virtual_ranks=config.TRAIN.VIRTUAL_RANKS, and build it with '
                'data.build.build_train_loader, or write TRAIN.VIRTUAL_RANKS 0'
            )
        check_network(network.train())
        broadcast_weights(network)
        distributed, virtual_ranks = network, VirtualRanks(config.TRAIN.VIRTUAL_RANKS, process, config.SEED)
        run.logger.info(
            f'{virtual_ranks.count} virtual ranks, of which this process computes {", ".join(map(str, run.own_ranks))}'
        )
    else:
        distributed = distribute(network, process.device, config.DETERMINISTIC)
    state = TrainingState(
        model=network,
        optimizer=optimizer,
        scheduler=task.build_scheduler(config, optimizer, partial(updates_before, lengths), lr_scale),
        precision=run.precision,
        sampler=phases[0][2].batch_sampler.sampler,
        device=process.device,
        phases=lengths,
        ema=ModelEmaV3(network, config.TRAIN.EMA_DECAY) if config.TRAIN.EMA_DECAY else None,
        virtual_ranks=virtual_ranks,
        epoch=config.TRAIN.START_EPOCH,
    )
    return distributed, state


def evaluate(run: Run, task: Task, network: nn.Module, start: Start) -> None:
    """Evaluate a checkpoint's weights, and its EMA weights if it has any; reports are written to the run's folder."""
    start.load_weights(run, task, network)
    network, _ = run.precision.prepare(network)
    loader = task.build_eval_loader(run.config, run.process.rank, run.process.world_size)
    log_notes(run, {'val': loader.dataset})
    networks = [x for x in (network, load_ema(network, start.checkpoint)) if x is not None]
    selected = [task.select_classes(run, x, loader.dataset, start.checkpoint) for x in networks]
    if selected == networks:  # no classes were found by name
        warn_of_other_classes(run, start.checkpoint, loader.dataset.classes)
    evaluations = evaluate_with_ema(run, task.build_evaluation(run, loader), *selected)
    for name, evaluation in evaluations.items():
        evaluation.write_report(run, '_ema' if name == 'ema' else '')
