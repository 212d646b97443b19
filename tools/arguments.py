"""What the command lines of several tools have in common."""

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """A whole number from 1 on, as argparse's `type`.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text} is not a whole number from 1 on')
    return int(text)


def pictures_parser(description: str) -> argparse.ArgumentParser:
    """A parser of which pictures to show to which network; read it with `parse_intermixed_args`."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add('images', nargs='+', type=Path, metavar='IMAGES', help='image files or folders')
    add('--cfg', required=True, metavar='FILE', help='YAML config of the network')
    add('--opts', nargs='+', action='extend', default=[], metavar='KEY VALUE', help='config keys and values')
    add('--resume', required=True, metavar='FILE', help='checkpoint of the network')
    add('--limit', type=positive, metavar='N', help='take N of the images, chosen at random but always the same')
    return parser
