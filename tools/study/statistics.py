"""Accuracy of variants over seeds: mean, standard deviation, paired difference with a bootstrap interval."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 10_000


class Difference(NamedTuple):
    """Mean of paired differences, and the bounds of its 95 % bootstrap interval."""

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
        accuracies: top-1 after the last epoch, in percent, by seed.
        curves: top-1 after each epoch, in percent, (seeds, epochs).
        difference: to the reference, over the seeds of both; None for the reference, or without such seeds.
    """

    variant: str
    label: str
    parameters: int
    multiply_adds: int
    accuracies: dict[int, float]
    curves: np.ndarray
    difference: Difference | None

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return float(np.mean([*self.accuracies.values()]))

    @property
    def deviation(self) -> float:
        """Sample standard deviation of the accuracy; NaN for one seed."""
        values = [*self.accuracies.values()]
        return float(np.std(values, ddof=1)) if len(values) > 1 else float('nan')


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Mean difference of pairs, with the percentile bootstrap over pairs, always the same one.

    Of one pair the interval is a point; of few pairs it is too narrow, and never wider than the differences' range.

    Args:
        values: one per pair.
        reference: one per pair, subtracted.
    """
    differences = np.subtract(values, reference)
    draws = np.random.default_rng(0).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.percentile(differences[draws].mean(axis=1), [2.5, 97.5])
    return Difference(float(differences.mean()), float(low), float(high))


def accuracy_curve(run: dict[str, Any]) -> list[float]:
    """Top-1 of a run after each epoch, in percent; of the EMA weights where it has any."""
    return [epoch.get('ema_acc1', epoch['acc1']) for epoch in run['epochs']]


def summarise(results: dict[str, Any]) -> list[Summary]:
    """Summaries of the variants that have runs, in the study's order.

    Args:
        results: see `tools.study.runs.collect`.
    """
    runs = {name: {run['seed']: run for run in results['runs'] if run['variant'] == name} for name in results['labels']}
    final = {name: {seed: accuracy_curve(run)[-1] for seed, run in seeds.items()} for name, seeds in runs.items()}
    reference = final[results['reference']]
    summaries = []
    for name, seeds in runs.items():
        if not seeds:
            continue
        first, own = next(iter(seeds.values())), final[name]
        common = [seed for seed in own if seed in reference]
        difference = None
        if common and name != results['reference']:
            difference = paired_difference([own[seed] for seed in common], [reference[seed] for seed in common])
        curves = np.array([accuracy_curve(run) for run in seeds.values()])
        sizes = first['parameters'], first['multiply_adds']
        summaries.append(Summary(name, results['labels'][name], *sizes, own, curves, difference))
    return summaries
