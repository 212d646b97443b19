"""The figure of exchanges: which MSG tokens each chunk of a new MSG token depends on."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.figure_style import BLUE, GREEN, MUTED, ORANGE, PURPLE, SKY_BLUE, VERMILION, YELLOW, text_color
from models.exchange import EXCHANGES, Exchange
from tools.draw_figures.diagram import NOTE, TEXT, canvas, label, rectangle

COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY_BLUE, VERMILION, YELLOW, '#A6A6A6')  # one per MSG token, a to h
CHUNK, HEIGHT = 20, 32  # of a chunk, in pixels
NOTES = {
    'shuf': 'published shuffle',
    'none': 'no exchange',
    'mean': 'mean of the region in half of the channels',
    'shift': 'shift by one window',
    'attention': 'attention in the region',
    'global': 'linear attention among all windows',
    'mix': 'shuffle and learned mixing',
}


def draw_exchanges() -> Figure:
    """What each exchange makes of the MSG tokens of two regions of 2 x 2 windows, from the derivative of its module.

    The height of a token's colour in a chunk is the token's part of the chunk's absolute derivative. Of a linear
    exchange, the derivative is what the module gives for one-hot tokens.
    """
    axes = canvas(height=510)
    panels = [('before', 'MSG tokens a to h, in four chunks each', torch.eye(32))]
    for name, exchange in EXCHANGES.items():
        if exchange.__module__ == Exchange.__module__:  # not one of a user
            panels.append((name, NOTES[name], token_shares(exchange)))
    for number, (name, note, shares) in enumerate(panels):
        row, column = divmod(number, 2)
        draw_tokens(axes, 14 + column * 402, 38 + row * 126, name, note, shares)
    return axes.figure


def token_shares(exchange: type[Exchange]) -> torch.Tensor:
    """Parts of the absolute derivative of new chunks by old ones, in two regions of 2 x 2 windows.

    Returns:
        (32, 32): chunks of new MSG tokens, in the order of windows, and of old ones. Rows sum to 1.
    """
    channels = 4  # of a chunk
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, msg = exchange(4 * channels, region_size=2), torch.randn(1, 2, 4, 4 * channels)
        for parameter in module.parameters():
            if not parameter.any():  # weights that begin as zeros hide what they can learn
                torch.nn.init.normal_(parameter, std=0.1)
    derivative = torch.autograd.functional.jacobian(module, msg).abs()
    shares = derivative.reshape(32, channels, 32, channels).sum(dim=(1, 3))
    return shares / shares.sum(dim=1, keepdim=True)


def draw_tokens(axes: Axes, left: float, top: float, name: str, note: str, shares: torch.Tensor) -> None:
    """Draw the MSG tokens of 2 x 4 windows, each chunk in the colours of the tokens that it depends on.

    Args:
        axes: where to draw.
        left: edge of the panel, in pixels.
        top: edge of the frames of its two regions.
        name: of the panel.
        note: what the exchange is.
        shares: see `token_shares`.
    """
    label(axes, left, top - 14, name, TEXT, bold=True, ha='left')
    label(axes, left + 78, top - 14, note, NOTE, MUTED, ha='left')
    for region in range(2):
        rectangle(axes, left + region * 190, top, 180, 2 * HEIGHT + 18, edge=MUTED)
    for index, row in enumerate(shares):
        token, chunk = divmod(index, 4)
        x = left + 6 + token % 4 // 2 * 190 + token % 2 * 88 + chunk * CHUNK
        y = top + 6 + token // 4 * (HEIGHT + 6)
        bottom = y + HEIGHT
        by_token = row.view(8, 4).sum(dim=1)
        for source in by_token.argsort(stable=True).tolist():  # the largest part is drawn last, on top
            part = HEIGHT * round(by_token[source].item(), 2)  # the same file on any processor
            if part > 0:
                rectangle(axes, x, bottom - part, CHUNK, part, COLORS[source])
            bottom -= part
        rectangle(axes, x, y, CHUNK, HEIGHT, edge='white', line=1.5)
        source, own = by_token.argmax().item(), row.argmax().item()
        if by_token[source] > 0.3:
            text = 'abcdefgh'[source] + (str(own % 4) if row[own] > 0.5 * by_token[source] else '')
            label(axes, x + CHUNK / 2, y + 0.3 * HEIGHT, text, NOTE, text_color(COLORS[source]))
