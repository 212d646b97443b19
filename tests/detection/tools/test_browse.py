from PIL import Image

from tests.helpers.detectors import NO_DROP_PATH
from tests.helpers.paths import TINY_DETECTOR
from tests.helpers.processes import error_line, run_here

PROGRAM = ['-m', 'detection.tools.browse']
SPLITS = ['--opts', 'DATA.TRAIN_SPLIT', 'train', 'DATA.VAL_SPLIT', 'val']


def test_sheet_shows_images_with_their_objects(coco, tmp_path):
    pictures = []
    for name, flags in (('plain', []), ('again', []), ('augmented', ['--augmented']), ('val', ['--split', 'val'])):
        output = tmp_path / name / 'sheet.png'
        done = run_here(*PROGRAM, '--data-path', coco, '--output', output, *flags, *SPLITS)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f'{output}: {4 if name == "val" else 6} of ')
        pictures.append(Image.open(output).convert('RGB'))
    assert [picture.size for picture in pictures] == [(1600, 800)] * 3 + [(1600, 400)]
    data = [picture.tobytes() for picture in pictures]
    assert data[0] == data[1]
    assert len(set(data)) == 3


def test_it_takes_a_config_and_names_mistakes(coco, tmp_path):
    flags = ['--cfg', TINY_DETECTOR, '--data-path', coco, '--output', tmp_path / 'sheet.png', '--count', '2']
    assert run_here(*PROGRAM, *flags, '--opts', *NO_DROP_PATH).returncode == 0
    assert Image.open(tmp_path / 'sheet.png').size == (1600, 400)
    assert 'MODEL.NUM_CLASSES is 5' in error_line(*PROGRAM, *flags, '--opts', 'MODEL.NUM_CLASSES', '5')
    image = coco / 'train' / '0.png'
    before = image.read_bytes()
    assert '0.png is one of the images and would be overwritten' in error_line(*PROGRAM, *flags[:-3], image)
    assert image.read_bytes() == before
    assert 'sheet.txt' in error_line(*PROGRAM, *flags[:-3], tmp_path / 'sheet.txt')
