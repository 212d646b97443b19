"""Classify images with a trained network: print a line per image; write a table and a contact sheet on request.

    python -m tools.predict --resume <checkpoint> <images>
    python -m tools.predict --resume <checkpoint> 'photos/**/*.jpg' --topk 5 --csv predictions.csv --output sheet.png
    python -m tools.predict --backend onnxruntime msg.onnx <images>

IMAGES are files, folders, quoted patterns, or - for a list of them on standard input. In a tree of class folders, an
image's folder is taken for its class. With --backend, a file of tools.export takes the place of the checkpoint.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from data.class_names import with_words
from data.file_loader import InferenceLoader, evaluation_loader, print_above_bar
from data.images import choose_images, find_images, report_other_files
from data.multi_label import class_probabilities
from data.preprocess import Preprocess
from engine.predictor import Predictor, load_predictor, prediction_parser
from main import TASK
from models.registry import stored_weights
from tools.contact_sheet import MAX_IMAGES, ContactSheet
from tools.export.exported import BACKENDS, backend_of, files_read, load_exported
from tools.output_files import prepare_figure, prepare_output, refuse_overwriting, save_figure, stream_text
from tools.prediction_formats import JSON_END, Prediction, csv_rows, json_parts, text_line
from tools.unknown import UNKNOWN, flag_unknown
from utils import UserError, exit_on_user_error, home_path, orderly_termination, positive_int, printable

STDOUT = Path('-')
EPILOG = """
examples:
  python -m tools.predict --resume ckpt_best.pth 'photos/**/*.jpg' --topk 5 --csv predictions.csv --output sheet.png
  python -m tools.predict --backend onnxruntime msg.onnx photos

exit code: 0 done, 1 an error, 2 a wrong command line, 3 done but some images could not be read, 130 interrupted
(Ctrl-C): the table keeps the results so far
"""


@torch.inference_mode()
def predict(predictor: Predictor, images: InferenceLoader, topk: int = 1) -> Iterator[Prediction]:
    """Classify image files, in order.

    Args:
        predictor: the network.
        images: from `evaluation_loader`.
        topk: number of classes.

    Raises:
        UserError: the network's outputs are not finite.
    """
    config, model, class_names, device = predictor
    preprocess, labels = Preprocess(config, device), {name: index for index, name in enumerate(class_names)}
    for batch in images:
        classes: dict[int, tuple[list[int], list[float]]] = {}
        unknown: dict[int, bool] = {}
        if batch.images is not None:
            logits = model(preprocess.prepare(batch.images))  # (B, classes)
            probabilities = class_probabilities(logits, config)
            if not probabilities.isfinite().all():
                raise UserError('the outputs of the network are not finite: give the checkpoint of another epoch')
            values, indices = (x.tolist() for x in probabilities.topk(topk))
            classes = dict(zip(batch.indices, zip(indices, values, strict=True), strict=True))
            flags = flag_unknown(logits, config)
            if flags is not None:
                unknown = dict(zip(batch.indices, flags, strict=True))
        for number in sorted(classes | batch.errors):
            path = images.paths[number]
            label = labels.get(path.parent.name)
            error = batch.errors.get(number, '')
            yield Prediction(path, *classes.get(number, ([], [])), label, error, unknown.get(number))


def print_lines(predictions: Iterable[Prediction], class_names: Sequence[str]) -> Iterator[Prediction]:
    """Yield the predictions, and print each of them unless its image cannot be read."""
    for prediction in predictions:
        if not prediction.error:
            print_above_bar(text_line(prediction, class_names))
        yield prediction


def count_right(predictions: Iterable[Prediction]) -> Iterator[Prediction]:
    """Yield the predictions; at the end, report on stderr how many are the class that names the image's folder.

    If the network flags images of unknown classes, also report how many it has flagged.
    """
    right = labelled = flagged = judged = 0
    for prediction in predictions:
        if prediction.label is not None and not prediction.error:
            labelled += 1
            right += prediction.label == prediction.indices[0]
        if prediction.is_unknown is not None:
            judged += 1
            flagged += prediction.is_unknown
        yield prediction
    if labelled:
        print(f'{right} of {labelled} right', file=sys.stderr)
    if judged:
        print(f'{flagged} of {judged} flagged: {UNKNOWN}', file=sys.stderr)


def parse_option() -> argparse.Namespace:
    """Read the command line."""
    parser = prediction_parser(
        'python -m tools.predict', __doc__.splitlines()[0], EPILOG, stored_weights(), tuple(BACKENDS)
    )
    add = parser.add_argument
    add('--batch-size', type=positive_int, default=64, metavar='N', help='batch size (64)')
    add('--topk', type=positive_int, default=1, metavar='K', help='number of most likely classes to report (1)')
    add('--words', action='store_true', help="add words to ImageNet's WordNet ids: n01440764 tench")
    table = parser.add_mutually_exclusive_group()
    table.add_argument('--csv', type=home_path, metavar='FILE', help='CSV to write; - for standard output')
    table.add_argument('--json', type=home_path, metavar='FILE', help='JSON to write; - for standard output')
    add('--output', type=home_path, metavar='FILE', help=f'contact sheet to draw, of at most {MAX_IMAGES} images')
    args = parser.parse_intermixed_args()
    if args.backend:
        name, file = args.backend
        if name not in BACKENDS:
            parser.error(f'argument --backend: {name!r} is not a backend: write {" or ".join(BACKENDS)}, then the file')
        if args.cfg or args.pretrained_weights != 'auto':
            flag = '--cfg' if args.cfg else '--pretrained-weights'
            parser.error(f'{flag} is for checkpoints, and an exported file has its own: leave it out')
        args.backend = name, home_path(file)
    return args


def load_network(args: argparse.Namespace) -> tuple[Predictor, list[Path]]:
    """Load the network that the command line names, and name the files that it was read from.

    Raises:
        UserError: it cannot be used.
    """
    if args.backend:
        return load_exported(*args.backend, args.opts), files_read(args.backend[1])
    backend = backend_of(args.resume)
    if backend:
        raise UserError(f'{args.resume} is an exported file: write --backend {backend} {args.resume}')
    predictor = load_predictor(args, TASK)
    if not predictor.class_names:
        raise UserError(f'{args.resume}: the network has no classes')
    return predictor, [Path(args.resume)]


def prepare_outputs(args: argparse.Namespace) -> list[Path]:
    """Check, before the work, that the output files can be written; returns the files.

    Raises:
        OutputError: one cannot.
    """
    outputs = []
    if args.output:
        prepare_figure(args.output)
        outputs.append(args.output)
    table = args.csv or args.json
    if table and table != STDOUT:
        prepare_output(table)
        outputs.append(table)
    return outputs


def run(args: argparse.Namespace) -> InferenceLoader:
    """Classify the images and write the results as they come.

    Returns:
        The loader, which knows how many of them could not be read.

    Raises:
        UserError: something cannot be used or written.
    """
    outputs = prepare_outputs(args)
    predictor, network_files = load_network(args)
    names = with_words(predictor.class_names) if args.words else predictor.class_names
    paths = choose_images(find_images(args.images), args.limit)
    for file in network_files:
        refuse_overwriting(outputs, str(file), paths)
    report_other_files(args.images)

    images = evaluation_loader(predictor.config, paths, args.batch_size, args.workers)
    sheet = ContactSheet(len(paths), names, predictor.config.DATA.EXIF)
    topk = min(args.topk, len(names))
    predictions = sheet.collect(count_right(predict(predictor, images, topk)))
    table = args.csv or args.json
    if table != STDOUT:
        predictions = print_lines(predictions, names)
    write_table(predictions, args, names, topk, has_unknown=bool(predictor.config.TEST.UNKNOWN_SCORE))
    if args.output and sheet.predictions:
        save_figure(sheet.draw(), args.output, dpi=100)
        print(printable(': '.join(filter(None, (str(args.output), sheet.note)))), file=sys.stderr)
    return images


def write_table(
    predictions: Iterable[Prediction],
    args: argparse.Namespace,
    class_names: Sequence[str],
    topk: int,
    has_unknown: bool,
) -> None:
    """Write the predictions as they come to the table that the command line names, if it does.

    Raises:
        OutputError: it cannot be written.
    """
    if args.csv:
        parts, end = csv_rows(predictions, class_names, topk, has_unknown), ''
    elif args.json:
        parts, end = json_parts(predictions, class_names), JSON_END
    else:
        parts, end = ('' for _ in predictions), ''
    table = args.csv or args.json
    if table and table != STDOUT:
        stream_text(table, parts, end)
        return
    try:
        for part in parts:
            print_above_bar(part, end='')
    finally:
        print_above_bar(end, end='')


def main() -> None:
    """Classify; the exit code says whether all images could be read."""
    args = parse_option()
    if STDOUT in (args.csv, args.json) and hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(encoding='utf-8', errors='surrogateescape')  # as in a file: names need not be Unicode
    with exit_on_user_error(), orderly_termination():
        images = run(args)
    images.exit_if_unreadable()


if __name__ == '__main__':
    main()
