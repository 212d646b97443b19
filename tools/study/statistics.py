"""A metric of variants over seeds: mean, standard deviation, and differences with intervals, paired and by Dunnett."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 10_000
MAX_PAIRS_ENUMERATED = 6  # whose 46,656 resamples are all computed


class Difference(NamedTuple):
    """Differences of pairs, and 95 % intervals of their mean.

    Attributes:
        values: by seed.
        mean: of all.
        bootstrap: percentile bootstrap over pairs, too narrow where they are few; None for one pair.
        student: by Student's t distribution, which is honest about few pairs; None for one pair.
    """

    values: dict[int, float]
    mean: float
    bootstrap: tuple[float, float] | None
    student: tuple[float, float] | None


class DunnettDifference(NamedTuple):
    """Difference of a variant's mean to that of a reference, with a simultaneous 95 % interval by Dunnett's test.

    Attributes:
        mean: the difference of the means.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    mean: float
    low: float
    high: float


class Summary(NamedTuple):
    """A variant over its seeds.

    Attributes:
        variant: its name.
        label: what tables and charts call it.
        parameters: number of them.
        multiply_adds: for one image, measured.
        values: the metric after the last epoch, in percent, by seed.
        curves: the metric after each epoch, in percent, (seeds, epochs).
        difference: to the reference, over the seeds of both; None for the reference, or without such seeds.
    """

    variant: str
    label: str
    parameters: int
    multiply_adds: int
    values: dict[int, float]
    curves: np.ndarray
    difference: Difference | None

    @property
    def mean(self) -> float:
        """Mean of the metric."""
        return float(np.mean([*self.values.values()]))


def sample_deviation(values: Iterable[float]) -> float:
    """Sample standard deviation; NaN for fewer than two values."""
    values = [*values]
    return float(np.std(values, ddof=1)) if len(values) > 1 else float('nan')


def mean_and_deviation(values: Iterable[float]) -> str:
    """Format a mean and, where it is known, the sample standard deviation, such as `64.2 ± 0.1`; '' of no values."""
    values = [*values]
    if not values:
        return ''
    deviation = sample_deviation(values)
    return f'{np.mean(values):.1f}' + ('' if math.isnan(deviation) else f' ± {deviation:.1f}')


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Differences over the seeds of both; None where there are none.

    Args:
        values: by seed.
        reference: by seed, subtracted.
    """
    pairs = {seed: values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())}
    if not pairs:
        return None
    differences = np.array([*pairs.values()])
    n, mean = len(pairs), float(differences.mean())
    if n == 1:
        return Difference(pairs, mean, None, None)
    if n <= MAX_PAIRS_ENUMERATED:
        draws = np.array([*product(range(n), repeat=n)])
    else:
        draws = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    low, high = np.percentile(differences[draws].mean(axis=1), [2.5, 97.5])
    margin = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / n**0.5)
    return Difference(pairs, mean, (float(low), float(high)), (mean - margin, mean + margin))


def dunnett_differences(values: Mapping[str, Sequence[float]], reference: str) -> dict[str, DunnettDifference]:
    """Compare every variant with a reference by Dunnett's test, two-sided.

    All intervals together hold with 95 % probability. The test pools the variance of all variants, which may have
    different numbers of seeds, and does not pair seeds. Variants with a single seed are left out.

    Args:
        values: by variant: a value for each seed.
        reference: the variant that the others are compared with.

    Returns:
        By variant. Empty if the reference has fewer than two seeds, if fewer than two other variants have two, or if
        the seeds of no variant differ.
    """
    samples = {name: list(sample) for name, sample in values.items() if len(sample) > 1 and np.isfinite(sample).all()}
    control = samples.pop(reference, None)
    if control is None or len(samples) < 2 or not any(map(np.ptp, [control, *samples.values()])):
        return {}
    test = stats.dunnett(*samples.values(), control=control, rng=np.random.default_rng(0))
    interval = test.confidence_interval(0.95)
    differences = [float(np.mean(sample) - np.mean(control)) for sample in samples.values()]
    bounds = zip(differences, map(float, interval.low), map(float, interval.high), strict=True)
    return {name: DunnettDifference(*numbers) for name, numbers in zip(samples, bounds, strict=True)}


def metric_curve(run: dict[str, Any], metric: str) -> list[float]:
    """A metric of a run after each epoch, in percent; of the EMA weights where it has any, NaN without evaluation."""
    return [epoch.get(f'ema_{metric}', epoch.get(metric, math.nan)) for epoch in run['epochs']]


def _same_length(curves: Sequence[list[float]]) -> np.ndarray:
    """Curves as an array; those of runs that stopped early keep their last value."""
    longest = max(map(len, curves))
    return np.array([[*curve, *[curve[-1]] * (longest - len(curve))] for curve in curves])


def compare_pairs(results: dict[str, Any]) -> list[tuple[str, str, Difference]]:
    """Labels and differences of the study's `comparisons`, as far as they have seeds in common."""
    final = {summary.variant: summary.values for summary in summarise(results)}
    compared = []
    for name, other in results.get('comparisons', []):
        if difference := paired_difference(final.get(name, {}), final.get(other, {})):
            compared.append((results['labels'][name], results['labels'][other], difference))
    return compared


def compare_with_references(results: dict[str, Any]) -> dict[str, dict[str, DunnettDifference]]:
    """Dunnett's test of all variants against each reference of the study: by reference, then by variant.

    References that the test cannot be made for are left out; see `dunnett_differences`.

    Args:
        results: see `tools.study.runs.collect`.
    """
    values = {summary.variant: [*summary.values.values()] for summary in summarise(results)}
    references = [results['reference'], *results.get('further_references', [])]
    tests = {reference: dunnett_differences(values, reference) for reference in references}
    return {reference: differences for reference, differences in tests.items() if differences}


def summarise(results: dict[str, Any]) -> list[Summary]:
    """Summaries of the variants that have runs, in the study's order.

    Args:
        results: see `tools.study.runs.collect`.
    """
    metric = results['metric']
    runs = {name: {run['seed']: run for run in results['runs'] if run['variant'] == name} for name in results['labels']}
    final = {name: {seed: metric_curve(run, metric)[-1] for seed, run in seeds.items()} for name, seeds in runs.items()}
    reference = final[results['reference']]
    summaries = []
    for name, seeds in runs.items():
        if not seeds:
            continue
        first, own = next(iter(seeds.values())), final[name]
        difference = None if name == results['reference'] else paired_difference(own, reference)
        curves = _same_length([metric_curve(run, metric) for run in seeds.values()])
        sizes = first['parameters'], first['multiply_adds']
        summaries.append(Summary(name, results['labels'][name], *sizes, own, curves, difference))
    return summaries
