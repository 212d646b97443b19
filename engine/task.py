"""The interface that classification and detection implement for the engine and the tools."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from engine.checkpoint import other_task
from engine.config_tree import ConfigTree
from engine.evaluation import EvaluateFn
from engine.run import Run

LossFn = Callable[[Any], dict[str, Tensor]]


class SampleList(Protocol):
    """What the engine needs of a dataset in addition to its samples.

    Attributes:
        classes: names of the classes.
        notes: lines for the log, such as the number of samples that are left out.
    """

    classes: list[str]
    notes: list[str]

    def __len__(self) -> int:
        """Number of samples."""

    def sample_names(self) -> Iterable[str]:
        """Names of the samples in the dataset's order, independent of its location and storage format."""


class Task(ABC):
    """A task: its config keys, network, data, loss and metrics.

    main.py and detection/main.py each define a subclass and an instance named `TASK`.

    Attributes:
        name: the value of `TASK` in configs and checkpoints.
        program: the module that trains it, for `python -m`.
        tree: the config keys.
        metric: key of the metric, in percent, that selects the best checkpoint: higher is better.
        metric_name: what log lines and tables call the metric.
        first_label: label of the first class: 0, or 1 where 0 is the background.
    """

    name: str
    program: str
    tree: ConfigTree
    metric: str
    metric_name: str
    first_label: int = 0

    @abstractmethod
    def build_network(self, config: CfgNode) -> nn.Module:
        """Build the network, with random weights."""

    @abstractmethod
    def build_loaders(self, config: CfgNode, rank: int = 0, world_size: int = 1) -> tuple[DataLoader, DataLoader]:
        """Build the training and the evaluation loader of this rank.

        The `batch_sampler.sampler` of the training loader is a `TrainSampler`. With `TRAIN.VIRTUAL_RANKS`, the batches
        are in the order of a `VirtualRankSampler`. `train_loader.dataset.dataset` and `eval_loader.dataset` are
        `SampleList`s. No rank's evaluation shard is larger than that of rank 0.

        Raises:
            DataError: the data cannot be used.
        """

    @abstractmethod
    def build_eval_loader(self, config: CfgNode, rank: int = 0, world_size: int = 1) -> DataLoader:
        """Build only the evaluation loader of this rank.

        Raises:
            DataError: the data cannot be used.
        """

    def phases(self, config: CfgNode, loader: DataLoader) -> list[tuple[int, CfgNode, DataLoader]]:
        """First epoch, config and training loader of each phase of a run; all loaders have the same sampler.

        Args:
            config: the config tree.
            loader: this rank's training loader, from `build_loaders`.

        Raises:
            DataError: a phase's batches cannot be made of the data.
        """
        return [(0, config, loader)]

    @abstractmethod
    def head_pattern(self, network: nn.Module) -> str:
        """A regular expression that matches the start of the names of class-dependent weights."""

    @abstractmethod
    def backbone(self, network: nn.Module) -> nn.Module:
        """The part of the network that has stages, with a method `freeze_stages(count)`."""

    @abstractmethod
    def build_optimizer(self, config: CfgNode, network: nn.Module, lr: float) -> Optimizer:
        """Build the optimizer and its parameter groups; `lr` is the peak learning rate, already scaled."""

    @abstractmethod
    def build_scheduler(
        self, config: CfgNode, optimizer: Optimizer, updates_before: Callable[[int], int], lr_scale: float
    ) -> Scheduler:
        """Build the schedule, which is stepped per update and per epoch.

        Args:
            config: the config tree.
            optimizer: its groups hold the peak learning rate, already scaled.
            updates_before: number of updates before an epoch.
            lr_scale: multiplies the config's other learning rates.
        """

    @abstractmethod
    def check_schedule(self, config: CfgNode, steps_per_epoch: int | None = None) -> None:
        """Refuse a schedule that would not take full effect within the run.

        Args:
            config: the config tree.
            steps_per_epoch: updates per epoch; None before the data are open.

        Raises:
            ConfigError: a setting of the schedule would not take effect.
        """

    def build_teacher(self, run: Run) -> Any:
        """Build the network that training distils from, as `Run.teacher`; None if there is none.

        It has an attribute `identity`, a mapping with `name` and `sha256`, which the run's origin records.

        Raises:
            UserError: it cannot be built.
        """
        return None

    @abstractmethod
    def build_loss(self, run: Run, network: nn.Module, dataset: SampleList) -> LossFn:
        """Build a function that maps a training batch to its mean losses by name; their sum is minimized.

        Args:
            run: the run.
            network: the network as this process trains it, perhaps wrapped in DDP.
            dataset: the training images.
        """

    @abstractmethod
    def build_evaluation(self, run: Run, loader: DataLoader) -> EvaluateFn:
        """Build a function that evaluates a network, not wrapped in DDP, on the shards of all ranks."""

    def prepare_training(self, run: Run, network: nn.Module, is_pretrained: bool) -> nn.Module:
        """Prepare a network for training once its weights are loaded, such as by freezing or synchronizing norms.

        Args:
            run: the run.
            network: the network.
            is_pretrained: whether its weights once came from `--pretrained`; see `engine.experiment.is_pretrained`.
        """
        return network

    def select_classes(
        self, run: Run, network: nn.Module, dataset: SampleList, checkpoint: Mapping[str, Any]
    ) -> nn.Module:
        """Restrict a network to the classes of a dataset that is to be evaluated, by name.

        Args:
            run: the run.
            network: the network, with its weights.
            dataset: the images.
            checkpoint: the checkpoint of the network.

        Returns:
            The network itself where its classes are those of the dataset, in the same order.

        Raises:
            UserError: the dataset has classes that the network does not know.
        """
        return network

    def compiles(self, config: CfgNode) -> bool:
        """Whether training or evaluation compiles the network."""
        return False

    def load_other_task(
        self, network: nn.Module, checkpoint: Mapping[str, Any], path: str | Path, missing: str = 'error'
    ) -> list[str]:
        """Start a network from the weights of another task's network.

        Args:
            network: the network.
            checkpoint: from `load_checkpoint`.
            path: the checkpoint's path, for messages.
            missing: see `load_weights`.

        Returns:
            What was done, for the log.

        Raises:
            CheckpointError: this task cannot use weights of the other one, or their names or shapes do not match.
        """
        raise other_task(checkpoint, path, self.name)
