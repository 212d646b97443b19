"""Draw what a trained network attends to, how windows influence each other, and which patches support a class.

    python -m tools.visualize --resume <checkpoint> --output pictures <images>

IMAGES are files or folders. Each gives a sheet per kind: `attention` of the MSG tokens over their windows, the
`influence` of windows on a chosen one block by block, attention `rollout` from the classifier to the patches of each
stage, and `gradcam` (Grad-CAM) per stage. See docs/pictures.md.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data.file_loader import exit_if_unreadable
from data.images import DataError, find_images, read_file, report_other_files
from engine.predictor import add_network_flags, load_predictor
from main import TASK
from models.registry import stored_weights
from tools.msg_network import build_with_msg_tokens
from tools.output_files import prepare_output, refuse_overwriting, save_figure
from tools.visualize.sheets import KINDS, Choice, chosen_blocks, draw_kinds
from tools.visualize.view import NarrowImageError, VisualizeError, find_class, prepare, random_predictor
from utils import exit_on_user_error, home_path, positive_int, printable

SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.pdf', '.svg')
EXAMPLES = """examples:
  python -m tools.visualize --resume output/msg_digits_p2_win7_56/demo_seed0/ckpt_best.pth --output pictures a.png
  python -m tools.visualize --resume <checkpoint> --kind influence --stage 1 2 --window 3 2 --output a.png photo.jpg
  python -m tools.visualize --cfg configs/msg_tiny_p4_win7_224.yaml --random-weights --output pictures photo.jpg
"""


def plan_outputs(images: Sequence[Path], kinds: Sequence[str], output: Path) -> dict[Path, dict[str, Path]]:
    """The file of each image's sheet of each kind.

    Raises:
        VisualizeError: `output` is one file for several sheets, a type that cannot be written, or a file for a folder.
    """
    if output.suffix and not output.is_dir():
        if output.suffix.lower() not in SUFFIXES:
            raise VisualizeError(
                f'--output {output}: no pictures of type {output.suffix}: write {", ".join(SUFFIXES)} or a folder'
            )
        if len(images) * len(kinds) > 1:
            raise VisualizeError(
                f'--output {output} is one file for {len(images) * len(kinds)} sheets: give a folder, or one image '
                f'and one --kind'
            )
        return {images[0]: {kinds[0]: output}}
    if output.exists() and not output.is_dir():
        raise VisualizeError(f'--output {output} is a file without a suffix: give a folder, or {", ".join(SUFFIXES)}')
    stems, files = Counter(), {}
    for image in images:  # the second image of a name is numbered
        stems[image.stem] += 1
        stem = image.stem if stems[image.stem] == 1 else f'{image.stem}_{stems[image.stem]}'
        files[image] = {kind: output / f'{stem}_{kind}.png' for kind in kinds}
    return files


def _from_one(text: str) -> int:
    """A number from 1 on the command line, as an index from 0."""
    return positive_int(text) - 1


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        'python -m tools.visualize',
        description=__doc__.splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('images', nargs='+', type=home_path, metavar='IMAGES', help='image files or folders')
    add_network_flags(parser, stored_weights(), is_required=False)
    add('--random-weights', action='store_true', help='use the network of --cfg with random weights; the sheets say so')
    add('--output', type=home_path, required=True, metavar='DIR|FILE', help='folder, or file of a single sheet')
    add('--kind', choices=(*KINDS, 'all'), default='all', help='what to draw (default: all)')
    add('--stage', type=_from_one, nargs='+', metavar='N', help='stages, from 1 (default: all)')
    add('--block', type=_from_one, nargs='+', metavar='N', help='blocks within these stages, from 1 (default: all)')
    add('--window', type=_from_one, nargs=2, metavar=('ROW', 'COL'), help='window of the first stage (the centre one)')
    add('--within-stage', action='store_true', help='influence of the windows that enter the same stage, not the first')
    add(
        '--class', dest='class_', metavar='NAME', help="name or number of Grad-CAM's class (default: the predicted one)"
    )
    add('--size', type=positive_int, metavar='N', help='resize the shorter side to N pixels; crop nothing')
    args = parser.parse_intermixed_args()
    if args.random_weights == (args.resume is not None):
        parser.error('give --resume, --weights or --random-weights')
    if args.random_weights and args.cfg is None:
        parser.error('--random-weights needs the --cfg of a network')
    return args


def main() -> None:
    """Read the command line and draw."""
    args = parse_args()
    kinds = KINDS if args.kind == 'all' else (args.kind,)
    with exit_on_user_error():
        images = find_images(args.images)
        if args.random_weights:
            predictor = random_predictor(args.cfg, args.opts)
        else:
            predictor = load_predictor(args, TASK, build_with_msg_tokens)
        if args.kind == 'all' and not predictor.class_names:
            print('no Grad-CAM: the network has no classes', file=sys.stderr)
            kinds = tuple(kind for kind in kinds if kind != 'gradcam')
        outputs = plan_outputs(images, kinds, args.output)
        refuse_overwriting((path for sheets in outputs.values() for path in sheets.values()), args.resume, images)
        report_other_files(args.images)
        class_index = None if args.class_ is None else find_class(predictor.class_names, args.class_)
        choice = Choice(args.stage, args.block, args.window and tuple(args.window), class_index, args.within_stage)
        chosen_blocks(predictor.model, choice)
        checkpoint = None if args.random_weights else '/'.join(Path(args.resume).parts[-2:])
        unreadable = 0
        for path in images:
            try:
                view = prepare(predictor, read_file(path), str(path), args.size)
            except (DataError, NarrowImageError) as error:
                print(printable(f'error: {error}'), file=sys.stderr)
                unreadable += 1
                continue
            sheets = draw_kinds(predictor, view, kinds, choice, path.name, checkpoint)
            for kind, figure in sheets.items():
                prepare_output(outputs[path][kind])
                save_figure(figure, outputs[path][kind], dpi=100)
                print(printable(outputs[path][kind]))
    exit_if_unreadable(unreadable, len(images))


if __name__ == '__main__':
    main()
