"""Small datasets in the formats of other programs, written by hand."""

from pathlib import Path

from PIL import Image


def write_image(path: Path, size: tuple[int, int] = (200, 100)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (90, 0, 0)).save(path)
    return path


def write_yolo(root: Path, *lines: str, yaml: str = 'train: images\nval: images\nnames: [x]\n') -> Path:
    """One image for each label file, of these lines, in `images/` and `labels/`."""
    (root / 'labels').mkdir(parents=True)
    for number, text in enumerate(lines):
        write_image(root / 'images' / f'{number}.jpg')
        (root / 'labels' / f'{number}.txt').write_text(text)
    (root / 'data.yaml').write_text(yaml)
    return root


def voc_object(name: str = 'cat', box: tuple = (5, 6, 40, 30), more: str = '') -> str:
    corners = ''.join(f'<{key}>{x}</{key}>' for key, x in zip(('xmin', 'ymin', 'xmax', 'ymax'), box, strict=True))
    return f'<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>'


def write_voc(root: Path, stem: str, text: str = '', image: str | None = None) -> Path:
    """An XML file in `Annotations/`, of this content, with its image in `JPEGImages/`; returns the XML file."""
    write_image(root / 'JPEGImages' / (image or f'{stem}.jpg'))
    path = root / 'Annotations' / f'{stem}.xml'
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'<annotation><filename>{stem}.jpg</filename>{text}</annotation>')
    return path
