"""Draw the figures of README and docs: diagrams of the network, influence, and charts of stored results.

python -m tools.draw_figures --output docs
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
from itertools import product

from tools.draw_figures.architecture import draw_architecture
from tools.draw_figures.block import draw_block
from tools.draw_figures.charts import draw_exchange_study, draw_growth, draw_study
from tools.draw_figures.exchanges import draw_exchanges
from tools.draw_figures.influence import draw_influence
from tools.draw_figures.windows import draw_windows
from tools.output_files import prepare_figure, save_figure
from utils import exit_on_user_error, home_path, printable

FIGURES = {
    'architecture': draw_architecture,
    'windows': draw_windows,
    'block': draw_block,
    'exchange': draw_exchanges,
    'influence': draw_influence,
    'study': draw_study,
    'exchange_study': draw_exchange_study,
    'growth': draw_growth,
}


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser('python -m tools.draw_figures', description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--output', type=home_path, required=True, metavar='DIR', help='folder for the figures, as <figure>.<format>')
    add('--figures', nargs='+', choices=FIGURES, default=[*FIGURES], help='figures to draw (default: all)')
    add('--formats', nargs='+', choices=('svg', 'pdf', 'png'), default=['svg'], help='file formats (default: svg)')
    args = parser.parse_args()
    with exit_on_user_error():
        for name, suffix in product(args.figures, args.formats):
            path = args.output / f'{name}.{suffix}'
            prepare_figure(path)
            save_figure(FIGURES[name](), path, dpi=200)
            print(printable(path))


if __name__ == '__main__':
    main()
