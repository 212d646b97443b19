"""Knowledge distillation: frozen teacher networks, and soft and hard distillation losses."""

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from data.images import kind_of_value
from data.samples import same_letters
from data.transforms import mean_and_std
from engine.checkpoint import CheckpointError, load_checkpoint
from engine.distributed import once_per_node
from engine.predictor import load_predictor, network_args
from engine.run import Run
from engine.run_task import use_channels_last
from engine.task import Task
from engine.weights import choose_weights, fit_weights, hash_weights, load_weights
from extensions import Registry
from models.timm_networks import PREFIX as TIMM
from utils import UserError, first_few, first_line, random_states, set_random_states, set_seed, shortened

DistilFn = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]

# Values of DISTILL.TEACHER, in addition to timm:<name> and paths of checkpoints
TEACHERS = Registry('teacher')


class TeacherError(UserError):
    """A teacher that cannot be built, or that cannot teach this student."""


def register_teacher(name: str) -> Callable[[Callable], Callable]:
    """Make a teacher available as `DISTILL.TEACHER name`.

    The decorated class or function is called with the config and gives a module, which maps normalised images
    (B, C, H, W) to logits (B, classes). Its attributes `input_size`, `mean`, `std` and `classes` say which images it
    takes and what its logits stand for; see `describe`.

    Raises:
        ValueError: the name belongs to another teacher.
    """
    return TEACHERS.register(name)


class Teacher:
    """A frozen network that gives logits for the images that the student sees.

    The teacher is separate from the student: it is not saved in checkpoints and not wrapped in DDP. Each process has a
    copy.

    Args:
        name: for messages.
        network: maps normalised images (B, C, H, W) to logits (B, classes).
        run: the student's run.
        input_size: channels, height and width of its images.
        mean: per channel, of pixels in [0, 1].
        std: standard deviation, likewise.
        classes: names of its classes in the order of its logits; None if they are unknown.

    Attributes:
        identity: `name`, and a hash of the weights as `sha256`.
        count: number of its classes.

    Raises:
        TeacherError: the network does not take the student's images, or does not return logits.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        run: Run,
        input_size: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        classes: Sequence[str] | None,
    ):
        if not isinstance(input_size, Sequence) or len(input_size) != 3:
            raise TeacherError(f'the teacher {name} has the input_size {input_size}: write (channels, height, width)')
        channels, *size = input_size
        if channels != run.config.MODEL.MSG.IN_CHANS:
            raise TeacherError(
                f'the teacher {name} takes images of {channels} channel(s), and MODEL.MSG.IN_CHANS is '
                f'{run.config.MODEL.MSG.IN_CHANS}: give another DISTILL.TEACHER'
            )
        if classes is not None and (isinstance(classes, str) or not isinstance(classes, Sequence)):
            raise TeacherError(f'the teacher {name} has the classes {shortened(classes)}: write a list of names')
        device = run.process.device
        self.name, self.size, self.classes = name, tuple(size), classes
        self.identity = {'name': name, 'sha256': hash_weights(network.state_dict(), hashlib.sha256())}
        self.network = network.to(device).eval().requires_grad_(False)
        use_channels_last(network)  # EfficientNet-Lite2 at 260 px on a CPU is 1.5 to 1.7 times as fast so
        mean, std, own_mean, own_std = (
            torch.as_tensor(x, dtype=torch.float32, device=device).view(-1, 1, 1)
            for x in (mean, std, *mean_and_std(run.config))
        )
        self.scale, self.shift = own_std / std, (own_mean - mean) / std
        self.keeps_values = bool((self.scale == 1).all() and (self.shift == 0).all())
        self.count = self._count_classes(torch.zeros(1, *input_size, device=device))
        parameters = sum(parameter.numel() for parameter in network.parameters())
        run.logger.info(
            f'teacher {name}: {parameters:,} parameters, images of {size[0]} x {size[1]}, {self.count} classes'
        )

    def _count_classes(self, images: Tensor) -> int:
        """Number of classes, found by a forward pass."""
        try:
            with torch.inference_mode():
                logits = self.network(images)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise TeacherError(
                f'the teacher {self.name} does not take images of {tuple(images.shape)}: {first_line(error)}'
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise TeacherError(f'the teacher {self.name} gives {kind_of_value(logits)}: return logits (B, classes)')
        if self.classes is not None and len(self.classes) != logits.shape[1]:
            raise TeacherError(
                f'the teacher {self.name} has names of {len(self.classes)} classes, and {logits.shape[1]} logits: '
                f'give as many names'
            )
        return logits.shape[1]

    def prepare(self, images: Tensor) -> Tensor:
        """Resize and normalise the student's images for the teacher.

        Resizing is linear and preserves constants, so that it can come before the normalisation.

        Args:
            images: (B, C, H, W), normalised for the student.
        """
        if tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode='bicubic', antialias=True)
        return images if self.keeps_values else images * self.scale + self.shift

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, classes) in float32, without gradients, for images (B, C, H, W) normalised for the student."""
        with torch.inference_mode():
            return self.network(self.prepare(images)).float()

    def find_classes(self, classes: Sequence[str], named: str | Sequence[str] = '') -> list[int]:
        """Find the teacher's index of each of the student's classes.

        Args:
            classes: names of the student's classes.
            named: names or indices of the teacher's classes that stand for them, as in `DISTILL.CLASSES`; '' to find
                them by name.

        Raises:
            TeacherError: the teacher lacks one of the classes.
        """
        if not named and self.classes is None:
            if len(classes) == self.count:
                return list(range(self.count))
            raise TeacherError(
                f'the teacher {self.name} has {self.count} classes without names, and the data have {len(classes)}: '
                f'name the indices of the teacher with DISTILL.CLASSES'
            )
        known = self.classes if self.classes is not None else ()
        indices = {same_letters(str(name)): index for index, name in enumerate(known)}
        if named:
            indices = {str(index): index for index in range(self.count)} | indices
        wanted = [same_letters(name) for name in named or classes]
        unknown = [name for name in wanted if name not in indices]
        if unknown:
            theirs = f'{self.count} classes' + (f' ({shortened(first_few(known), 100)})' if known else '')
            remedy = 'correct' if named else "name the teacher's class of each student class with"
            raise TeacherError(
                f'{shortened(unknown[0], 100)} is not among the {theirs} of the teacher {self.name}: {remedy} '
                f'DISTILL.CLASSES'
            )
        return [indices[name] for name in wanted]


def build_teacher(run: Run, task: Task) -> Teacher | None:
    """Build the teacher of `DISTILL.TEACHER`; every rank calls it at the same point.

    The run's random numbers are the same with and without a teacher.

    Args:
        run: the student's run.
        task: classification, whose checkpoints may teach.

    Returns:
        The teacher, or None without `DISTILL.TEACHER`.

    Raises:
        UserError: there is no such teacher, or it cannot be built.
    """
    name = run.config.DISTILL.TEACHER
    if not name:
        return None
    states = random_states(run.process.device)
    set_seed(run.config.SEED)  # the same on all ranks, for a teacher with random weights
    try:
        if name in TEACHERS:
            network, known = TEACHERS[name](run.config), {}
        elif name.startswith(TIMM):
            network, known = load_timm_teacher(name.removeprefix(TIMM), run)
        elif os.path.isfile(name):
            name = os.path.realpath(name)
            network, known = load_checkpoint_teacher(name, run, task)
        else:
            hint = f'timm:{name}' if timm.is_model(name) else 'timm:<name>, an existing file, or add --import'
            raise TeacherError(
                f'DISTILL.TEACHER is {name}: there is no such file, and no module of --import registers such a '
                f'teacher: write {hint}'
            )
    finally:
        set_random_states(states, run.process.device)
    if not isinstance(network, nn.Module):
        raise TeacherError(f'the teacher {name} is {kind_of_value(network)}: return a torch.nn.Module')
    return Teacher(name, network, run, **describe(network, run) | known)


def describe(network: nn.Module, run: Run) -> dict[str, Any]:
    """Find out which images a network takes, and the names of its classes.

    They are attributes of the network, or entries of timm's `pretrained_cfg`:

    - `input_size`: (C, H, W); the student's where the network does not say;
    - `mean` and `std`, of pixels in [0, 1]: the student's where the network does not say;
    - `classes`, or timm's `label_names`: a network of timm has the WordNet ids of ImageNet-1k, or one of its supersets,
      where it has as many classes.
    """
    cfg, side = dict(getattr(network, 'pretrained_cfg', None) or {}), run.config.DATA.IMG_SIZE
    classes, count = cfg.get('label_names'), getattr(network, 'num_classes', None)
    if cfg and (classes is None or len(classes) != count):
        subset = infer_imagenet_subset({'num_classes': count})
        classes = ImageNetInfo(subset).label_names() if subset else None
    mean, std = mean_and_std(run.config)
    known = {'input_size': (run.config.MODEL.MSG.IN_CHANS, side, side), 'mean': mean, 'std': std, 'classes': classes}
    return {name: getattr(network, name, cfg.get(name, value)) for name, value in known.items()}


def load_timm_teacher(model: str, run: Run) -> tuple[nn.Module, dict[str, Any]]:
    """Build a network of timm with the weights of `DISTILL.TEACHER_WEIGHTS`, or with timm's pretrained ones.

    Args:
        model: timm's name.
        run: the student's run.

    Returns:
        The network, with as many classes as the weights have, and entries of the file that override `describe`.

    Raises:
        TeacherError: timm has no pretrained weights for the network, or they cannot be downloaded.
        CheckpointError: the file cannot be read, or has the weights of a different network.
    """
    path = run.config.DISTILL.TEACHER_WEIGHTS
    if not path and timm.get_pretrained_cfg(model) is None:  # of a network that the user has registered
        raise TeacherError(
            f'{TIMM}{model}: timm knows no pretrained weights of it: give a file of them with DISTILL.TEACHER_WEIGHTS'
        )
    if not path:
        built = []  # filled only on the process that downloads for its node; the others then find the file in the cache
        once_per_node(lambda: built.append(_create_pretrained(model)))
        return built[0] if built else _create_pretrained(model), {}
    checkpoint = load_checkpoint(path)
    weights, note = choose_weights(checkpoint, path)
    run.logger.info(f'{path}: {note}')
    config = timm.get_pretrained_cfg(model)  # None for a network that the user has registered without it
    heads = (config and config.classifier) or ()
    heads = [f'{name}.weight' for name in ([heads] if isinstance(heads, str) else heads)]
    sizes = [len(weights[name]) for name in heads if name in weights]
    network = timm.create_model(model, **({'num_classes': sizes[0]} if sizes else {}))
    weights, _ = fit_weights(network, weights, path)
    load_weights(network, {'model': weights}, path)
    return network, {'classes': checkpoint['classes']} if checkpoint.get('classes') else {}


def _create_pretrained(model: str) -> nn.Module:
    """Create a network with timm's pretrained weights, from timm's cache or the Internet."""
    try:
        return timm.create_model(model, pretrained=True)
    except Exception as error:  # from timm, the Hugging Face Hub, the connection or the disk
        raise TeacherError(
            f'{TIMM}{model}: the pretrained weights cannot be fetched ({shortened(first_line(error))}): '
            f'give a file of them with DISTILL.TEACHER_WEIGHTS'
        ) from error


def load_checkpoint_teacher(path: str, run: Run, task: Task) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network of a checkpoint of this project: its EMA weights, unless the raw ones are better.

    Returns:
        The network, and its description.

    Raises:
        UserError: see `load_predictor`.
    """
    checkpoint = load_checkpoint(path)
    if not checkpoint.get('config'):
        raise CheckpointError(
            f'{path} has no config, so its network is unknown: for weights of timm, write DISTILL.TEACHER timm:<name> '
            f'DISTILL.TEACHER_WEIGHTS {path}'
        )
    args = network_args(path, ['DEVICE', 'cpu'])
    config, network, _, _ = load_predictor(args, task, checkpoint=checkpoint, log=run.logger.info)
    if config.DATA.MULTI_LABEL:
        raise TeacherError(
            f'the teacher {path} was trained on several classes per image: give one of DATA.MULTI_LABEL False'
        )
    (mean, std), side = mean_and_std(config), config.DATA.IMG_SIZE
    size = (config.MODEL.MSG.IN_CHANS, side, side)
    return network, {'input_size': size, 'mean': mean, 'std': std, 'classes': checkpoint.get('classes')}


def soft_distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Soft distillation of Hinton et al., arXiv:1503.02531.

    T^2 * KL(softmax(teacher / T) || softmax(logits / T)), averaged over the batch. The factor T^2 keeps the size of the
    gradients at any temperature T.

    Args:
        logits: the student's, (B, classes).
        teacher: the teacher's, (B, classes).
        temperature: T.
    """
    ours, theirs = ((x.float() / temperature).log_softmax(dim=1) for x in (logits, teacher))
    return F.kl_div(ours, theirs, reduction='batchmean', log_target=True) * temperature**2


def hard_distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Hard distillation of DeiT (Touvron et al., arXiv:2012.12877): cross entropy with the teacher's top class.

    Args:
        logits: the student's, (B, classes).
        teacher: the teacher's, (B, classes).
    """
    return F.cross_entropy(logits.float(), teacher.argmax(dim=1))


def build_distillation(run: Run, classes: Sequence[str]) -> DistilFn:
    """Build the distillation loss of a run.

    The result is called with a batch's mean label loss, the student's logits and the images that the student saw,
    after Mixup and random erasing. It returns the losses to minimise, by name: the label loss if there is no teacher,
    otherwise (1 - w) * label loss and w * distillation loss, where w is `DISTILL.WEIGHT`.

    Args:
        run: the run, with its teacher.
        classes: names of the student's classes.

    Raises:
        TeacherError: the teacher does not have the student's classes.
    """
    teacher, distill = run.teacher, run.config.DISTILL
    if teacher is None:
        return lambda loss, logits, images: {'loss': loss}
    indices = teacher.find_classes(classes, distill.CLASSES)
    if teacher.classes is None and not distill.CLASSES:
        run.logger.warning(
            f'the teacher {teacher.name} does not name its classes: they are assumed to be those of the data, in order'
        )
    run.logger.info(f"{distill.KIND} distillation of {len(indices)} of the teacher's {teacher.count} classes")
    selected = torch.tensor(indices, device=run.process.device)
    is_same = indices == list(range(teacher.count))

    def distil(loss: Tensor, logits: Tensor, images: Tensor) -> dict[str, Tensor]:
        theirs = teacher(images)
        theirs = theirs if is_same else theirs.index_select(1, selected)
        if distill.KIND == 'soft':
            distillation = soft_distillation(logits, theirs, distill.TEMPERATURE)
        else:
            distillation = hard_distillation(logits, theirs)
        weight = distill.WEIGHT
        return {'label_loss': (1 - weight) * loss, 'distillation_loss': weight * distillation}

    return distil
