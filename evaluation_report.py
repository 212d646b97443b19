"""The report of `--eval` on a classifier: tables and figures in the run's folder, and a summary in the log."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from data import ImageDataset
from data.class_names import with_words
from data.figure_style import BLUE, INK, MUTED
from data.figures import SheetImage, confusions, draw_confusion, draw_sheet, thumbnail
from data.images import to_image
from engine.distributed import gather_on_main_process, on_main_process
from engine.run import Run
from text_files import csv_row
from utils import atomic_write, printable, report_write_errors

BINS = 15  # of the calibration error, as in Guo et al., On Calibration of Modern Neural Networks, 2017
SHEET_IMAGES = 48
MAX_MATRIX = 2000  # classes up to which there is a confusion matrix: 4 million numbers


def write_report(run: Run, dataset: ImageDataset, results: np.ndarray, suffix: str, has_top5: bool) -> None:
    """Write the report of an evaluation: CSV files and figures. Every rank calls it, and rank 0 writes.

    Rank 0 gathers seven numbers for each image, not the logits: 3 MB for 50,000 images, whatever the number of classes.

    Args:
        run: the run.
        dataset: the dataset of the images.
        results: per-image results of this rank, (images,) of `evaluation.ImageResults.dtype`.
        suffix: appended to the names of the files, such as `_ema`.
        has_top5: report top-5 accuracy too.

    Raises:
        OutputError: a file cannot be written, in every process.
        DataError: an image can no longer be read, in every process.
    """
    gathered = gather_on_main_process(results)

    def write() -> None:
        table = np.concatenate(gathered)
        table = table[table['index'].argsort()]
        if not len(table):
            run.logger.warning('no report is written: no image could be read')
        elif not np.isfinite(table['loss']).all():
            run.logger.warning('no report is written: the outputs of the network are not finite')
        else:
            with report_write_errors(run.output_dir):
                _write_files(run, dataset, table, suffix, has_top5)

    on_main_process(write)


def write_average_precision(
    run: Run, names: Sequence[str], positives: np.ndarray, average_precision: np.ndarray, suffix: str
) -> None:
    """Write the average precision of each class as a CSV file. Every rank calls it, and rank 0 writes.

    Args:
        run: the run.
        names: names of the classes.
        positives: number of images that show each class, (classes,).
        average_precision: average precision of each class in percent, (classes,); NaN for a class without images.
        suffix: appended to the name of the file, such as `_ema`.

    Raises:
        OutputError: the file cannot be written, in every process.
    """
    path = run.output_dir / f'classes{suffix}.csv'

    def write() -> None:
        rows = [['class', 'index', 'images', 'average_precision']]
        for i, (name, count, value) in enumerate(zip(names, positives, average_precision, strict=True)):
            rows.append([name, i, int(count), '' if np.isnan(value) else f'{value:.2f}'])
        with report_write_errors(run.output_dir):
            _write_csv(path, rows)
        run.logger.info(f'report{suffix}: {path.name} in {run.output_dir}')

    on_main_process(write)


def _write_files(run: Run, dataset: ImageDataset, results: np.ndarray, suffix: str, has_top5: bool) -> None:
    names, written = with_words(dataset.classes), []

    def file(name: str, suffix_: str) -> Path:
        written.append(f'{name}{suffix}{suffix_}')
        return run.output_dir / written[-1]

    def save(name: str, figure: Figure, dpi: int = 100) -> None:
        atomic_write(file(name, '.png'), lambda target: figure.savefig(target, format='png', dpi=dpi))

    def write_csv(name: str, rows: Iterable[list]) -> None:
        _write_csv(file(name, '.csv'), rows)

    target, prediction, count = results['target'], results['prediction'], len(names)
    write_csv('predictions', _prediction_rows(dataset, results, has_top5))
    precision, recall, f1, images = precision_recall_fscore_support(
        target, prediction, labels=range(count), zero_division=np.nan
    )
    top5 = np.bincount(target, results['in_top5'], count) if has_top5 else None
    write_csv('classes', _class_rows(dataset.classes, images, recall, top5, precision, f1))
    ece, bins = calibration(results['probability'], target == prediction)
    save('calibration', draw_calibration(ece, bins))
    known = recall[images > 0]
    lines = [
        f'mean per-class accuracy {100 * known.mean():.2f}%, expected calibration error (ECE) {100 * ece:.2f}%',
        'lowest accuracy: ' + ', '.join(f'{names[i]} {100 * recall[i]:.1f}%' for i in _lowest(recall, images)[:5]),
    ]
    if count <= MAX_MATRIX:
        counts = confusion_matrix(target, prediction, labels=range(count))
        rows = ([name, *row] for name, row in zip(dataset.classes, counts.tolist(), strict=True))
        write_csv('confusion', [['', *dataset.classes], *rows])
        save('confusion', draw_confusion(counts, names, rows='class', columns='predicted as'), dpi=120)
        pairs = [f'{names[i]} as {names[j]} {n} of {total}' for i, j, n, total in confusions(counts)[:5]]
        lines += [f'most frequent confusions: {", ".join(pairs)}'] if pairs else []
    is_wrong = target != prediction
    for name, order, note in (
        ('hardest', np.argsort(-results['loss'], kind='stable'), 'highest loss'),
        ('confident', _wrong_first(is_wrong, results['probability']), 'wrong with the highest probability'),
    ):
        chosen = order[:SHEET_IMAGES]
        if len(chosen):
            save(name, _sheet(run, dataset, results, chosen, names, f'{note}: {len(chosen)} of {len(order):,} images'))
    for line in lines:
        run.logger.info(f'report{suffix}: {printable(line)}')
    run.logger.info(f'report{suffix}: {", ".join(written)} in {run.output_dir}')


def _write_csv(path: Path, rows: Iterable[list]) -> None:
    content = ''.join(map(csv_row, rows)).encode(errors='surrogateescape')  # names of files need not be Unicode
    atomic_write(path, lambda file: file.write(content))


def _prediction_rows(dataset: ImageDataset, results: np.ndarray, has_top5: bool) -> Iterator[list]:
    names = dataset.samples.names
    yield ['index', 'image', 'class', 'predicted', 'probability', 'class_probability', 'loss'] + ['in_top5'] * has_top5
    for index, target, prediction, probability, own, in_top5, loss in results.tolist():
        classes = [dataset.classes[target], dataset.classes[prediction]]
        numbers = [f'{value:.6f}' for value in (probability, own, loss)]
        yield [index, index if names is None else names[index], *classes, *numbers] + [in_top5] * has_top5


def _class_rows(
    classes: Sequence[str],
    images: np.ndarray,
    recall: np.ndarray,
    top5: np.ndarray | None,
    precision: np.ndarray,
    f1: np.ndarray,
) -> Iterator[list]:
    """Rows of `classes.csv`: metrics in percent, empty where they are not defined."""
    columns = {'accuracy': recall} | ({} if top5 is None else {'top5_accuracy': top5 / images.clip(1)})
    columns |= {'precision': precision, 'f1': f1}
    yield ['class', 'index', 'images', *columns]
    for i, name in enumerate(classes):
        is_known = {key: images[i] > 0 or key == 'precision' for key in columns}
        values = [100 * value[i] if is_known[key] else np.nan for key, value in columns.items()]
        yield [name, i, int(images[i]), *('' if np.isnan(value) else f'{value:.2f}' for value in values)]


def _lowest(recall: np.ndarray, images: np.ndarray) -> list[int]:
    """Indices of the classes that have images, lowest accuracy first."""
    return [i for i in np.argsort(recall, kind='stable').tolist() if images[i]]


def _wrong_first(is_wrong: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Indices of the misclassified images, most confident first."""
    wrong = is_wrong.nonzero()[0]
    return wrong[np.argsort(-probability[wrong], kind='stable')]


def calibration(probability: np.ndarray, is_right: np.ndarray) -> tuple[float, np.ndarray]:
    """Expected calibration error (ECE): mean difference of confidence and accuracy over bins of equal width.

    The bins are those of scikit-learn's `calibration_curve`, which does not return the number of images of each bin.

    Args:
        probability: probability of the predicted class, (images,).
        is_right: whether the predicted class is the true class, (images,).

    Returns:
        The error, as a fraction; and for each bin the number of images, mean probability and accuracy, (3, BINS), NaN
        for a bin without images.
    """
    bins = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], probability)
    images, probabilities, right = (np.bincount(bins, x, BINS) for x in (None, probability, is_right))
    with np.errstate(invalid='ignore'):
        table = np.stack((images, probabilities / images, right / images))
    return float(abs(probabilities - right).sum() / images.sum()), table


def draw_calibration(ece: float, bins: np.ndarray) -> Figure:
    """Draw a reliability diagram: accuracy by probability of the prediction, and the number of images per bin."""
    images, probability, accuracy = bins
    figure = Figure(figsize=(4.5, 5.5), layout='constrained')
    axes, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    edges = np.linspace(0, 1, BINS + 1)
    left, width = edges[:-1], 1 / BINS
    axes.plot((0, 1), (0, 1), color=INK, linestyle='dashed', linewidth=1, label='perfect calibration')
    axes.bar(left, np.nan_to_num(accuracy), width, align='edge', color=BLUE, alpha=0.6, edgecolor='white')
    axes.plot(probability, accuracy, '.', color=BLUE, label='mean of a bin')
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel='accuracy', title=f'ECE {100 * ece:.2f} %')
    axes.legend(loc='upper left')
    below.bar(left, images, width, align='edge', color=MUTED, edgecolor='white')
    below.set(xlabel='probability of the predicted class', ylabel='images')
    return figure


def _sheet(
    run: Run, dataset: ImageDataset, results: np.ndarray, chosen: np.ndarray, names: Sequence[str], note: str
) -> Figure:
    """Draw a contact sheet of images, chosen by their rows in the results."""
    images = []
    for row in chosen.tolist():
        index = int(results['index'][row])
        image = to_image(dataset.samples.load(index)[0], dataset.samples.describe(index), upright=run.config.DATA.EXIF)
        target, prediction = names[results['target'][row]], names[results['prediction'][row]]
        images.append(SheetImage(thumbnail(image), prediction, float(results['probability'][row]), target))
    return draw_sheet(images, note)
