"""Links and commands of the project's documents."""

import re
import shlex
from pathlib import Path

from tests.helpers.paths import ROOT

DOCUMENTS = [ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')] + sorted(ROOT.glob('docs/*.md'))
INLINE_COMMAND = re.compile(r'`((?:make|python -m tools|python -m detection|bash)[. ][^`<]+)`')


def relative(path: Path) -> str:
    """A path as a test's id."""
    return str(path.relative_to(ROOT))


def code_blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf'^```{language}\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """A document without its code blocks."""
    return re.sub(r'^```.*?^```$', '', text, flags=re.DOTALL | re.MULTILINE)


def links(text: str) -> list[str]:
    """Targets of links and images within the project."""
    targets = re.findall(r'\]\(([^)\s]+)\)', prose(text))
    return [target for target in targets if not target.startswith(('http://', 'https://'))]


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.+)$', prose(text), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def commands(text: str) -> list[str]:
    """Commands of the bash blocks, continued lines joined, and of inline code."""
    collected = INLINE_COMMAND.findall(prose(text))
    for block in code_blocks(text, 'bash'):
        lines = block.replace('\\\n', ' ').splitlines()
        collected += [' '.join(line.split()) for line in lines if line.strip() and not line.startswith('#')]
    return collected


def words(command: str) -> list[str]:
    """A command's words: variables set for it and redirections dropped, placeholders such as <imagenet> replaced."""
    command = re.sub(r'<[^<>]+>', 'placeholder', command)
    split = shlex.split(re.sub(r'\s>\s*\S+', '', command), comments=True)
    while re.fullmatch(r'[A-Z_]+=\S*', split[0]):
        del split[0]
    return split
