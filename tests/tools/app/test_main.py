import http.client
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request

import cv2
import numpy as np
import pytest

from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.images import damage, write_images
from tests.helpers.paths import ROOT
from tests.helpers.processes import environment, error_line, run_here
from tools.app.__main__ import avoid_proxies, host_names

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-quic', '--disable-sync']
FLAGS += ['--disable-background-networking', '--disable-component-update', '--no-first-run']


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def test_without_gradio_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    line = error_line('-m', 'tools.app', '--resume', 'x')
    assert line.startswith('error: the page needs Gradio (')
    assert line.endswith('): pip install -r requirements-app.txt')


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ([], 'one of the arguments --resume --weights is required'),
        (['--resume', 'x', '--port', '0'], 'argument --port: 0 is not a port: write a number from 1 to 65535'),
        (['--resume', 'x', '--port', 'high'], 'argument --port: high is not a port'),
    ],
)
def test_wrong_flags(flags, message):
    done = run_here('-m', 'tools.app', *flags)
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1]


def test_mistakes_are_told_before_the_network_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', sys)  # not imported: it takes seconds
    with socket.create_server(('127.0.0.1', 0)) as listener:
        port = listener.getsockname()[1]
        line = error_line('-m', 'tools.app', '--resume', 'x', '--port', port)
        assert line == f'error: port {port} of 127.0.0.1 is in use: give another --port or --host'
    line = error_line('-m', 'tools.app', '--resume', 'x', '--port', port, '--host', '256.0.0.1')
    assert line.startswith(f'error: port {port} of 256.0.0.1 cannot be used (')
    line = error_line('-m', 'tools.app', '--resume', 'x', '--port', port, '--examples', 'nowhere')
    assert line == 'error: nowhere does not exist: give image files or folders'
    assert error_line('-m', 'tools.app', '--resume', 'x', '--port', port).startswith('error: checkpoint x does not')


def test_names_of_the_page():
    assert host_names('127.0.0.1') == ['localhost', '127.0.0.1', '::1', '[::1]']
    assert host_names('192.168.0.7', ['vision.example']) == [
        'localhost',
        '127.0.0.1',
        '::1',
        '192.168.0.7',
        'vision.example',
        '[::1]',
    ]
    assert socket.gethostname() in host_names('0.0.0.0')


@pytest.mark.parametrize('before', [None, '', 'intranet'])
def test_the_page_is_asked_without_the_proxy(monkeypatch, before):
    for name in ('http_proxy', 'HTTP_PROXY'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    for name in ('no_proxy', 'NO_PROXY'):
        monkeypatch.delenv(name, raising=False)
        if before is not None:
            monkeypatch.setenv(name, before)
    avoid_proxies(['localhost', '127.0.0.1', '[::1]'])
    assert '[' not in os.environ['no_proxy']
    assert urllib.request.proxy_bypass('127.0.0.1')
    assert urllib.request.proxy_bypass('localhost:7860')
    assert bool(urllib.request.proxy_bypass('intranet')) == (before == 'intranet')


@pytest.fixture
def served(tiny_config, tmp_path):
    """The address of a page, served by a process of its own, and the folder of its examples."""
    pytest.importorskip('gradio', reason='needs gradio: pip install -r requirements-app.txt')
    checkpoint = write_checkpoint(tmp_path / 'w.pth', tiny_config(), ['cat', 'dog', 'eel'])
    examples = write_images(tmp_path / 'images') / 'val'
    command = [sys.executable, '-m', 'tools.app', '--resume', checkpoint, '--port', free_port(), '--examples', examples]
    variables = environment(GRADIO_TEMP_DIR=str(tmp_path / 'cache'), GRADIO_ANALYTICS_ENABLED='True')
    variables |= dict.fromkeys(('http_proxy', 'https_proxy', 'HTTP_PROXY'), 'http://127.0.0.1:9')  # none is there
    log = tmp_path / 'log.txt'
    with log.open('w') as output:
        process = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=output, text=True
        )
    try:
        line = process.stdout.readline()
        assert line.startswith('Open http://127.0.0.1:'), log.read_text()
        yield line.split()[1], examples
        assert process.poll() is None
        assert 'Traceback' not in log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_page_answers_only_its_own_names(served):
    """No foreign one, by which a website could read the page from its visitor's browser."""
    port = int(served[0].rpartition(':')[2])
    for host, status in ((f'127.0.0.1:{port}', 200), (f'localhost:{port}', 200), ('evil.example', 400)):
        connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
        connection.request('GET', '/config', headers={'Host': host, 'Origin': 'http://evil.example'})
        response = connection.getresponse()
        assert (host, response.status) == (host, status)
        if status == 200:
            assert response.getheader('Access-Control-Allow-Origin') is None


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium')
def test_page_in_a_browser(served, tmp_path):
    """What a person sees: classes with bars, an overlay of each kind, messages for bad uploads; all of it local."""
    playwright = pytest.importorskip('playwright.sync_api', reason='needs playwright: requirements-dev.txt')
    address, examples = served
    requests, errors = [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={'width': 1200, 'height': 1100})
        page.on('request', lambda request: requests.append(request.url))
        page.on('console', lambda message: errors.append(message.text) if message.type == 'error' else None)
        page.on('pageerror', lambda error: errors.append(str(error)))
        page.goto(address)
        upload, overlay = page.locator('input[type=file]'), page.locator('img[src*="image.png"]')
        upload.set_input_files(examples / 'class_0' / '0.png')
        page.get_by_text(re.compile('Brightest: the patches|No patch of this stage')).wait_for()
        label = page.get_by_test_id('label-output-value').inner_text()
        assert label in ('cat', 'dog', 'eel')
        assert page.get_by_text(re.compile(r'^\d+%$')).count() == 3
        before = overlay.last.get_attribute('src')

        page.get_by_label('Influence on the patches').click()
        page.get_by_label('1', exact=True).first.click()
        page.get_by_text('1 of 4 windows').wait_for()
        page.wait_for_function('src => [...document.images].at(-1).src != src', arg=before)
        box = overlay.last.bounding_box()
        page.mouse.click(box['x'] + 20, box['y'] + box['height'] - 20)  # the window at the lower left
        page.wait_for_timeout(2000)
        page.screenshot(path=tmp_path / 'page.png')
        screenshot = cv2.imread(str(tmp_path / 'page.png')).astype(int)
        x, y, width, height = (int(box[key]) for key in ('x', 'y', 'width', 'height'))
        drawn = screenshot[y : y + height, x : x + width]
        saturation = drawn.max(axis=-1) - drawn.min(axis=-1)
        left, right = (
            saturation[height // 2 + 20 : -40, 40 : width // 2 - 40],
            saturation[60:-40, width // 2 + 40 : -40],
        )
        assert np.median(left) > 60 > 20 > np.median(right)

        damage(tmp_path / 'renamed.png', 'garbage')
        page.get_by_label('Remove Image').or_(page.get_by_label('Clear')).first.click()
        upload.set_input_files(tmp_path / 'renamed.png')
        page.get_by_text('image renamed.png cannot be read').wait_for()

        pages = [browser.new_page() for _ in range(2)]
        for number, other in enumerate(pages):
            other.goto(address)
            other.locator('input[type=file]').set_input_files(examples / f'class_{number}' / '1.png')
        for other in pages:
            other.get_by_text(re.compile('Brightest: the patches|No patch of this stage')).wait_for()
        browser.close()
    assert not errors
    assert not [url for url in requests if not url.startswith((address, 'data:', 'blob:'))]
    assert not os.path.exists(ROOT / 'tools' / 'app.pyi')
