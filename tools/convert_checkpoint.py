"""Convert a checkpoint's weights to .safetensors, or back to .pth.

    python -m tools.convert_checkpoint output/msg_tiny_p4_win7_224/default/ckpt_best.pth msg_tiny.safetensors
    python -m tools.convert_checkpoint msg_tiny.safetensors msg_tiny.pth

The config and the classes go along. What only training needs stays behind, so the result is for --eval, --pretrained
and the tools, and not for continuing a run. Both kinds can be given wherever a checkpoint can.
"""

import argparse
from pathlib import Path

from checkpoint import CheckpointError, load_checkpoint, save_checkpoint, save_safetensors
from utils import mistakes_in_one_line


def convert(source: Path, target: Path, average: bool = False) -> int:
    """Write the weights of one checkpoint as another, whose suffix says its kind.

    Args:
        source: a .pth or .safetensors checkpoint.
        target: the file to write, .pth or .safetensors.
        average: take the exponential moving average of the weights.

    Returns:
        How many tensors were written.

    Raises:
        CheckpointError: the source cannot be read or has no average, or the target cannot be written.
    """
    if target.suffix not in ('.pth', '.safetensors'):
        raise CheckpointError(f'{target} has another suffix: write .pth or .safetensors')
    if target.exists() and target.samefile(source):
        raise CheckpointError(f'{target} is the source, whose training state would be lost: write another name')
    checkpoint = load_checkpoint(source)
    if average and 'model_ema' not in checkpoint:
        raise CheckpointError(f'{source} holds no average of the weights: it was trained with TRAIN.EMA_DECAY 0')
    weights = checkpoint['model_ema' if average else 'model']
    entries = {name: checkpoint[name] for name in ('config', 'classes') if name in checkpoint}
    if target.suffix == '.safetensors':
        save_safetensors(target, weights, **entries)
    else:
        save_checkpoint(target, {'model': weights} | entries)
    return len(weights)


def main() -> None:
    """Read the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('source', type=Path, metavar='SOURCE', help='checkpoint to read, .pth or .safetensors')
    add('target', type=Path, metavar='TARGET', help='checkpoint to write, .pth or .safetensors')
    add('--ema', action='store_true', help='take the exponential moving average of the weights')
    args = parser.parse_args()
    with mistakes_in_one_line():
        count = convert(args.source, args.target, args.ema)
    print(f'{args.target}: {count} tensors')


if __name__ == '__main__':
    main()
