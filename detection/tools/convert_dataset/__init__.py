"""Other programs' detection data in COCO's layout: `python -m detection.tools.convert_dataset`."""
