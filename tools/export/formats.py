"""The formats: writing a network to a file, and running the file.

The network does not branch on dynamic sizes: see `models.symbolic`. Many of PyTorch's own functions branch on whether a
size is 1, which is not known of a dynamic size. A switch of the exporter, which has no public name, makes them take the
general branch.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.fx.experimental._config as symbolic_shapes_config
from torch import Tensor, nn

from engine.exported_file import onnx_session
from models.pyramid import Size
from tools.export.network import ExportError, Network, as_list
from utils import first_line

if TYPE_CHECKING:
    import onnx_ir as ir

# Formats with the suffixes of their files
FORMATS = {'onnx': '.onnx', 'openvino': '.xml', 'torch_export': '.pt2', 'safetensors': '.safetensors'}
GRAPHS = ('onnx', 'openvino', 'torch_export')
# Packages that formats need beyond requirements.txt; OpenVINO's files are made from ONNX
PACKAGES = {'onnx': ('onnx', 'onnxscript', 'onnxruntime'), 'openvino': ('onnx', 'onnxscript', 'openvino')}
OPSET = 20
MAX_SIDE = 4096

Runner = Callable[[Tensor], list[Tensor]]


def require_packages(names: Iterable[str]) -> None:
    """Check that packages are installed.

    Raises:
        ExportError: one is not.
    """
    for name in names:
        if find_spec(name) is None:
            raise ExportError(f'{name} is not installed: pip install -r requirements-export.txt')


def dynamic_axes(network: Network, size: Size | None) -> dict[int, tuple[str, int, int | None]]:
    """Dynamic axes of the input images, with name, minimum and maximum; see `trace`."""
    axes: dict[int, tuple[str, int, int | None]] = {0: ('batch', 1, None)}
    if size is None:
        axes |= {axis: (name, network.patch_size, MAX_SIDE) for axis, name in ((2, 'height'), (3, 'width'))}
    return axes


def trace(network: Network, size: Size | None) -> torch.export.ExportedProgram:
    """The network as a graph for any batch size.

    Args:
        network: the network.
        size: of the images, in pixels; None for any from one patch to `MAX_SIDE`.

    Raises:
        ExportError: `torch.export` refuses.
    """
    ranges = dynamic_axes(network, size)
    shapes = {axis: torch.export.Dim(name, min=low, max=high) for axis, (name, low, high) in ranges.items()}
    if size is None:
        tile = network.patch_size * 2 ** (len(network.graph.layers) - 1) * network.graph.window_size
        size = Size(2 * tile, 3 * tile)  # only an example
    return trace_graph(network.graph, torch.zeros(2, network.channels, *size), shapes)


def trace_graph(
    graph: nn.Module, images: Tensor, dynamic: Mapping[int, torch.export.Dim]
) -> torch.export.ExportedProgram:
    """A network as a graph.

    Args:
        graph: in evaluation mode, without gradients.
        images: an example of its input.
        dynamic: the dynamic axes of the images.

    Raises:
        ExportError: `torch.export` refuses.
    """
    try:
        with torch.no_grad(), symbolic_shapes_config.patch(backed_size_oblivious=True):
            return torch.export.export(graph, (images,), dynamic_shapes=(dict(dynamic),))
    except Exception as error:  # documents no exceptions of its own
        raise ExportError(f'torch.export refuses this network: {first_line(error)}') from error


def write_torch_export(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a graph for `torch.export.load`."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.export.save(program, path)


def run_torch_export(path: Path) -> Runner:
    """Run a graph of `torch.export`."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of a buffer that is not writable
        module = torch.export.load(path).module()
    return lambda images: as_list(module(images))


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    outputs: list[str],
    axes: dict[int, str] | None,
    inputs: Sequence[str] = ('images',),
    translations: Mapping[Any, Callable] | None = None,
    only_fold: bool = False,
) -> None:
    """Write a graph as ONNX.

    Args:
        program: the graph.
        path: the file.
        outputs: names of the outputs.
        axes: names of the dynamic axes of the images; None if all shapes are fixed.
        inputs: names of the inputs.
        translations: how operators that are not PyTorch's are written: see `custom_translation_table` of
            `torch.onnx.export`.
        only_fold: only fold constants. The exporter's other optimizations take minutes for a detector, and runtimes
            optimize a file when they load it.

    Raises:
        ExportError: `torch.onnx` refuses.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            onnx_program = torch.onnx.export(
                program,
                input_names=list(inputs),
                output_names=outputs,
                dynamic_shapes=None if axes is None else (axes,),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                custom_translation_table=dict(translations or {}),
                optimize=not only_fold,
            )
            if only_fold:
                fold_constants(onnx_program.model)
    except Exception as error:  # documents no exceptions of its own
        raise ExportError(f'torch.onnx refuses this network: {first_line(error)}') from error
    onnx_program.save(path, external_data=False)


def fold_constants(model: 'ir.Model') -> None:
    """Fold the constants of an ONNX graph, and remove what is then unused."""
    from onnxscript import optimizer

    logger = logging.getLogger('onnxscript')
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would warn of each operator that it skips
    try:
        optimizer.fold_constants(model)
        optimizer.remove_unused_nodes(model)
    finally:
        logger.setLevel(level)


def run_onnx(path: Path) -> Runner:
    """Run a graph with onnxruntime, on as many threads as PyTorch has."""
    session = onnx_session(path)
    return lambda images: [torch.from_numpy(x) for x in session.run(None, {'images': images.numpy()})]
