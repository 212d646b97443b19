"""The pages of the documentation site, for MkDocs: README, what its links reach, and the Python API.

Each page has the same path in the site as in the repository. So links between pages work in the site as they do on
GitHub, and the pages contain no syntax that only MkDocs understands. This module makes two kinds of pages:

- A link to a source file or a folder leads to a page that shows it. The site has to work without a server and without a
  network, where links to a repository on the web lead nowhere; and many browsers save source files instead of showing
  them.
- `api/` has a page for each module of `API`, which mkdocstrings fills from the docstrings.

The navigation follows the groups of README's section "Documents".
"""

import ast
import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
HOME = 'README.md'
STATIC = ('.jpg', '.json', '.png', '.svg', '.pdf')  # browsers show them
ASSETS = ('iframe-worker.js', 'site.css')
LANGUAGES = {'.sbatch': 'bash', '.sh': 'bash', '.py': 'python', '.yaml': 'yaml'}
LINK = re.compile(r'\]\(([^)\s#]+)(#[^)\s]*)?\)')
FENCED = re.compile(r'(^```.*?^```$)', re.DOTALL | re.MULTILINE)

# Modules that the documents import from, or that a user's own code builds on.
API = {
    'The network': (
        'models.msg_transformer',
        'models.build',
        'models.registry',
        'models.exchange',
        'models.pyramid',
        'models.windows',
        'models.finetune',
        'models.timm_methods',
        'models.hub',
    ),
    'Trained networks': ('engine.predictor', 'engine.checkpoint', 'data.preprocess'),
    'Detection': (
        'detection.detector',
        'detection.detections',
        'detection.images',
        'detection.draw',
        'detection.models.build',
    ),
    'Data': (
        'data.formats',
        'data.python_dataset',
        'data.transforms',
        'data.losses',
        'data.mixup',
        'data.build',
        'data.dataset',
        'data.samples',
        'data.images',
    ),
    'Training': (
        'main',
        'config',
        'optimizer',
        'lr_scheduler',
        'distillation',
        'evaluation',
        'trackers',
        'engine.config_keys',
        'engine.config_tree',
        'engine.task',
        'engine.run_task',
        'engine.evaluation',
        'engine.experiment',
        'engine.distributed',
        'utils',
    ),
    'Tools': ('tools.visualize.explain', 'tools.visualize.rollout', 'tools.export.openvino_imports'),
}
API_INTRODUCTION = """# Python API

These pages are made from the docstrings of the modules that the documents import from, and that your own code can
build on. Import the modules from the project's folder, or with it on the `PYTHONPATH`. After `pip install .`, the
modules of `models` are those of the package `msg_transformer`.
"""


def on_config(config: MkDocsConfig) -> None:
    """Set the navigation: README, the groups of its section "Documents", and the API."""
    documents = (ROOT / HOME).read_text(encoding='utf-8').partition('\n## Documents\n')[2].partition('\n## ')[0]
    groups = re.findall(r'^- \*\*(.+?)\*\*:(.*?)(?=^- |\Z)', documents, re.DOTALL | re.MULTILINE)
    config.nav = [{'Home': HOME}]
    config.nav += [{title: [path for path, _ in LINK.findall(text)]} for title, text in groups]
    modules = [{title: [f'api/{module}.md' for module in names]} for title, names in API.items()]
    config.nav.append({'Python API': ['api/index.md', *modules]})


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of docs/ by everything that README's links reach, and add the pages of the API."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for name in ASSETS:
        files.append(File.generated(config, f'assets/{name}', abs_src_path=str(Path(__file__).with_name(name))))
    for path in sorted(reachable()):
        source = ROOT / path
        if path.endswith('.md') or source.suffix in STATIC:
            files.append(File.generated(config, path, abs_src_path=str(source)))
        else:
            files.append(File.generated(config, page_of(path), content=source_page(path)))
    files.append(File.generated(config, 'api/index.md', content=api_index()))
    for module in (module for modules in API.values() for module in modules):
        files.append(File.generated(config, f'api/{module}.md', content=f'# {module}\n\n::: {module}\n'))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point links to source files at the pages that show the files, and indent nested lists by four spaces.

    GitHub accepts two spaces, Python-Markdown does not.
    """
    path = page.file.src_uri
    if path == HOME:
        page.meta['hide'] = ['navigation']  # it would be a list of one page
    if not (ROOT / path).is_file():
        return markdown  # a page that `on_files` made
    parts = FENCED.split(markdown)  # prose and code in turns
    for index in range(0, len(parts), 2):
        prose = re.sub(r'^(?:  )+(?=\S)', lambda indent: indent[0] * 2, parts[index], flags=re.MULTILINE)
        parts[index] = LINK.sub(lambda link: rewritten(link, path), prose)
    return ''.join(parts)


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Turn the names of documents in docstrings into links."""
    if not page.file.src_uri.startswith('api/'):
        return html
    return re.sub(r'(?<![\w/"])docs/(\w+)\.md', r'<a href="../docs/\1.html">\g<0></a>', html)


def rewritten(link: re.Match[str], path: str) -> str:
    """The Markdown of a link in the document at `path`, pointed at the page that shows its target."""
    target = resolved(link[1], path)
    if target is None or target.endswith('.md') or target.endswith(STATIC):
        return link[0]
    return f']({posixpath.relpath(page_of(target), posixpath.dirname(path) or ".")}{link[2] or ""})'


def reachable() -> set[str]:
    """Paths of all files and folders of the project that README reaches through links of documents."""
    found, queue = {HOME}, [HOME]
    while queue:
        path = queue.pop()
        text = ''.join(FENCED.split((ROOT / path).read_text(encoding='utf-8'))[::2])
        linked = {resolved(target, path) for target, _ in LINK.findall(text)} - {None} - found
        found |= linked
        queue += [target for target in linked if target.endswith('.md')]
    return found


def resolved(target: str, path: str) -> str | None:
    """The file or folder that a link of the document at `path` leads to, from the project's root; None if elsewhere."""
    if re.match(r'[a-z]+:', target):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    return target if not target.startswith('..') and (ROOT / target).exists() else None


def page_of(path: str) -> str:
    """Path of the page that shows a source file or a folder."""
    return f'{path}/index.md' if (ROOT / path).is_dir() else f'{path}.md'


def source_page(path: str) -> str:
    """A page that shows a source file, or lists the files of a folder. The search leaves it out."""
    head = f'---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n'
    source = ROOT / path
    if source.is_dir():
        names = sorted(child.name for child in source.iterdir() if child.suffix in ('.py', '.yaml', '.json'))
        return head + ''.join(f'- `{name}`\n' for name in names)
    module = '.'.join(source.relative_to(ROOT).with_suffix('').parts)
    if any(module in modules for modules in API.values()):
        head += f'[Reference of `{module}`]({os.path.relpath(f"api/{module}.md", os.path.dirname(path) or ".")})\n\n'
    return f'{head}````{LANGUAGES.get(source.suffix, "text")}\n{source.read_text(encoding="utf-8")}````\n'


def api_index() -> str:
    """The first page of the API: each module with the first line of its docstring."""
    lines = [API_INTRODUCTION]
    for title, modules in API.items():
        lines += [f'## {title}\n', '| module | what it has |', '|---|---|']
        for module in modules:
            path = ROOT / f'{module.replace(".", "/")}.py'
            if not path.is_file():
                raise PluginError(f'module {module} of API in tools/site/hooks.py does not exist: correct its name')
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))
            lines.append(f'| [`{module}`]({module}.md) | {docstring.splitlines()[0]} |')
        lines.append('')
    return '\n'.join(lines)
