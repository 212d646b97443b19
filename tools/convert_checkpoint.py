"""Convert a checkpoint's weights to .safetensors, or back to .pth.

    python -m tools.convert_checkpoint output/msg_tiny_p4_win7_224/default/ckpt_best.pth msg_tiny.safetensors
    python -m tools.convert_checkpoint msg_tiny.safetensors msg_tiny.pth

The config and the class names are kept. What only training needs is dropped, so the result is for --eval, --pretrained
and the tools, but no run can be resumed from it. The EMA weights are taken where there are some, unless the raw ones
score higher; --pretrained-weights chooses. Both formats are accepted wherever a checkpoint is.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
from pathlib import Path

from engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, save_safetensors
from engine.predictor import add_weights_flag
from engine.weights import choose_weights
from utils import exit_on_user_error, home_path, printable


def convert(source: Path, target: Path, choice: str = 'auto') -> tuple[int, str]:
    """Write a checkpoint's weights in another format.

    Args:
        source: a .pth or .safetensors checkpoint.
        target: the file to write; its suffix, .pth or .safetensors, chooses the format.
        choice: `auto`, `raw` or `ema`, as for `choose_weights`.

    Returns:
        How many tensors were written, and which weights they are.

    Raises:
        CheckpointError: the source cannot be read or has no EMA weights, or the target cannot be written.
    """
    if target.suffix not in ('.pth', '.safetensors'):
        raise CheckpointError(f'{target} has an unknown suffix: write .pth or .safetensors')
    checkpoint = load_checkpoint(source)
    if target.exists() and target.samefile(source):
        raise CheckpointError(f'{target} is the source, whose training state would be lost: write another name')
    weights, description = choose_weights(checkpoint, source, choice)
    metadata = {name: checkpoint[name] for name in ('config', 'classes') if name in checkpoint}
    if target.suffix == '.safetensors':
        save_safetensors(target, weights, **metadata)
    else:
        save_checkpoint(target, {'model': weights} | metadata)
    return len(weights), description


def main() -> None:
    """Read the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('source', type=home_path, metavar='SOURCE', help='checkpoint to read, .pth or .safetensors')
    add('target', type=home_path, metavar='TARGET', help='checkpoint to write, .pth or .safetensors')
    add_weights_flag(parser)
    args = parser.parse_args()
    with exit_on_user_error():
        count, description = convert(args.source, args.target, args.pretrained_weights)
        print(printable(f'{args.target}: {count} tensors, {description}'))


if __name__ == '__main__':
    main()
