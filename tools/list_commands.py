"""Print the help of every program as Markdown: docs/command_line.md.

python -m tools.list_commands > docs/command_line.md
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import io
import os
import re
import sys
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec

from utils import exit_on_user_error

WIDTH = '100'  # columns

INTRODUCTION = """# Command line

<!-- Written by `python -m tools.list_commands > docs/command_line.md`: change the programs, not this file. -->

All programs run from the project's folder, with its environment activated (`source .venv/bin/activate`). This page has
what their flag `--help` prints, as in `python main.py --help`.

`main.py` and `detection.main` take every setting as `--opts KEY VALUE`, and the most frequent ones also as flags. All
keys are listed in [configuration](configuration.md). [Launching](launching.md) says how to use several GPUs.

The exit code is 0 after success, 1 after an error that the program explains in one line, 2 after a wrong command line,
and 130 after Ctrl-C. Where a program has other exit codes, its help lists them, or
[signals and exit codes](training.md#signals-and-exit-codes) does.
"""

# A program is main.py or a module, followed by one of its commands if it has some.
PROGRAMS = {
    'Train and evaluate': ('main.py', 'detection.main'),
    'Prepare data': (
        'tools.split_dataset',
        'tools.check_dataset',
        'tools.pack_dataset',
        'tools.make_digits',
        'detection.tools.convert_dataset',
        'detection.tools.split_coco',
        'detection.tools.check_dataset',
        'detection.tools.browse',
        'detection.tools.make_digits_coco',
    ),
    'Predict': (
        'tools.predict',
        'tools.unknown_threshold',
        'tools.features',
        'tools.app',
        'detection.tools.predict',
        'detection.tools.score',
        'detection.tools.evaluate_onnx',
    ),
    'Visualize': ('tools.visualize', 'tools.visualize.gallery', 'tools.visualize.deletion', 'tools.plot'),
    'Networks and checkpoints': ('tools.summary', 'tools.convert_checkpoint', 'tools.export'),
    'Experiments and benchmarks': (
        'tools.study',
        'tools.few_images',
        'tools.speedrun',
        'tools.benchmark',
        'tools.benchmark networks',
        'tools.benchmark runtimes',
        'tools.benchmark detectors',
        'tools.benchmark loader',
        'tools.benchmark stages',
        'tools.benchmark.loader_memory',
        'tools.benchmark.coco_start',
        'tools.benchmark.coco_names',
        'tools.benchmark.virtual_ranks',
        'tools.benchmark.weights_hash',
        'tools.replay',
        'tools.rehearsal',
        'tools.rehearsal.names',
    ),
    'Documents': ('tools.draw_figures', 'tools.list_config', 'tools.list_commands'),
}


def main() -> None:
    """Print the document."""
    argparse.ArgumentParser('python -m tools.list_commands', description=__doc__.splitlines()[0]).parse_args()
    with exit_on_user_error():
        print(document(), end='')


def document() -> str:
    """The text of docs/command_line.md."""
    helps = {program: help_of(program) for programs in PROGRAMS.values() for program in programs}
    sections = [INTRODUCTION]
    for title, programs in PROGRAMS.items():
        sections += [f'## {title}\n', '| program | what it does |\n|---|---|']
        sections += [f'| [{name}](#{anchor(name)}) | {summary(helps[name])} |' for name in programs]
        sections += [f'\n### {name}\n\n```text\n{helps[name]}\n```' for name in programs]
        sections[-1] += '\n'
    return '\n'.join(sections)


def help_of(program: str) -> str:
    """What `--help` of a program prints.

    Args:
        program: a name in `PROGRAMS`.
    """
    name, *command = program.split()
    start = 'python main.py' if name == 'main.py' else f'python -m {name}'
    name = name.removesuffix('.py')
    module = import_module(f'{name}.__main__' if find_spec(name).submodule_search_locations else name)
    run = getattr(module, 'parse_option', None) or module.main
    argv, columns, output = sys.argv, os.environ.get('COLUMNS'), io.StringIO()
    sys.argv = [start, *command, '--help']
    os.environ['COLUMNS'] = WIDTH
    try:
        with redirect_stdout(output):
            run()
    except SystemExit:
        return output.getvalue().strip()
    finally:
        sys.argv = argv
        if columns is None:
            del os.environ['COLUMNS']
        else:
            os.environ['COLUMNS'] = columns
    raise AssertionError(f'{program} --help did not exit')


def summary(text: str) -> str:
    """The first sentence of the description, which follows the usage."""
    sentence = re.split(r'(?<=[.?])\s', ' '.join(text.split('\n\n')[1].split()))[0]
    return sentence.replace('|', '\\|').replace('<', '&lt;')


def anchor(heading: str) -> str:
    """The anchor of a heading that consists of names, as GitHub makes it."""
    return heading.replace('.', '').replace(' ', '-')


if __name__ == '__main__':
    main()
