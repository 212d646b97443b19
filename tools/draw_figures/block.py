"""The figure of a block: its steps, and which tokens each of them reads."""

from matplotlib.figure import Figure

from data.figure_style import BLUE, GREEN, MUTED, ORANGE, PALE, tint
from tools.draw_figures.diagram import NOTE, box, canvas, label, line, plus

GAP, HEIGHT = 23, 56
# Text, width and colour of each step; None is the sum with the residual, 'fork' where the residual leaves
STEPS = (
    ('fork', 0, ''),
    ('Layer\nNorm', 58, PALE),
    ('Window\nattention', 80, tint(BLUE, 0.25)),
    ('Drop\npath', 50, PALE),
    (None, 18, ''),
    ('Exchange of\nMSG tokens', 98, tint(ORANGE, 0.4)),
    ('fork', 0, ''),
    ('Layer\nNorm', 58, PALE),
    ('MLP', 62, tint(GREEN, 0.25)),
    ('Drop\npath', 50, PALE),
    (None, 18, ''),
)
NOTES = {
    'Window\nattention': 'among the patches and\nthe MSG token of a window',
    'Exchange of\nMSG tokens': 'across the windows of a\nshuffle region; the shuffle,\nunless another is chosen',
    'MLP': 'on each token by itself',
}


def draw_block() -> Figure:
    """Draw the steps of a block from left to right."""
    axes = canvas(height=196)
    x, y = 14.0, 78.0
    begin, fork = x, None
    for text, width, fill in STEPS:
        center = x + GAP + width / 2
        if text == 'fork':
            fork = center
        else:
            line(axes, (begin, y), (center - width / 2, y), arrow=True)
            begin = center + width / 2
        if text is None:
            line(axes, (fork, y), (fork, 28), (center, 28), (center, y - width / 2), arrow=True)
            label(axes, (fork + center) / 2, 18, 'residual', NOTE, MUTED)
            plus(axes, center, y, width / 2)
        elif text != 'fork':
            box(axes, center, y, width, HEIGHT, text, fill)
            label(axes, center, y + HEIGHT / 2 + 10, NOTES.get(text, ''), NOTE, MUTED, va='top')
        x = center + width / 2
    line(axes, (begin, y), (x + GAP + 4, y), arrow=True)
    note = 'Input and output: the tokens of all windows, (B, nH, nW, w² + 1, C). Drop path drops whole shuffle regions.'
    label(axes, 14, 182, note, NOTE, MUTED, ha='left')
    return axes.figure
