"""docs/troubleshooting.md quotes messages: each of them is still one of the programs'."""

import ast
import re
from functools import cache

from tests.helpers.paths import ROOT

PAGE = (ROOT / 'docs' / 'troubleshooting.md').read_text()

# Messages of other programs
FOREIGN = {
    'address already in use',
    'CUDA error: no kernel image is available',
    "No module named 'fcntl'",
    'find_unused_parameters=True was specified',
    'the following arguments are required: --local_rank',
}


def quoted_messages(page):
    """Code with spaces in the first columns of the tables of symptoms and messages."""
    messages, is_listed = [], False
    for line in page.splitlines():
        first = line.split('|')[1] if line.startswith('|') else ''
        if not first:
            is_listed = False
        elif first.strip() in ('symptom', 'message'):
            is_listed = True
        elif is_listed:
            messages += [text for text in re.findall(r'`([^`]+)`', first) if ' ' in text and text not in FOREIGN]
    return list(dict.fromkeys(messages))


def message_text(node):
    """A literal or formatted string, with `...` for the values in it."""
    if isinstance(node, ast.JoinedStr):
        return ''.join(part.value if isinstance(part, ast.Constant) else '...' for part in node.values)
    return node.value


@cache
def source_texts():
    """All strings of the programs, a line each."""
    folders = ('data', 'detection', 'engine', 'models', 'tools')
    paths = [*ROOT.glob('*.py'), *(path for name in folders for path in (ROOT / name).rglob('*.py'))]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    is_text = lambda node: isinstance(node, ast.Constant) and isinstance(node.value, str)  # noqa: E731
    return '\n'.join(' '.join(message_text(x).split()) for x in nodes if isinstance(x, ast.JoinedStr) or is_text(x))


def is_in_source(message):
    pattern = '.*'.join(re.escape(part.strip()) for part in message.split('...'))
    return re.search(pattern, source_texts()) is not None


def test_quoted_messages_exist():
    messages = quoted_messages(PAGE)
    assert len(messages) > 100
    assert [message for message in messages if not is_in_source(message)] == []


def test_a_message_that_is_gone_is_found():
    assert is_in_source('another process of this run has ended')
    assert not is_in_source('another process of this run has finished')
