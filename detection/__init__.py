"""Object detection on data in COCO's format, with the same training engine as classification."""
