"""Count the unreadable images that a run skips, and log each once."""

from collections.abc import Callable

from torch import Tensor

from data.dataset import ImageDataset
from data.images import DataError
from data.seeding import seeded
from utils import printable


class SkippedImages:
    """Counts the bad images of a dataset, and logs each of them once.

    Args:
        dataset: its images are skipped where its `on_error` is not 'stop'.
        limit: maximum number of bad images; one more is an error.
        warn: logs a line.
    """

    def __init__(self, dataset: ImageDataset, limit: int, warn: Callable[[str], None]):
        self.dataset, self.limit, self.warn = dataset, limit, warn
        self.indices: set[int] = set()

    def count(self, skipped: Tensor) -> None:
        """Note the `skipped` of a batch, on the CPU.

        Raises:
            DataError: there are more bad images than the limit.
        """
        for index in skipped[skipped >= 0].tolist():
            if index not in self.indices:
                self.indices.add(index)
                self.warn(printable(f'skipped ({len(self.indices)} so far): {self._error(index)}'))
        if len(self.indices) > self.limit:
            raise DataError(
                f'{len(self.indices)} images cannot be read, more than DATA.ERROR_LIMIT {self.limit}: '
                f'see the log, or list them with python -m tools.check_dataset'
            )

    def _error(self, index: int) -> str:
        """Read the image again to get its error: the DataLoader worker has only passed on its index."""
        try:
            with seeded(0):  # draws no number from the run's
                self.dataset.load(index)
        except DataError as error:
            return str(error)
        return f'image {self.dataset.samples.describe(index)} could not be read, but now can'
