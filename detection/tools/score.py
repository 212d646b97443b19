"""Compute COCO's metrics of detections in COCO's result format, such as `results.json` of `--eval`.

    python -m detection.tools.score <results.json> --data-path <coco>
    python -m detection.tools.score <results.json> --data-path <coco> --output <folder>
    python -m detection.tools.score <results.json> --data-path <coco> --by pycocotools hotcoco

No network is run. `--output` writes the report of the classes that `--eval` writes. With several evaluators, their
times can be compared; their metrics are equal.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import time
from pathlib import Path
from typing import Any

from detection.data import CocoDataset, open_split
from detection.data.annotation_checks import are_numbers, check_run_lengths, is_a
from detection.data.annotations import to_rle
from detection.evaluation import EVALUATORS, CocoEvaluation, choose_evaluator
from detection.tools.options import add_data_options, load_data_config
from text_files import read_json
from utils import UserError, exit_on_user_error, home_path, report_write_errors


class ResultsError(UserError):
    """A file of results that cannot be used."""


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read a file in COCO's result format.

    Raises:
        ResultsError: it cannot be read, or is none.
    """
    results = read_json(path, str(path), ResultsError, 'give the results of an evaluation')
    if not isinstance(results, list):
        raise ResultsError(f'{path} is not in the result format of COCO, which is a list')
    for i, result in enumerate(results):
        if not is_result(result):
            raise ResultsError(
                f'{path}: entry {i} is not in the result format of COCO: write image_id, category_id, bbox of four '
                f'numbers, score, and perhaps segmentation with size and counts'
            )
    return results


def is_result(x: Any) -> bool:
    """Whether it is a detection in COCO's result format."""
    if not isinstance(x, dict) or not all(is_a(x.get(key), int | str) for key in ('image_id', 'category_id')):
        return False
    if not isinstance(x.get('bbox'), list) or len(x['bbox']) != 4:
        return False
    mask = x.get('segmentation', {'size': [], 'counts': ''})
    is_mask = isinstance(mask, dict) and mask.keys() >= {'size', 'counts'}
    return is_mask and are_numbers([*x['bbox'], x.get('score')])


def by_image(results: list[dict[str, Any]], dataset: CocoDataset, path: Path) -> dict[Any, list[dict[str, Any]]]:
    """Results of each image.

    Raises:
        ResultsError: one is of no image or category of the data, or has a mask of another size.
        DataError: a mask is invalid.
    """
    images = {image['id']: image for image in dataset.images}
    categories = {category['id'] for category in dataset.categories}
    grouped: dict[Any, list[dict[str, Any]]] = {image_id: [] for image_id in images}
    for result in results:
        image = images.get(result['image_id'])
        if image is None:
            raise ResultsError(f'{path}: image {result["image_id"]} is not in the annotation file')
        if result['category_id'] not in categories:
            raise ResultsError(f'{path}: category {result["category_id"]} is not in the annotation file')
        size = [image['height'], image['width']]
        if result.get('segmentation', {'size': size})['size'] != size:
            raise ResultsError(f'{path}: a mask of image {image["id"]} is not of its size, {size}')
        if 'segmentation' in result:  # invalid ones would crash pycocotools
            check_run_lengths(result['segmentation'], size, f'{path}: a detection in image {image["id"]}')
            result['segmentation'] = to_rle(result['segmentation'], image)
        grouped[image['id']].append(result)
    return grouped


def main() -> None:
    """Read the command line, evaluate and print."""
    parser = argparse.ArgumentParser('python -m detection.tools.score', description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('results', type=home_path, metavar='FILE', help='JSON file of detections in the evaluation split')
    add_data_options(parser)
    add('--output', type=home_path, metavar='DIR', help='write AP per class, curves and the confusion matrix there')
    add(
        '--by',
        nargs='+',
        choices=EVALUATORS,
        default=[choose_evaluator().name],
        help='libraries that compute AP (default: the fastest one that is installed)',
    )
    args = parser.parse_args()
    with exit_on_user_error():
        results = read_results(args.results)
        has_masks = bool(results) and all('segmentation' in x for x in results)
        config = load_data_config(args, 'VAL', MODEL__MASK__ENABLED=has_masks)
        dataset = open_split(config, 'VAL')
        detections = by_image(results, dataset, args.results)
        if args.output:
            with report_write_errors(args.output):
                args.output.mkdir(parents=True, exist_ok=True)
        for name in args.by:
            evaluation = CocoEvaluation(dataset, choose_evaluator(name))
            evaluation.detections = detections
            start = time.perf_counter()
            evaluation.finish()
            seconds = time.perf_counter() - start
            print(f'{evaluation.table()}\n\n{len(results)} detections, {name}: {seconds:.2f} s\n')
        if args.output and dataset.is_labelled:
            print(evaluation.write_class_report(args.output, '', config.SHOW_SCORE))


if __name__ == '__main__':
    main()
