import numpy as np
import pytest
from PIL import Image

from engine.predictor import Predictor
from models import build_model
from tests.helpers.golden import fill_
from tests.helpers.images import damage, noise
from tests.helpers.runs import CPU
from tools.app.explainer import KINDS, Explainer

NAMES = ['cat', 'dog', 'eel']


def build(config, names=NAMES):
    return Explainer(Predictor(config, fill_(build_model(config)).eval(), names, CPU))


@pytest.fixture
def explainer(tiny_config):
    return build(tiny_config())


@pytest.fixture
def photo(tmp_path):
    noise(60, 40).save(tmp_path / 'photo.png')
    return tmp_path / 'photo.png'


@pytest.mark.parametrize('kind', KINDS)
def test_classes_and_overlay(explainer, photo, kind):
    reply = explainer.explain(photo, kind, stage=1, block=5)
    assert list(reply.probabilities) == NAMES
    assert sum(reply.probabilities.values()) == pytest.approx(1)
    assert reply.overlay.shape == (640, 640, 3)
    assert reply.overlay.std() > 10
    assert 'linear-gradient' in reply.legend
    assert reply.window == (1, 1)


def test_the_reach_is_told(explainer, photo):
    notes = [
        explainer.explain(photo, kind, 1, 1).note for kind in ('Influence on the patches', 'Influence on the MSG token')
    ]
    assert ['1 of 4 windows' in note for note in notes] == [True, False]
    assert '4 of 4 windows' in notes[1]


def test_a_chosen_class_and_window(explainer, photo):
    overlays = [explainer.explain(photo, 'Grad-CAM', 2, 1, class_=name) for name in NAMES]
    assert all(f'**{name}**' in reply.note for name, reply in zip(NAMES, overlays, strict=True))
    assert len({reply.overlay.tobytes() for reply in overlays}) > 1
    assert explainer.explain(photo, 'Influence on the patches', 1, 1, window=(0, 1)).window == (0, 1)
    assert explainer.explain(photo, 'Influence on the patches', 1, 1, window=(5, 0)).window == (1, 1)


def test_a_pixel_of_the_overlay_belongs_to_a_window(explainer):
    overlay = np.zeros((640, 640, 3), np.uint8)  # of 28 x 28 pixels, in windows of 14
    assert [explainer.window_at(x, y, overlay) for x, y in ((0, 0), (319, 321), (639, 0))] == [(0, 0), (1, 0), (0, 1)]


@pytest.mark.parametrize(
    ('damage_type', 'message'),
    [
        ('truncated', 'photo.png cannot be read (image file is trunc'),
        ('garbage', 'no known'),
        ('empty', 'is empty'),
    ],
)
def test_a_bad_upload_is_told(explainer, photo, damage_type, message):
    damage(photo, damage_type)
    reply = explainer.explain(photo, 'Grad-CAM', 1, 1)
    assert message in reply.note
    assert str(photo.parent) not in reply.note
    assert reply[:3] == (None, None, '')


@pytest.mark.parametrize(
    'image',
    [
        Image.new('RGB', (1, 1)),
        Image.new('RGBA', (30, 20), (255, 0, 0, 90)),
        Image.new('P', (30, 20)),
        Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)),
        Image.new('1', (30, 20)),
    ],
    ids=lambda image: image.mode,
)
def test_odd_images(explainer, tmp_path, image):
    image.save(tmp_path / 'odd.png')
    assert explainer.explain(tmp_path / 'odd.png', 'Grad-CAM', 1, 1).overlay is not None


def test_animations_huge_and_narrow_images(explainer, tmp_path, monkeypatch):
    frames = [Image.new('P', (30, 20), i) for i in range(3)]
    frames[0].save(tmp_path / 'a.gif', save_all=True, append_images=frames[1:])
    assert explainer.explain(tmp_path / 'a.gif', 'Grad-CAM', 1, 1).overlay is not None
    noise(4000, 3).save(tmp_path / 'strip.png')
    assert 'too narrow' in explainer.explain(tmp_path / 'strip.png', 'Grad-CAM', 1, 1).note
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 200)
    assert 'too large' in explainer.explain(tmp_path / 'a.gif', 'Grad-CAM', 1, 1).note


def test_large_uploads_are_refused_before_they_are_decoded(explainer, photo, monkeypatch):
    monkeypatch.setattr('tools.app.explainer.prepare', lambda *_: pytest.fail('decodes it'))
    monkeypatch.setattr('tools.app.explainer.MAX_BYTES', 1000)
    assert 'bytes, more than 1,000: scale the picture down' in explainer.explain(photo, 'Grad-CAM', 1, 1).note


def test_names_are_no_markdown(tiny_config, photo):
    """An image in the name of a class would make the browser fetch it."""
    names = ['![x](http://192.0.2.1/x.png)', '<img src=http://192.0.2.1>', '**bold**\n# é']
    explainer = build(tiny_config(), names)
    notes = [explainer.explain(photo, 'Grad-CAM', 1, 1, class_=name).note for name in names]
    assert r'**\!\[x\](http://192.0.2.1/x.png)**' in notes[0]
    assert r'**\<img src=http://192.0.2.1\>**' in notes[1]
    assert r'**\*\*bold\*\*\\n\# ' in notes[2]


def test_a_network_without_classes_has_no_grad_cam(tiny_config, photo):
    explainer = build(tiny_config(MODEL__NUM_CLASSES='0'), [])
    assert 'Grad-CAM' not in explainer.kinds()
    assert len(explainer.kinds()) == 4
    reply = explainer.explain(photo, 'Attention of MSG tokens', 1, 1)
    assert reply.probabilities is None
    assert reply.overlay is not None


def test_grey_networks(tiny_config, photo):
    reply = build(tiny_config(MODEL__MSG__IN_CHANS='1')).explain(photo, 'Attention of MSG tokens', 2, 1)
    assert reply.overlay.std() > 10
