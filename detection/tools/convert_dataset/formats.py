"""Formats of detection data that can be converted, and how they are recognised."""

from collections.abc import Callable
from pathlib import Path

from data import DataError
from detection.tools.convert_dataset.coco import find_annotation_files, read_coco, read_roboflow
from detection.tools.convert_dataset.source import Source
from detection.tools.convert_dataset.voc import find_xml_files, read_voc
from detection.tools.convert_dataset.yolo import find_description, read_yolo

READERS: dict[str, Callable[[Path], Source]] = {
    'roboflow': read_roboflow,
    'coco': read_coco,
    'yolo': read_yolo,
    'voc': read_voc,
}


def detect_format(path: Path) -> str:
    """The format of a folder or file.

    Raises:
        DataError: it is none of those known.
    """
    if next(path.glob('*/_annotations.coco.json'), None) is not None:
        return 'roboflow'
    if path.suffix.lower() in ('.yaml', '.yml', '.data', '.names') or find_description(path):
        return 'yolo'  # to which Label Studio adds notes.json
    if path.suffix.lower() == '.json' or find_annotation_files(path):
        return 'coco'
    if find_xml_files(path):
        return 'voc'
    raise DataError(
        f"{path} is of no known format: it has no JSON file in COCO's format, no data.yaml, classes.txt or obj.names "
        f'(YOLO) and no XML files (VOC)'
    )
