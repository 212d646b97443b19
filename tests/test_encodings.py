"""Texts are UTF-8, whatever the locale."""

import ast
import subprocess
import sys

from tests.helpers.paths import ROOT
from tests.helpers.processes import environment
from tests.test_imports import FILES

TEXTS = {'read_text', 'write_text', 'open', 'NamedTemporaryFile', 'TemporaryFile', 'FileHandler', 'fdopen'}
BINARY_MODULES = {'Image', 'tarfile', 'zipfile', 'os', 'self.av'}  # their `open` has no encoding


def is_text_without_encoding(call):
    """Whether a call opens, reads or writes a text in the encoding of the locale."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, 'id', '')
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if 'encoding' in keywords:
        return False
    if any(ast.unparse(keywords[name]) == 'True' for name in ('text', 'universal_newlines') if name in keywords):
        return True
    if name == 'write_text' and isinstance(function, ast.Name):  # the project's own one
        return False
    owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ''
    if name not in TEXTS or owner in BINARY_MODULES:
        return False
    modes = [node.value for node in [*call.args, *keywords.values()] if isinstance(node, ast.Constant)]
    is_binary = any(isinstance(mode, str) and 'b' in mode for mode in modes)
    return not is_binary and not (name in ('TemporaryFile', 'NamedTemporaryFile') and 'mode' not in keywords)


def test_every_text_states_its_encoding():
    calls = [
        (path.relative_to(ROOT), node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
        if isinstance(node, ast.Call)
    ]
    assert not [f'{path}:{call.lineno}: {ast.unparse(call)}' for path, call in calls if is_text_without_encoding(call)]


def test_terminal_of_another_encoding_shows_escapes():
    code = "import startup; startup.before_imports(); print('\u6c7d\u8f66 \u00e9')"
    variables = environment(PYTHONIOENCODING='latin-1')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=variables, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b'\\u6c7d\\u8f66 \xe9\n', b'')
