import pytest
from matplotlib.figure import Figure

from data import drawn_text
from data.drawn_text import DEJAVU, fit_font, shorten


@pytest.fixture(autouse=True)
def no_fonts(monkeypatch):
    """A machine without fonts, whose notes have not been printed."""
    monkeypatch.setattr(drawn_text, '_installed_fonts', list)
    drawn_text._installed_font.cache_clear()
    drawn_text._note_missing_font.cache_clear()
    yield
    drawn_text._installed_font.cache_clear()


def test_names_that_the_font_has_stay(capsys):
    names = ['cat', 'a $b$ _c', 'Größe', 'кошка', 'two\nlines']
    assert fit_font(names) == (names, DEJAVU)
    assert capsys.readouterr().err == ''


def test_names_that_no_font_has_are_in_latin_letters_with_one_note(capsys):
    texts, font = fit_font(['汽车', '行人', 'cat', '강아지', 'さくら\nい'])
    assert texts == ['QiChe', 'XingRen', 'cat', 'GangAJi', 'sakura\ni']
    assert font == DEJAVU
    assert fit_font(['猫'])[0] == ['Mao']
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith('no font here has all characters of the names: some are drawn in Latin letters; install')


def test_an_installed_font_that_has_the_characters_is_taken(monkeypatch, tmp_path, capsys):
    (tmp_path / 'a.ttf').touch()
    fonts = {DEJAVU: frozenset('ab'), tmp_path / 'a.ttf': frozenset('a'), tmp_path / 'b.ttf': frozenset('ab汽车')}
    monkeypatch.setattr(drawn_text, '_installed_fonts', lambda: [tmp_path / 'a.ttf', tmp_path / 'b.ttf'])
    monkeypatch.setattr(drawn_text, '_characters', fonts.__getitem__)
    assert fit_font(['a', '汽车']) == (['a', '汽车'], tmp_path / 'b.ttf')
    assert fit_font(['ab']) == (['ab'], DEJAVU)
    assert capsys.readouterr().err == ''


def test_control_characters_and_undecodable_bytes_are_escaped():
    assert fit_font(['a\x1b[2J', 'b\udcff'])[0] == [r'a\x1b[2J', r'b\udcff']


@pytest.mark.filterwarnings('error')
def test_matplotlib_draws_any_name():
    texts, font = fit_font(['$\\frac{x$ 汽车 \t 😀'])
    figure = Figure()
    axes = figure.subplots()
    axes.set_title(texts[0], font=font, fontsize=9, parse_math=False)
    axes.set_yticks([0], texts, font=font, fontsize=7, parse_math=False)
    assert axes.title.get_fontsize() == 9
    assert axes.get_yticklabels()[0].get_fontsize() == 7
    figure.canvas.draw()


def test_long_names_are_shortened_in_their_middle():
    assert shorten('short', 5) == 'short'
    assert shorten('photograph_of_a_cat_001.jpg', 11) == 'photo…1.jpg'
    assert len(shorten('x' * 99, 20)) == 20
