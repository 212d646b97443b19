"""Files that `tools.export` writes: the report next to a file, and onnxruntime, which runs ONNX files."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.checkpoint_entries import without_other_forms
from text_files import read_json
from utils import UserError, shortened

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


class ExportedFileError(UserError):
    """An exported file that cannot be used; the message says why, and what can."""


def report_file(path: Path) -> Path:
    """The report of `tools.export` on an exported file: FILE.json."""
    return path.with_name(f'{path.name}.json')


def read_report(path: Path) -> dict[str, Any]:
    """Read the report on an exported file; entries that do not have the form that `tools.export` writes are left out.

    Raises:
        ExportedFileError: it cannot be read.
    """
    file = report_file(path)
    report = read_json(file, str(file), ExportedFileError, 'give a file with the report that tools.export writes')
    return without_other_forms(report if isinstance(report, dict) else {})


def reason(error: Exception) -> str:
    """Why a backend fails, on one line; OpenVINO's messages begin with places in its source."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith('Exception from')]
    return shortened(lines[0] if lines else type(error).__name__)


def onnx_session(path: Path) -> 'InferenceSession':
    """Load an ONNX file to run it on the CPU, on as many threads as PyTorch has.

    Raises:
        ExportedFileError: onnxruntime is not installed.
    """
    if find_spec('onnxruntime') is None:
        raise ExportedFileError('onnxruntime is not installed: pip install -r requirements-export.txt')
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')  # idle threads would slow PyTorch's
    return onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
