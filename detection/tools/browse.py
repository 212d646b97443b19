"""Draw images of a dataset with their objects on one sheet, as annotated or as training augments them.

    python -m detection.tools.browse --cfg detection/configs/digits.yaml --data-path <coco> --output sheet.png

Look at it before training: boxes that are off, classes that are mixed up and crops that are too small show at once.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse

from detection.data import open_split
from detection.data.transforms import TrainTransform
from detection.draw import draw_sheet
from detection.tools.options import add_data_options, load_data_config
from utils import OutputError, exit_on_user_error, home_path, non_negative_int, positive_int, printable


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser('python -m detection.tools.browse', description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_data_options(parser)
    add('--split', choices=('train', 'val'), default='train', help='split to draw (train)')
    add('--augmented', action='store_true', help='draw the images as training augments them')
    add(
        '--count',
        type=positive_int,
        default=24,
        metavar='N',
        help='number of images, chosen at random but always the same (24)',
    )
    add('--seed', type=non_negative_int, default=0, metavar='N', help='seed of the augmentation (0)')
    add('--output', type=home_path, required=True, metavar='FILE', help='picture to write, .png or .jpg')
    args = parser.parse_args()
    with exit_on_user_error():
        config = load_data_config(args, args.split.upper())
        dataset = open_split(config, args.split.upper(), TrainTransform(config) if args.augmented else None)
        images = (dataset.folder / entry['file_name'] for entry in dataset.images)
        if any(x.name == args.output.name and x.resolve() == args.output.resolve() for x in images):
            raise OutputError(f'{args.output} is one of the images and would be overwritten: write to another file')
        try:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            draw_sheet(dataset, args.count, seed=args.seed).save(args.output)
        except (OSError, ValueError) as error:
            raise OutputError(f'{args.output}: {error}') from error
        text = [f'{args.output}: {min(args.count, len(dataset))} of {len(dataset)} images', *dataset.notes]
        print(printable('; '.join(text)))


if __name__ == '__main__':
    main()
