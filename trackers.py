"""Experiment trackers, which get the records of `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow, your own."""

import importlib.util
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from extensions import ExtensionError, Registry
from utils import UserError, atomic_write, leaves


class Tracker:
    """Base class of experiment trackers. They run on rank 0, and only during training.

    Args:
        config: the config tree.
        folder: the run's folder.
    """

    # Package that the tracker needs, if it is optional
    package = ''

    def __init__(self, config: CfgNode, folder: Path):
        self.config, self.folder = config, folder

    def begin(self, updates: int) -> None:
        """Prepare to get records, before the first one.

        A run that resumes makes a new tracker, and writes the records of the updates after its checkpoint again.

        Args:
            updates: updates of the run before the next record; 0 for a new run.
        """

    def write(self, record: dict[str, Any]) -> None:
        """Log one record of `metrics.jsonl`.

        Args:
            record: `kind` ('train' or 'epoch'; records of the kind 'hash' are not given), `updates` (of the run so
                far), `epoch` and the metrics by name; one that is not finite is None.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Called when training ends, also after an error."""


# Values of TRACKER
TRACKERS = Registry('tracker', none=Tracker)


def register_tracker(name: str) -> Callable[[Callable], Callable]:
    """Make a tracker available as `TRACKER name`.

    The decorated class or function is called with the config and the run's folder, and gives a `Tracker`.

    Raises:
        ValueError: the name belongs to another tracker.
    """
    return TRACKERS.register(name)


@register_tracker('tensorboard')
class TensorBoardTracker(Tracker):
    """Event files in the folder `tensorboard` of the run; records that are written again replace the earlier ones."""

    def begin(self, updates: int) -> None:
        """Open an event file."""
        from torch.utils.tensorboard import SummaryWriter  # a second to import

        self.writer = SummaryWriter(self.folder / 'tensorboard', purge_step=updates + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Write the metrics; one that is not finite is written as nan."""
        for name, value in metrics_of(record).items():
            self.writer.add_scalar(name, float('nan') if value is None else value, record['updates'])
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


@register_tracker('wandb')
class WandbTracker(Tracker):
    """A run of Weights & Biases, which a run that resumes continues.

    The environment variables of Weights & Biases take effect, such as WANDB_MODE and WANDB_PROJECT. Without WANDB_MODE,
    nothing is sent: the run is in the folder `wandb`, for `wandb sync`.
    """

    package = 'wandb'

    def begin(self, updates: int) -> None:
        """Start or continue the run."""
        import wandb

        self.run = wandb.init(
            project=os.environ.get('WANDB_PROJECT', 'msg_transformer'),
            name=run_name(self.config),
            id=stored_id(self.folder / 'wandb_id.txt', lambda: uuid.uuid4().hex[:8]),
            resume='allow',
            mode=os.environ.get('WANDB_MODE', 'offline'),
            dir=self.folder,
            config=dict(leaves(self.config)),
            settings=wandb.Settings(silent=True, console='off'),
        )
        self.run.define_metric('*', step_metric='updates')

    def write(self, record: dict[str, Any]) -> None:
        """Log the metrics over `updates`."""
        finite = {name: value for name, value in metrics_of(record).items() if value is not None}
        self.run.log({'updates': record['updates'], **finite})

    def close(self) -> None:
        """Finish the run, which a later process may continue."""
        self.run.finish()


@register_tracker('mlflow')
class MlflowTracker(Tracker):
    """A run of MLflow, which a run that resumes continues.

    The environment variables of MLflow take effect, such as MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME. Without
    MLFLOW_TRACKING_URI, runs are in the database `mlflow.db` of the output folder.
    """

    package = 'mlflow'

    def begin(self, updates: int) -> None:
        """Start or continue the run."""
        from mlflow import MlflowClient

        database = (Path(self.config.OUTPUT or 'output') / 'mlflow.db').absolute()
        self.client = MlflowClient(os.environ.get('MLFLOW_TRACKING_URI', f'sqlite:///{database}'))
        self.run_id = stored_id(self.folder / 'mlflow_id.txt', self.create_run)
        self.client.update_run(self.run_id, status='RUNNING')

    def create_run(self) -> str:
        """Create a run with the config as its parameters.

        Returns:
            The run's ID.
        """
        name = os.environ.get('MLFLOW_EXPERIMENT_NAME', 'msg_transformer')
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name)
        run = self.client.create_run(experiment_id, run_name=run_name(self.config))
        for key, value in leaves(self.config):
            self.client.log_param(run.info.run_id, key, value)
        return run.info.run_id

    def write(self, record: dict[str, Any]) -> None:
        """Log the metrics over the updates; one that is not finite is left out."""
        for name, value in metrics_of(record).items():
            if value is not None:
                self.client.log_metric(self.run_id, name, value, step=record['updates'])

    def close(self) -> None:
        """Finish the run, which a later process may continue."""
        self.client.set_terminated(self.run_id)


def metrics_of(record: dict[str, Any]) -> dict[str, float | None]:
    """A record's metrics by the names that trackers show, such as `train/loss`."""
    return {f'{record["kind"]}/{key}': value for key, value in record.items() if key not in ('kind', 'updates')}


def run_name(config: CfgNode) -> str:
    """Display name of a run in trackers."""
    return f'{config.MODEL.NAME}/{config.TAG}'


def stored_id(path: Path, create: Callable[[], str]) -> str:
    """Get a run's ID in a tracker from a file in the run's folder; create both for a new run.

    Args:
        path: file with the ID.
        create: returns the ID for a new run.
    """
    if not path.exists():
        text = create()
        atomic_write(path, lambda file: file.write(text.encode()))
    return path.read_text(encoding='utf-8')


def check_trackers(config: CfgNode) -> None:
    """Check that the packages of the run's trackers are installed.

    Raises:
        UserError: a package is missing.
    """
    for name in tracker_names(config):
        package = getattr(TRACKERS[name], 'package', '')
        if package and importlib.util.find_spec(package) is None:
            raise UserError(f'TRACKER {name} needs the package {package}: pip install -r requirements-trackers.txt')


def tracker_names(config: CfgNode) -> list[str]:
    """The names in the key TRACKER, each once; empty for none."""
    names = config.TRACKER if isinstance(config.TRACKER, list) else [config.TRACKER]
    return [name for name in dict.fromkeys(names) if name != 'none']


def build_trackers(config: CfgNode, folder: Path) -> list[Tracker]:
    """Build the trackers of the key TRACKER.

    Raises:
        ExtensionError: a registered function does not return a `Tracker`.
    """
    trackers = [TRACKERS[name](config, folder) for name in tracker_names(config)]
    for tracker in trackers:
        if not isinstance(tracker, Tracker):
            raise ExtensionError(f'TRACKER {config.TRACKER} gives {type(tracker).__name__}: return a trackers.Tracker')
    return trackers
