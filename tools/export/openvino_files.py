"""OpenVINO: writing, running and quantizing its files."""

import functools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tools.export.formats import Runner, write_onnx
from tools.export.openvino_imports import import_openvino


def files_of(path: Path) -> list[Path]:
    """The files of an exported network: itself and, where it is OpenVINO's `msg.xml`, the weights in `msg.bin`."""
    return [path.with_suffix('.bin'), path] if path.suffix == '.xml' else [path]


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's entry point, one for the process.

    Each `Core` that compiles a network sets the stack on which the signal handlers of the process run, and restores the
    one before when it goes. If two go in the order in which they came, the stack that remains is freed memory, and the
    next signal crashes the process.
    """
    return import_openvino().Core()


def write_openvino(program: torch.export.ExportedProgram, path: Path, outputs: list[str], axes: dict[int, str]) -> None:
    """Write a graph as OpenVINO's .xml and .bin, in fp32, by way of an ONNX file; see `write_onnx`."""
    onnx = path.with_suffix('.onnx')
    write_onnx(program, onnx, outputs, axes)
    import_openvino().save_model(openvino_core().read_model(onnx), path, compress_to_fp16=False)
    onnx.unlink()


def run_openvino(path: Path) -> Runner:
    """Run an OpenVINO or ONNX file with OpenVINO on the CPU, on as many threads as PyTorch has.

    What is not quantized is computed in fp32: the default is bf16 on processors that have it.
    """
    openvino = import_openvino()
    hints = openvino.properties.hint
    settings = {
        hints.performance_mode: hints.PerformanceMode.LATENCY,
        hints.inference_precision: openvino.Type.f32,
        hints.enable_cpu_pinning: False,  # other programs have the same cores
        openvino.properties.inference_num_threads: torch.get_num_threads(),
    }
    network = openvino_core().compile_model(path, 'CPU', settings)
    return lambda images: [torch.from_numpy(x) for x in network(images.numpy()).values()]


def quantize_openvino(source: Path, target: Path, images: Sequence[np.ndarray]) -> None:
    """Quantize an OpenVINO file to int8 with NNCF, in another process; see `nncf_process`.

    Args:
        source: the file in fp32.
        target: the file to write, in a folder of temporary files.
        images: to calibrate with, each (1, C, H, W).

    Raises:
        RuntimeError: NNCF fails.
    """
    inputs = target.with_suffix('.npy')
    np.save(inputs, np.concatenate(images))
    command = [sys.executable, '-m', 'tools.export.nncf_process', *map(str, (source, target, inputs))]
    project = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=project, capture_output=True, encoding='utf-8', errors='replace')
    inputs.unlink()
    if done.returncode < 0:
        raise RuntimeError(f'NNCF was ended by signal {-done.returncode}: does it need more memory?')
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f'NNCF ended with code {done.returncode}')
