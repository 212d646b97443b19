"""Serve a web page on this machine that classifies images and shows what the network looks at.

    python -m tools.app --resume <checkpoint>

Nothing is loaded from the network, and nothing leaves it. The page needs Gradio: pip install -r requirements-app.txt.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import contextlib
import errno
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from data.images import choose_images, find_images
from engine.predictor import add_network_flags, load_predictor
from main import TASK
from models.registry import stored_weights
from tools.app.explainer import MAX_BYTES, Explainer
from tools.app.page import build_page
from tools.msg_network import build_with_msg_tokens
from utils import UserError, exit_on_user_error, home_path

LOOPBACK = ('localhost', '127.0.0.1', '::1')
EXAMPLES = 12  # pictures offered


def import_gradio() -> ModuleType:
    """Import Gradio without its usage reports; it is slow to import, and only the page needs it.

    Raises:
        UserError: it is not installed.
    """
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'  # read when it is imported
    try:
        import gradio
    except ImportError as error:
        raise UserError(f'the page needs Gradio ({error}): pip install -r requirements-app.txt') from error
    return gradio


def check_port(host: str, port: int) -> None:
    """Check that a server can listen on the port, before the network is loaded, which takes seconds.

    Raises:
        UserError: it cannot listen there.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        reason = 'is in use' if error.errno == errno.EADDRINUSE else f'cannot be used ({error.strerror})'
        raise UserError(f'port {port} of {host} {reason}: give another --port or --host') from error


def host_names(host: str, others: Sequence[str] = ()) -> list[str]:
    """Names of the page that requests may ask for, in their Host header.

    Other names are refused: a foreign website that lets its own name point to this machine (DNS rebinding) could read
    the page from the browser of whoever visits it.

    Args:
        host: the address to listen on; all addresses of this machine where it is 0.0.0.0 or ::.
        others: further names.
    """
    names = [*LOOPBACK, host, *others]
    if host in ('0.0.0.0', '::'):
        names += [socket.gethostname(), socket.getfqdn()]
        with contextlib.suppress(OSError):  # a machine need not know its own name
            names += [info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)]
    bracketed = [f'[{name}]' for name in names if ':' in name]  # as URLs write IPv6
    return list(dict.fromkeys([*names, *bracketed]))


def avoid_proxies(hosts: Sequence[str]) -> None:
    """Let Gradio's check that its page is up bypass the proxies of the environment."""
    names = [host for host in hosts if not host.startswith('[')]  # which httpx does not understand
    for variable in ('no_proxy', 'NO_PROXY'):
        os.environ[variable] = ','.join(filter(None, [os.environ.get(variable), *names]))


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f'{text} is not a port: write a number from 1 to 65535')
    return int(text)


def main() -> None:
    """Read the command line and serve the page until interrupted."""
    parser = argparse.ArgumentParser(
        'python -m tools.app',
        description=__doc__.splitlines()[0],
        epilog='example:\n  python -m tools.app --resume output/msg_digits_p2_win7_56/demo_seed0/ckpt_best.pth '
        '--examples output/digits/val',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_network_flags(parser, stored_weights())
    add = parser.add_argument
    add('--host', default='127.0.0.1', help='address to listen on (127.0.0.1: this machine only)')
    add('--port', type=_port, default=7860, help='port to listen on (7860)')
    add(
        '--examples',
        nargs='+',
        type=home_path,
        default=[],
        metavar='IMAGES',
        help=f'example images offered on the page: files or folders ({EXAMPLES} at most)',
    )
    add(
        '--allow-host',
        nargs='+',
        default=[],
        metavar='NAME',
        help='other host names that the page answers to, such as that of a reverse proxy',
    )
    args = parser.parse_args()
    with exit_on_user_error():
        gradio = import_gradio()
        check_port(args.host, args.port)
        examples = choose_images(find_images(args.examples), EXAMPLES) if args.examples else []
        predictor = load_predictor(args, TASK, build_with_msg_tokens)
    title = f'{predictor.config.MODEL.NAME}, {"/".join(Path(args.resume).parts[-2:])}'
    page = build_page(gradio, Explainer(predictor), title, examples)
    from starlette.middleware import Middleware  # what Gradio is built on
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    hosts = host_names(args.host, args.allow_host)
    avoid_proxies(hosts)
    try:
        page.launch(
            server_name=args.host,
            server_port=args.port,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            max_file_size=MAX_BYTES,
            app_kwargs={'middleware': [Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)]},
            theme=gradio.themes.Default(font='system-ui', font_mono='monospace'),
        )
    except OSError as error:
        sys.exit(f'error: the page cannot be served on {args.host}, port {args.port}: {error}')
    print(f'Open http://{args.host}:{args.port} (Ctrl-C ends)', flush=True)
    page.block_thread()


if __name__ == '__main__':
    main()
