"""Draw several images on one sheet: each with its predicted class and, below it, a map of attention rollout.

    python -m tools.visualize.gallery <images> --weights msg_transformer_nano --output gallery.png

docs/pictures.md says what the map shows. The name of an image's folder is its true class, if the network has this one.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from data.class_names import with_words
from data.drawn_text import fit_font
from data.figures import SheetImage
from data.file_loader import exit_if_unreadable
from data.images import DataError, choose_images, find_images, read_file, report_other_files
from data.multi_label import class_probabilities
from engine.predictor import Predictor, add_network_flags, load_predictor
from main import TASK
from models.registry import stored_weights
from tools.msg_network import build_with_msg_tokens
from tools.output_files import prepare_figure, refuse_overwriting, save_figure
from tools.unknown import flag_unknown
from tools.visualize.explain import trace_blocks, traced_logits
from tools.visualize.overlays import Overlay, colour_scale, draw_overlay, rollout_overlay
from tools.visualize.sheets import LABELS
from tools.visualize.view import NarrowImageError, View, VisualizeError, prepare
from utils import exit_on_user_error, home_path, positive_int, printable

MAX_IMAGES = 24
EXAMPLES = """example:
  python -m tools.visualize.gallery docs/photographs --weights msg_transformer_nano --output gallery.png
"""


def explain_picture(predictor: Predictor, path: Path, view: View, stage: int) -> tuple[SheetImage, Overlay]:
    """Classify an image and trace the classifier's attention back to its patches.

    Args:
        predictor: the network.
        path: the image; its folder may be the name of a class.
        view: from `prepare`.
        stage: whose patches the map shows, from 0.
    """
    stages = trace_blocks(predictor.model, view.image)
    logits = traced_logits(predictor.model, stages).detach()
    names = dict(zip(predictor.class_names, with_words(predictor.class_names), strict=True))
    words = {name: text.removeprefix(f'{name} ') for name, text in names.items()}
    probabilities = class_probabilities(logits, predictor.config)[0]
    predicted = words[predictor.class_names[int(probabilities.argmax())]]
    is_unknown = any(flag_unknown(logits, predictor.config) or ())
    image = SheetImage(view.picture, predicted, float(probabilities.max()), words.get(path.parent.name), is_unknown)
    return image, rollout_overlay(predictor.model, stages, stage)


def draw_gallery(pictures: Sequence[tuple[SheetImage, Overlay]], columns: int = 5) -> Figure:
    """Draw pictures with their predicted classes as titles, and below each its map.

    Titles are green where the prediction is right, red where it is wrong, and black where the true class is unknown.

    Args:
        pictures: from `explain_picture`.
        columns: pictures in a row.
    """
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    scale = colour_scale([overlay for _, overlay in pictures])
    shown = list(dict.fromkeys(name for image, _ in pictures for name in (image.predicted, image.label) if name))
    texts, font = fit_font(shown)
    names = dict(zip(shown, texts, strict=True))
    figure = Figure(figsize=(1.75 * columns + 0.9, 4.1 * rows), layout='constrained')
    grid = figure.subplots(2 * rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis('off')
    for number, (image, overlay) in enumerate(pictures):
        row, column = divmod(number, columns)
        picture = np.asarray(image.image)
        top, bottom = grid[2 * row, column], grid[2 * row + 1, column]
        top.imshow(picture)
        title = image.title(names[image.predicted], names.get(image.label))
        top.set_title(title, color=image.color, font=font, fontsize=9, parse_math=False)
        draw_overlay(bottom, picture, overlay, scale)
    figure.colorbar(scale, ax=list(grid.flat), label=LABELS['rollout'], fraction=0.02, pad=0.01)
    return figure


def load_pictures(
    predictor: Predictor, paths: Sequence[Path], stage: int
) -> tuple[list[tuple[SheetImage, Overlay]], int]:
    """The pictures to draw, and how many files could not be read; stderr names them."""
    pictures, unreadable = [], 0
    for path in paths:
        try:
            view = prepare(predictor, read_file(path), str(path))
        except (DataError, NarrowImageError) as error:
            print(printable(f'error: {error}'), file=sys.stderr)
            unreadable += 1
            continue
        pictures.append(explain_picture(predictor, path, view, stage))
    return pictures, unreadable


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(
        'python -m tools.visualize.gallery',
        description=__doc__.splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('images', nargs='+', type=home_path, metavar='IMAGES', help='image files or folders')
    add_network_flags(parser, stored_weights())
    add('--output', type=home_path, required=True, metavar='FILE', help='picture to write: .png, .svg, .pdf')
    add('--stage', type=positive_int, default=2, metavar='N', help='stage whose patches the maps show, from 1 (2)')
    args = parser.parse_intermixed_args()
    with exit_on_user_error():
        prepare_figure(args.output)
        predictor = load_predictor(args, TASK, build_with_msg_tokens)
        stages = len(predictor.model.layers)
        if args.stage > stages:
            raise VisualizeError(f'the network has no stage {args.stage}: write --stage with 1 to {stages}')
        if not predictor.class_names:
            raise VisualizeError(f'{args.resume}: the network has no classes')
        found = find_images(args.images)
        paths = choose_images(found, MAX_IMAGES)
        refuse_overwriting([args.output], args.resume, paths)
        report_other_files(args.images)
        pictures, unreadable = load_pictures(predictor, paths, args.stage - 1)
        if pictures:
            save_figure(draw_gallery(pictures), args.output, dpi=100)
            more = f': {MAX_IMAGES} of {len(found):,} images, a random choice' if len(found) > MAX_IMAGES else ''
            print(printable(f'{args.output}{more}'))
    exit_if_unreadable(unreadable, len(paths))


if __name__ == '__main__':
    main()
