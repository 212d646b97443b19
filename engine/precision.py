"""Mixed precision behind one interface: fp32, native AMP and Apex. The training loop never branches on it."""

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from yacs.config import CfgNode

from engine.config_tree import ConfigError


class Precision:
    """PyTorch's mixed precision: O0 is fp32, O1 autocast to float16 (with a loss scaler) or bfloat16.

    Args:
        level: O0 or O1.
        dtype: half-precision type of O1.
        device: the network's device.

    Raises:
        ConfigError: another level.
    """

    def __init__(self, level: str, dtype: torch.dtype, device: torch.device):
        if level not in ('O0', 'O1'):
            raise ConfigError(
                f'AMP_OPT_LEVEL is {level!r}, which needs NVIDIA Apex (the apex.amp of release 25.05 or before) and a '
                f'GPU: install it, or write O0 or O1'
            )
        self.enabled = level == 'O1'
        self.dtype = dtype
        self.device_type = device.type
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.enabled and dtype is torch.float16)

    def __str__(self) -> str:
        return str(self.dtype).removeprefix('torch.') + ' autocast' if self.enabled else 'float32'

    @property
    def may_overflow(self) -> bool:
        """Whether updates are occasionally skipped because scaled gradients overflow float16."""
        return self.scaler.is_enabled()

    def prepare(self, model: nn.Module, optimizer: Optimizer | None = None) -> tuple[nn.Module, Optimizer | None]:
        """The network, not yet wrapped by DDP, and its optimizer (None in evaluation), as this precision uses them."""
        return model, optimizer

    def autocast(self) -> AbstractContextManager:
        """Context of the forward pass and the loss."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)

    def backward(self, loss: Tensor, optimizer: Optimizer, is_last: bool = True) -> None:
        """Accumulate the gradients of a loss, scaled where needed.

        Args:
            loss: a scalar.
            optimizer: updates the network.
            is_last: whether this is the last batch of an update.
        """
        self.scaler.scale(loss).backward()

    def step(
        self, optimizer: Optimizer, model: nn.Module, max_norm: float, skip_update: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Unscale and clip the gradients, update the weights, clear the gradients.

        Where the gradient norm is not finite, or with `skip_update`, weights and optimizer stay as they are. With a
        fused optimizer, nothing waits for the GPU.

        Args:
            optimizer: updates the model's parameters.
            model: the network.
            max_norm: maximum gradient norm; 0 disables clipping.
            skip_update: a boolean on the device.

        Returns:
            Scalars on the device: the gradient norm before clipping, and whether the update was skipped.
        """
        self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        skipped = ~norm.isfinite() | skip_update
        if all(group.get('fused') for group in optimizer.param_groups):
            optimizer.found_inf = skipped.float()  # as GradScaler does: fused optimizers then skip on the device
            optimizer.step()
        elif not skipped.item():
            optimizer.step()
        self.scaler.update()
        optimizer.zero_grad()
        return norm, skipped

    def state_dict(self) -> dict[str, Any]:
        """State of the loss scaler; empty without one."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; a state without a scaler is ignored."""
        if 'scale' in state:
            self.scaler.load_state_dict(state)


class ApexPrecision:
    """The published mixed precision, by `apex.amp`: O1 patches PyTorch's functions, O2 makes the network float16.

    Args:
        level: O1 or O2.
        amp: the module `apex.amp`.
    """

    may_overflow = True

    def __init__(self, level: str, amp: ModuleType):
        self.level, self.amp = level, amp
        self._updated = False
        self._masters: list[Tensor] = []  # of O2

    def __str__(self) -> str:
        return f'Apex {self.level}'

    def prepare(self, model: nn.Module, optimizer: Optimizer | None = None) -> tuple[nn.Module, Optimizer | None]:
        """As `Precision.prepare`."""
        if optimizer is None:
            return self.amp.initialize(model, opt_level=self.level), None
        # Apex replaces `step` for an update that it skips, so this hook is not called.
        optimizer.register_step_post_hook(self._note_update)
        model, optimizer = self.amp.initialize(model, optimizer, opt_level=self.level)
        if self.level == 'O2':
            # Apex makes its fp32 master weights at the first loss. They must exist when the optimizer's state is
            # loaded, or that is rounded to float16.
            device = next(model.parameters()).device
            with self.amp.scale_loss(torch.zeros((), device=device), optimizer, delay_unscale=True):
                self._masters = list(self.amp.master_params(optimizer))
        return model, optimizer

    def _note_update(self, *_: Any) -> None:
        self._updated = True

    def autocast(self) -> AbstractContextManager:
        """An empty context: Apex has patched what it casts."""
        return nullcontext()

    def backward(self, loss: Tensor, optimizer: Optimizer, is_last: bool = True) -> None:
        """As `Precision.backward`; gradients are unscaled after the last batch of an update."""
        with self.amp.scale_loss(loss, optimizer, delay_unscale=not is_last) as scaled:
            scaled.backward()

    def step(
        self, optimizer: Optimizer, model: nn.Module, max_norm: float, skip_update: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `Precision.step`, on Apex's master weights; Apex itself waits for the GPU in every update."""
        parameters = [p for p in self.amp.master_params(optimizer) if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        self._updated = False
        if not (norm.isfinite() & skip_update).item():  # for a nonfinite norm, Apex has replaced `step`
            optimizer.step()
        optimizer.zero_grad()
        return norm, torch.tensor(not self._updated, device=norm.device)

    def state_dict(self) -> dict[str, Any]:
        """State of Apex's loss scalers, and the fp32 master weights."""
        return {'amp': self.amp.state_dict(), 'masters': [master.detach() for master in self._masters]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; the state of another backend is ignored."""
        if 'amp' in state:
            self.amp.load_state_dict(state['amp'])
        with torch.no_grad():
            for master, saved in zip(self._masters, state.get('masters', []), strict=False):
                master.copy_(saved)


def build_precision(config: CfgNode, device: torch.device, compiles: bool = False) -> Precision | ApexPrecision:
    """Build the precision of `AMP_BACKEND`, `AMP_OPT_LEVEL` and `AMP_DTYPE`.

    The default is the published O1 on a GPU, and fp32 elsewhere. O1 is by Apex where it is installed, unless the
    network is compiled or there are virtual ranks.

    Args:
        config: the config tree.
        device: this process's device.
        compiles: whether the network is compiled; torch.compile cannot trace Apex.

    Raises:
        ConfigError: Apex is requested, by name or by O2, where it cannot be used.
    """
    level = config.AMP_OPT_LEVEL or ('O1' if device.type == 'cuda' else 'O0')
    amp = None
    if config.AMP_BACKEND == 'apex':
        amp = import_apex_amp()
        if amp is None or device.type != 'cuda':
            missing = (
                'NVIDIA Apex with apex.amp (release 25.05 or before) is not installed' if amp is None else 'no GPU'
            )
            raise ConfigError(f'AMP_BACKEND is apex, but {missing}: write native or auto')
        if config.AMP_DTYPE != 'float16':
            raise ConfigError(f'AMP_DTYPE is {config.AMP_DTYPE}, which Apex does not support: write AMP_BACKEND native')
        if compiles:
            raise ConfigError('AMP_BACKEND is apex, which torch.compile cannot trace: write native, or COMPILE False')
    elif config.AMP_BACKEND == 'auto' and device.type == 'cuda' and config.AMP_DTYPE == 'float16' and level != 'O0':
        amp = None if compiles or config.TRAIN.VIRTUAL_RANKS else import_apex_amp()
    if amp is None or level == 'O0':
        return Precision(level, getattr(torch, config.AMP_DTYPE), device)
    if level == 'O2' and config.TRAIN.EMA_DECAY > 0:
        raise ConfigError('TRAIN.EMA_DECAY does not work with the float16 weights of O2: write AMP_OPT_LEVEL O1')
    return ApexPrecision(level, amp)


def import_apex_amp() -> ModuleType | None:
    """`apex.amp`, or None where it is not installed; the package `apex` on PyPI is something else."""
    try:
        from apex import amp
    except Exception:  # PyPI's package may fail in any way
        return None
    return amp if hasattr(amp, 'initialize') else None
