"""COCO: detectors on this network, on the same optimizer, precision, logger and checkpoints as the classifier."""
