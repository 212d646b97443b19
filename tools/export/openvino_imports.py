"""OpenVINO and NNCF without their telemetry."""

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def _no_telemetry() -> Iterator[None]:
    """Keep OpenVINO and NNCF from sending usage data, if they are imported within this context.

    They send it unless the user has opted out (`opt_in_out --opt_out`), but not in continuous integration, which they
    recognize by the environment variable `CI` when they are imported.
    """
    before = os.environ.get('CI')
    os.environ['CI'] = 'true'
    try:
        yield
    finally:
        if before is None:
            del os.environ['CI']
        else:
            os.environ['CI'] = before


def import_openvino() -> ModuleType:
    """Import OpenVINO, which then sends no usage data.

    Raises:
        ImportError: it is not installed.
    """
    with _no_telemetry():
        import openvino

    return openvino


def import_nncf() -> ModuleType:
    """Import NNCF, which quantizes for OpenVINO and then sends no usage data.

    Raises:
        ImportError: it is not installed.
    """
    with _no_telemetry():
        import nncf
        import openvino  # noqa: F401 - NNCF shares its telemetry

    return nncf
