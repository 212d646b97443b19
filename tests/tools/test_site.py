"""The documentation site: it builds without warnings, its links lead somewhere, and it works without a network."""

import json
import re
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from mkdocs.exceptions import PluginError

from tests.helpers.documents import DOCUMENTS, code_blocks
from tests.helpers.paths import ROOT
from tests.helpers.processes import start
from tools.site import hooks

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
MODULES = [module for modules in hooks.API.values() for module in modules]


class Html(HTMLParser):
    """A page's anchors, links, and the files that it loads."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.loaded = {''}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.add(attrs.get('id') or '')
        if tag == 'a' and 'href' in attrs:
            self.links.append(attrs['href'])
        elif tag in ('script', 'img', 'iframe') and 'src' in attrs:
            self.loaded.append(attrs['src'])
        elif tag == 'link' and attrs['rel'] not in ('prev', 'next', 'canonical'):
            self.loaded.append(attrs['href'])


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    command = ('mkdocs', 'build', '--strict', '--config-file', 'tools/site/mkdocs.yml', '--site-dir', folder)
    done = start('-m', *command, variables={'NO_MKDOCS_2_WARNING': '1'})
    assert done.returncode == 0, done.stderr  # a warning is an error
    return folder


@pytest.fixture(scope='module')
def pages(site):
    return {path: Html(path.read_text()) for path in site.rglob('*.html') if path.name != '404.html'}


@pytest.mark.slow
def test_every_document_and_module_has_a_page(site, pages):
    documents = [path.relative_to(ROOT).with_suffix('.html') for path in DOCUMENTS if path.name != 'README.md']
    assert {site / path for path in ['index.html', *documents]} <= set(pages)
    for module in MODULES:
        assert 'class="doc doc-heading"' in (site / 'api' / f'{module}.html').read_text(), module


@pytest.mark.slow
def test_links_lead_to_files_and_anchors_of_the_site(site, pages):
    count = 0
    for page, html in pages.items():
        for link in html.links + html.loaded:
            if re.match('(https?|data|mailto):', link) and link not in html.loaded:
                continue
            path, _, anchor = link.partition('#')
            target = (page.parent / unquote(path)).resolve() if path else page
            assert not path.startswith('/'), (page, link)
            assert target.is_relative_to(site), (page, link)
            assert target.is_file(), (page, link)
            if target in pages and not anchor.startswith('__'):  # those of the theme's switches
                assert unquote(anchor) in pages[target].anchors, (page, link)
            count += 1
    assert count > 5000


@pytest.mark.slow
def test_links_to_source_files_lead_to_pages_with_their_text(site, pages):
    assert '../models/exchange.py.html' in pages[site / 'docs' / 'network.html'].links
    html = pages[site / 'models' / 'exchange.py.html']
    assert '../api/models.exchange.html' in html.links
    assert 'register_exchange' in (site / 'models' / 'exchange.py.html').read_text()


@pytest.mark.slow
def test_search_index_has_the_documents_and_the_api(site):
    index = json.loads((site / 'search' / 'search_index.json').read_text())
    locations = {entry['location'].partition('#')[0] for entry in index['docs']}
    assert {'index.html', 'docs/training.html', 'api/models.exchange.html'} <= locations
    assert not [location for location in locations if location.endswith('.py.html')]
    assert (site / 'search' / 'search_index.js').read_text().startswith('var __index = ')


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason='Chromium is not installed')
def test_search_works_in_a_page_opened_from_a_file_without_requests_to_the_network(site):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu'])
        page = browser.new_page()
        requests, errors = [], []
        page.on('request', lambda request: requests.append(request.url))
        page.on('pageerror', lambda error: errors.append(str(error)))
        page.goto((site / 'docs' / 'training.html').as_uri())
        page.locator('.md-search__input').fill('register_exchange')
        results = page.locator('a.md-search-result__link')
        results.first.wait_for(timeout=60000)
        assert 'api/models.exchange.html' in results.first.get_attribute('href')
        browser.close()
    assert not errors
    assert not [url for url in requests if not url.startswith(('file:', 'data:', 'blob:', 'about:'))]


def test_modules_that_documents_import_from_are_in_the_api():
    own = {path.stem for path in ROOT.glob('*.py')} | {path.parent.name for path in ROOT.glob('*/__init__.py')}
    imported = set()
    for document in DOCUMENTS:
        for block in code_blocks(document.read_text(), 'py(?:thon)?'):
            imported |= set(re.findall(r'^from ([\w.]+) import', block, re.MULTILINE))
    imported = {module for module in imported if module.partition('.')[0] in own - {'tests'}}
    assert len(imported) > 15
    assert imported - {'models', 'data'} <= set(MODULES)  # they collect names of their modules


def test_navigation_has_the_groups_of_the_readme():
    config = type('Config', (), {})()
    hooks.on_config(config)
    titles = [title for group in config.nav for title in group]
    assert titles == ['Home', 'Start', 'Train', 'Use', 'Extend', 'Results', 'Reference', 'Python API']
    paths = [path for group in config.nav[1:-1] for path in next(iter(group.values()))]
    assert {path.relative_to(ROOT).as_posix() for path in DOCUMENTS} == {'README.md', *paths}
    assert len(paths) == len(set(paths))


@pytest.mark.parametrize(
    ('link', 'expected'),
    [
        ('](../models/exchange.py)', '](../models/exchange.py.md)'),
        ('](../models/exchange.py#L3)', '](../models/exchange.py.md#L3)'),
        ('](../tests/tools/summary)', '](../tests/tools/summary/index.md)'),
        ('](../LICENSE)', '](../LICENSE.md)'),
        ('](training.md#resuming)', '](training.md#resuming)'),
        ('](windows.svg)', '](windows.svg)'),
        ('](https://pytorch.org/x.py)', '](https://pytorch.org/x.py)'),
        ('](nowhere.py)', '](nowhere.py)'),
    ],
)
def test_rewritten_links(link, expected):
    assert hooks.LINK.sub(lambda match: hooks.rewritten(match, 'docs/extending.md'), link) == expected


def test_code_blocks_stay_as_they_are_and_nested_lists_are_indented():
    page = type('Page', (), {'file': type('File', (), {'src_uri': 'docs/extending.md'})(), 'meta': {}})()
    code = '```\n  - [a](../config.py)\n```\n'
    nested = '- a\n  - [b](../config.py)\n    more\n'
    expected = '- a\n    - [b](../config.py.md)\n        more\n'
    assert hooks.on_page_markdown(nested + code, page) == expected + code


def test_a_module_that_does_not_exist_is_an_error(monkeypatch):
    monkeypatch.setitem(hooks.API, 'The network', ('models.nothing',))
    with pytest.raises(PluginError, match='module models.nothing of API in tools/site/hooks.py does not exist'):
        hooks.api_index()
