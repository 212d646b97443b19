"""Find objects in images and videos with a trained detector: print them, draw them, write them as CSV or JSON.

    python -m detection.tools.predict --resume <checkpoint> --output DIR <images or videos>

IMAGES are files, folders, quoted patterns, or - for a list of them on standard input; videos are files. What is drawn
has their names, and their paths within the folders.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.file_loader import InferenceLoader, exit_if_unreadable, print_above_bar
from data.images import DataError, choose_images, find_images, report_other_files
from detection.detections import Detections
from detection.detector import ImageDetector
from detection.draw import draw_detections
from detection.exported import load_exported_detector
from detection.frames import (
    Frame,
    Video,
    VideoWriter,
    detect_frames,
    frames_of_images,
    import_av,
    is_video,
)
from detection.images import read_pixels
from detection.main import TASK
from detection.prediction_formats import CocoJson, csv_header, csv_rows, text_line
from engine.config_tree import ConfigError
from engine.predictor import Predictor, load_predictor, prediction_parser
from utils import (
    UserError,
    atomic_write,
    exit_on_user_error,
    home_path,
    non_negative_int,
    orderly_termination,
    positive_int,
    printable,
    report_write_errors,
)

DetectFn = Callable[[Iterable[Frame]], Iterator[tuple[Frame, Detections]]]

BACKEND = 'onnxruntime'

EPILOG = """
examples:
  python -m detection.tools.predict --resume ckpt_best.pth --output drawn photos
  python -m detection.tools.predict --resume ckpt_best.pth --output drawn film.mp4 --batch-size 4
  python -m detection.tools.predict --resume ckpt_best.pth --json found.json 'photos/**/*.jpg' --opts TEST.FLIP True
  python -m detection.tools.predict --backend onnxruntime detector.onnx --output drawn photos

exit code: 0 done, 1 an error, 2 a wrong command line, 3 done but some images or videos could not be read, 130
interrupted: --csv, --json and the drawn video have the results so far
"""


def output_paths(paths: list[Path], videos: list[Path], output: Path) -> dict[Path, Path]:
    """Where to draw each of the images among files and below folders, and each video.

    Raises:
        DataError: there are no images, or drawing would overwrite one of them, a video or another drawing.
    """
    drawings = {video: output / f'{video.stem}.mp4' for video in videos}
    for path in paths:
        if path.resolve() in (output.resolve(), *output.resolve().parents):
            raise DataError(f'--output {output} is in {path}, with the images: write another')
        for image in find_images([path]):
            drawings[image] = output / (image.relative_to(path) if path.is_dir() else image.name)
    inputs = {path.resolve() for path in drawings}
    for drawing in drawings.values():
        if drawing.resolve() in inputs:
            raise DataError(f'{drawing} would be overwritten: write another --output')
    if len(set(drawings.values())) < len(drawings):
        raise DataError('several files have the same name: give the folder that holds them all, or fewer of them')
    return drawings


class Results:
    """Writes detections: lines on standard output, CSV and JSON.

    A context manager: rows of CSV are written as they come, and the JSON file when the context ends, also after an
    error, with the detections so far.

    Args:
        class_names: of the network.
        csv: file of CSV; None for none.
        json: file of JSON; None for none.

    Raises:
        OutputError: a file cannot be written, which is found out on entering the context.
    """

    def __init__(self, class_names: list[str], csv: Path | None, json: Path | None):
        self.csv, self.json = csv, json
        self.coco, self.csv_file = CocoJson(class_names), None

    def __enter__(self) -> 'Results':
        for path in filter(None, (self.csv, self.json)):
            with report_write_errors(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
        self._write_json()
        if self.csv:
            with report_write_errors(self.csv.parent):
                self.csv_file = self.csv.open('w', encoding='utf-8', errors='surrogateescape', newline='')
            self._write_rows([csv_header()])
        return self

    def __exit__(self, *_: object) -> None:
        if self.csv_file:
            self.csv_file.close()
        self._write_json()

    def add(self, frame: Frame, detections: Detections) -> None:
        """Print and write the detections of a frame.

        Raises:
            OutputError: the file of CSV cannot be written.
        """
        if self.csv_file:
            self._write_rows(csv_rows(frame, detections))
        if self.json:
            self.coco.add(frame, detections)
        for detection in detections:
            print_above_bar(text_line(frame, detection))

    def _write_rows(self, rows: Iterable[str]) -> None:
        with report_write_errors(self.csv.parent):
            self.csv_file.writelines(rows)
            self.csv_file.flush()

    def _write_json(self) -> None:
        if self.json:
            with report_write_errors(self.json.parent):
                atomic_write(self.json, lambda file: file.write(self.coco.text().encode()))


def predict_images(
    detections: Iterator[tuple[Frame, Detections]], results: Results, drawings: dict[Path, Path] | None
) -> None:
    """Report and draw images.

    Raises:
        UserError: a drawing cannot be written.
    """
    for frame, found in detections:
        results.add(frame, found)
        if drawings is None:
            continue
        drawing = drawings[frame.path]
        try:
            drawing.parent.mkdir(parents=True, exist_ok=True)
            draw_detections(frame.pixels / 255, found).save(drawing)
        except (OSError, ValueError) as error:
            raise UserError(f'{drawing}: {error}') from error


def predict_video(path: Path, detect: DetectFn, results: Results, drawing: Path | None, limit: int | None) -> bool:
    """Report and draw the frames of a video, or the first of them.

    Args:
        path: of the video.
        detect: finds the objects.
        results: gets them.
        drawing: video to draw; None for none.
        limit: the most frames; None for all.

    Returns:
        Whether it can be read; if not, a line on stderr says so.

    Raises:
        UserError: the drawn video cannot be written.
    """
    count = 0
    with ExitStack() as stack:
        video = Video(path)
        writer = VideoWriter(drawing, video.fps) if drawing else None
        if writer:
            stack.callback(writer.close)
        frames = (frame for _, frame in zip(range(limit or sys.maxsize), video, strict=False))
        for frame, found in tqdm(detect(frames), unit=' frames', leave=False, disable=None):
            count += 1
            results.add(frame, found)
            if writer:
                writer.write(np.asarray(draw_detections(frame.pixels / 255, found)))
    if count == 0:
        print(printable(f'error: video {path} cannot be read'), file=sys.stderr)
    return count > 0


def main() -> None:
    """Read the command line, print one line per object and write what is asked for."""
    parser = prediction_parser(
        'python -m detection.tools.predict', __doc__.splitlines()[0], EPILOG, backends=(BACKEND,)
    )
    add = parser.add_argument
    add('--output', type=home_path, metavar='DIR', help='folder to draw the images and videos into')
    add('--csv', type=home_path, metavar='FILE', help='CSV to write, a row per object, as they are found')
    add('--json', type=home_path, metavar='FILE', help="JSON to write, in COCO's format, with scores and masks")
    add(
        '--score',
        type=float,
        metavar='S',
        help='minimum score of a detection (MODEL.BOX.SCORE; without this flag: SHOW_SCORE)',
    )
    add(
        '--batch-size',
        type=positive_int,
        default=1,
        metavar='N',
        help='batch size, in images, frames or tiles; it changes only the speed (1)',
    )
    add(
        '--tiles',
        type=non_negative_int,
        metavar='SIZE',
        help='also detect small objects in overlapping tiles of SIZE x SIZE pixels (TEST.TILES)',
    )
    add(
        '--overlap',
        type=float,
        metavar='X',
        help='minimum overlap of tiles, relative to their size (TEST.TILE_OVERLAP, by default 0.2)',
    )
    args = parser.parse_intermixed_args()
    if args.backend and args.backend[0] != BACKEND:
        parser.error(f'argument --backend: {args.backend[0]!r} is not a backend: write {BACKEND}, then the file')
    if args.backend and (args.cfg or args.pretrained_weights != 'auto'):
        flag = '--cfg' if args.cfg else '--pretrained-weights'
        parser.error(f'{flag} is for checkpoints, and an exported file has its own: leave it out')
    given = {'MODEL.BOX.SCORE': args.score, 'TEST.TILES': args.tiles, 'TEST.TILE_OVERLAP': args.overlap}
    args.opts = [*args.opts, *chain(*((key, value) for key, value in given.items() if value is not None))]
    with exit_on_user_error(), orderly_termination():
        if args.output and any(map(is_video, args.images)):
            import_av()  # before the work
        detector = ImageDetector(load_network(args), args.batch_size)
        if args.overlap is not None and not detector.config.TEST.TILES:
            raise ConfigError('--overlap is the overlap of tiles: add --tiles SIZE, such as --tiles 512')
        unreadable, count = run(args, detector)
        if args.output:
            print(printable(args.output))
    exit_if_unreadable(unreadable, count)


def load_network(args: argparse.Namespace) -> Predictor:
    """Load the detector that the command line names: a checkpoint, or an exported file.

    Raises:
        UserError: it cannot be used.
    """
    if args.backend:
        return load_exported_detector(home_path(args.backend[1]), args.opts)
    if Path(args.resume).suffix.lower() == '.onnx':
        raise UserError(f'{args.resume} is an exported file: write --backend {BACKEND} {args.resume}')
    return load_predictor(args, TASK)


def run(args: argparse.Namespace, detector: ImageDetector) -> tuple[int, int]:
    """Predict as the command line says.

    Returns:
        The number of images and videos that cannot be read, and of all.

    Raises:
        UserError: something cannot be read or written.
    """
    videos = list(filter(is_video, args.images))
    sources = [path for path in args.images if path not in videos]
    if args.csv and args.csv == args.json:
        raise DataError(f'--csv and --json are both {args.csv}: write two files')
    min_score = detector.config.SHOW_SCORE if args.score is None else args.score

    def detect(frames: Iterable[Frame]) -> Iterator[tuple[Frame, Detections]]:
        return ((frame, found.above(min_score)) for frame, found in detect_frames(detector, frames))

    drawings = output_paths(sources, videos, args.output) if args.output else None
    paths: Sequence[Path] = ()
    if sources:
        report_other_files(sources)
        found = find_images(sources) if drawings is None else drawings.keys() - set(videos)
        paths = choose_images(sorted(found), args.limit)
    unreadable = 0
    with Results(detector.class_names, args.csv, args.json) as results:
        if paths:
            transform = partial(read_pixels, upright=detector.config.DATA.EXIF)
            images = InferenceLoader(detector.config, paths, transform, workers=args.workers)
            predict_images(detect(frames_of_images(images)), results, drawings)
            unreadable = images.unreadable
        for path in videos:
            unreadable += not predict_video(path, detect, results, drawings and drawings[path], args.limit)
    return unreadable, len(videos) + len(paths)


if __name__ == '__main__':
    main()
