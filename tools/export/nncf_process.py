"""Quantization of an OpenVINO file with NNCF: `python -m tools.export.nncf_process SOURCE.xml TARGET.xml IMAGES.npy`.

It is a separate program because NNCF sets up loggers and loads hooks for PyTorch in the process that imports it.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tools.export.openvino_imports import import_nncf, import_openvino
from utils import exit_on_user_error


def quantize(source: Path, target: Path, images: np.ndarray) -> None:
    """Quantize an OpenVINO file to int8 (post-training quantization).

    Products with weights are quantized. Those of attention, of activations with activations, are not: quantized, they
    took more time and accuracy.

    Args:
        source: the file in fp32.
        target: the file to write.
        images: to calibrate with, (N, C, H, W).
    """
    openvino, nncf = import_openvino(), import_nncf()
    nncf.set_log_level(logging.ERROR)
    network = openvino.Core().read_model(source)
    matmuls = (operator for operator in network.get_ops() if operator.get_type_name() == 'MatMul')
    of_activations = [operator.get_friendly_name() for operator in matmuls if not _has_constant(operator)]
    quantized = nncf.quantize(
        network,
        nncf.Dataset([image[None] for image in images]),
        subset_size=len(images),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=of_activations),
    )
    openvino.save_model(quantized, target, compress_to_fp16=False)


def _has_constant(operator: Any) -> bool:
    """Whether an input of an operator of OpenVINO is a constant."""
    sources = (x.get_source_output().get_node() for x in operator.inputs())
    return any(source.get_type_name() == 'Constant' for source in sources)


def main() -> None:
    """Quantize the file that the command line names."""
    with exit_on_user_error():
        source, target, images = map(Path, sys.argv[1:])
        quantize(source, target, np.load(images))


if __name__ == '__main__':
    main()
