"""Convert a checkpoint's weights to .safetensors, back to .pth, or to a folder for the Hugging Face hub.

    python -m tools.convert_checkpoint output/msg_tiny_p4_win7_224/default/ckpt_best.pth msg_tiny.safetensors
    python -m tools.convert_checkpoint msg_tiny.safetensors msg_tiny.pth
    python -m tools.convert_checkpoint msg_tiny.safetensors msg_tiny_hf/

The config and the class names are kept. What only training needs is dropped, so the result is for --eval, --pretrained
and the tools, but no run can be resumed from it. The EMA weights are taken where there are some, unless the raw ones
score higher; --pretrained-weights chooses. Both file formats are accepted wherever a checkpoint is. A folder (a name
that ends with a slash) gets the network, the class names and the preprocessing for timm and transformers:
docs/huggingface.md.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
from pathlib import Path

from data.transforms import mean_and_std
from engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, save_safetensors
from engine.predictor import add_weights_flag, load_predictor, network_args
from engine.weights import choose_weights
from main import TASK
from models.hub import named_network, named_network_args, save_for_hf
from utils import exit_on_user_error, home_path, printable, report_write_errors


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
        raise CheckpointError(f'{target} has an unknown suffix: write .pth, .safetensors, or a folder with a slash')
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


def save_folder(source: Path, folder: Path, choice: str = 'auto') -> str:
    """Write a classifier's checkpoint as a folder for the Hugging Face hub; see `models.hub.save_for_hf`.

    Args:
        source: a .pth or .safetensors checkpoint with its config.
        folder: the folder to write.
        choice: `auto`, `raw` or `ema`, as for `choose_weights`.

    Returns:
        What was written, for the user.

    Raises:
        UserError: the checkpoint cannot be used, or the folder cannot be written.
    """
    config, network, classes, _ = load_predictor(network_args(source, weights=choice), TASK, named_network)
    mean, std = mean_and_std(config)
    size = (len(mean), config.DATA.IMG_SIZE, config.DATA.IMG_SIZE)
    crop = {'crop_pct': 0.875, 'crop_mode': 'center'} if config.TEST.CROP else {'crop_pct': 1.0, 'crop_mode': 'squash'}
    data_config = {'input_size': size, 'interpolation': config.DATA.INTERPOLATION, 'mean': mean, 'std': std, **crop}
    with report_write_errors(folder):
        save_for_hf(network, folder, classes, named_network_args(config), data_config, config.DATA.MULTI_LABEL)
    return f'network, preprocessing and {len(classes)} class names'


def main() -> None:
    """Read the command line and convert."""
    parser = argparse.ArgumentParser('python -m tools.convert_checkpoint', description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('source', type=home_path, metavar='SOURCE', help='checkpoint to read, .pth or .safetensors')
    add(
        'target',
        metavar='TARGET',
        help='checkpoint to write, .pth or .safetensors, or a folder with a slash at its end',
    )
    add_weights_flag(parser)
    args = parser.parse_args()
    with exit_on_user_error():
        target = home_path(args.target)
        if args.target.endswith('/'):
            result = save_folder(args.source, target, args.pretrained_weights)
        else:
            result = '{} tensors, {}'.format(*convert(args.source, target, args.pretrained_weights))
        print(printable(f'{args.target}: {result}'))


if __name__ == '__main__':
    main()
