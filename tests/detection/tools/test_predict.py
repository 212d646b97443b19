import csv
import json
import os
import shutil
import struct
import sys
from argparse import Namespace
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
import yaml
from pycocotools.coco import COCO

from data import DataError
from data.file_loader import SOME_UNREADABLE
from detection.config import load_config
from detection.detections import Detections
from detection.frames import Frame, Video, VideoWriter, frames_of_images
from detection.models import build_detector
from detection.tools.make_digits_coco import make_digits_coco
from detection.tools.predict import Results, main, output_paths
from tests.helpers.detectors import tiny_detector
from tests.helpers.images import damage
from tests.helpers.paths import DETECTION_CONFIGS, TINY_DETECTOR
from tests.helpers.processes import error_line, run_here, start
from utils import OutputError

PROGRAM = ['-m', 'detection.tools.predict']
CONFIG = DETECTION_CONFIGS / 'digits.yaml'


@pytest.fixture
def images(tmp_path):
    """A folder with images in `train/` and `val/`."""
    make_digits_coco(tmp_path / 'images', train=3, val=3)
    return tmp_path / 'images'


def test_drawings_keep_their_images_paths_and_overwrite_none(images, tmp_path):
    train, val = images / 'train', images / 'val' / '000001.jpg'
    output = tmp_path / 'drawn'
    assert output_paths([train], [], output)[train / '000003.jpg'] == output / '000003.jpg'
    assert output_paths([images], [], output)[val] == output / 'val' / '000001.jpg'
    with pytest.raises(DataError, match='several files have the same name'):
        output_paths([train, val], [], output)
    with pytest.raises(DataError, match=r'000001.jpg would be overwritten: write another --output'):
        output_paths([val], [], images / 'val')
    for inside in (images, images / 'drawn'):
        with pytest.raises(DataError, match='is in .*, with the images: write another'):
            output_paths([images], [], inside)


def test_paths_without_images_are_refused(tmp_path):
    (tmp_path / 'none').mkdir()
    with pytest.raises(DataError, match='no images in'):
        output_paths([tmp_path / 'none'], [], tmp_path / 'drawn')
    with pytest.raises(DataError, match='nowhere does not exist: give image files or folders'):
        output_paths([tmp_path / 'nowhere'], [], tmp_path / 'drawn')


@pytest.mark.slow
def test_detections_are_printed_and_drawn(images, tmp_path):
    torch.manual_seed(0)
    class_names = [f'digit {number}' for number in range(10)]
    model = build_detector(load_config(CONFIG))
    torch.save({'model': model.state_dict(), 'classes': class_names}, tmp_path / 'weights.pth')
    flags = ['--cfg', CONFIG, '--resume', tmp_path / 'weights.pth', '--output', tmp_path / 'drawn', '--score', '0']
    opts = ['--opts', 'MODEL.BOX.SCORE', '0', 'MODEL.BOX.DETECTIONS', '5', 'DEVICE', 'cpu']
    done = start(*PROGRAM, images / 'val', '--limit', '2', *flags, *opts)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == str(tmp_path / 'drawn')
    drawings = sorted((tmp_path / 'drawn').iterdir())
    assert len(drawings) == 2
    assert {line.split('\t')[0] for line in lines} == {str(images / 'val' / path.name) for path in drawings}
    for line in lines:
        _, name, score, box = line.split('\t')
        assert name in class_names
        assert 0 <= float(score) <= 1
        x1, y1, x2, y2 = map(float, box.split())
        assert 0 <= x1 <= x2 <= 128
        assert 0 <= y1 <= y2 <= 128
    for path in drawings:
        drawing, image = cv2.imread(str(path)), cv2.imread(str(images / 'val' / path.name))
        assert drawing.shape[:2] == tuple(4 * side for side in image.shape[:2])
        assert np.abs(cv2.resize(drawing, image.shape[1::-1]).astype(int) - image).max() > 60  # something is drawn


@pytest.mark.slow
def test_mistakes_are_reported_in_one_line():
    line = error_line(*PROGRAM, 'nowhere', '--cfg', CONFIG, '--resume', 'x', '--output', 'output')
    assert 'error: checkpoint x does not exist' in line


def test_a_damaged_image_is_reported_and_the_others_are_drawn(images, tmp_path, monkeypatch, capsys):
    config = tiny_detector('MODEL.NUM_CLASSES', '10')
    torch.save({'model': build_detector(config).state_dict()}, tmp_path / 'weights.pth')
    damage(images / 'val' / '000002.jpg', 'truncated')
    flags = ['--cfg', TINY_DETECTOR, '--resume', tmp_path / 'weights.pth', '--output', tmp_path / 'drawn']
    opts = ['--opts', 'MODEL.NUM_CLASSES', '10']
    monkeypatch.setattr('sys.argv', list(map(str, ['predict', images, *flags, *opts])))
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == SOME_UNREADABLE
    captured = capsys.readouterr()
    assert captured.err.endswith('error: 1 of 6 images cannot be read: see above\n')
    assert '2 file(s) of other kinds left out' in captured.err  # the annotations
    assert f'error: image {images}/val/000002.jpg cannot be read' in captured.err
    drawn = {str(path.relative_to(tmp_path / 'drawn')) for path in (tmp_path / 'drawn').rglob('*.jpg')}
    assert drawn == {f'{split}/00000{i}.jpg' for split in ('train', 'val') for i in (1, 2, 3)} - {'val/000002.jpg'}


@pytest.fixture
def weights(tmp_path):
    """A checkpoint of a tiny detector that finds things everywhere, with its config."""
    torch.manual_seed(0)
    config = tiny_detector('MODEL.BOX.SCORE', '0.0', 'MODEL.BOX.DETECTIONS', '4')
    state = {'model': build_detector(config).state_dict(), 'classes': ['box', 'wedge', 'rare']}
    torch.save(state | {'config': yaml.safe_load(config.dump())}, tmp_path / 'weights.pth')
    return tmp_path / 'weights.pth'


def predict(*arguments):
    done = run_here(*PROGRAM, *arguments, '--score', '0', '--workers', '0')
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_csv_and_json_have_what_is_printed(coco, weights, tmp_path):
    found = tmp_path / 'out' / 'found.csv', tmp_path / 'out' / 'found.json'
    lines = predict(coco / 'val', '--resume', weights, '--csv', found[0], '--json', found[1])
    with found[0].open() as file:
        rows = list(csv.DictReader(file))
    for row, line in zip(rows, lines, strict=True):
        path, name, score, _ = line.split('\t')
        assert (row['path'], row['class']) == (path, name)
        assert float(row['score']) == pytest.approx(float(score), abs=6e-4)
    assert all(row['frame'] == '' for row in rows)
    annotations = COCO(found[1])
    assert len(annotations.anns) == len(rows) == 16
    names = {category['id']: category['name'] for category in annotations.dataset['categories']}
    for row, annotation in zip(rows, annotations.dataset['annotations'], strict=True):
        image = annotations.imgs[annotation['image_id']]
        assert (image['file_name'], names[annotation['category_id']]) == (row['path'], row['class'])
        x, y, w, h = annotation['bbox']
        corners = [float(row[key]) for key in ('x1', 'y1', 'x2', 'y2')]
        assert [x, y, x + w, y + h] == pytest.approx(corners, abs=0.02)
        assert annotations.annToMask(annotation).shape == (image['height'], image['width'])


def test_batches_find_the_same(coco, weights):
    one, three = (predict(coco / 'val', '--resume', weights, '--batch-size', n) for n in (1, 3))
    for first, second in zip(one, three, strict=True):
        (*names, score, box), (*same, again, moved) = first.split('\t'), second.split('\t')
        assert names == same
        assert float(score) == pytest.approx(float(again), abs=2e-3)
        assert [float(x) for x in box.split()] == pytest.approx([float(x) for x in moved.split()], abs=0.11)


def test_an_interrupted_prediction_keeps_what_it_has(coco, weights, tmp_path, monkeypatch, capsys):
    def interrupted(frames):
        for count, frame in enumerate(frames):
            if count == 2:
                raise KeyboardInterrupt
            yield frame

    monkeypatch.setattr(
        'detection.tools.predict.frames_of_images', lambda images: interrupted(frames_of_images(images))
    )
    files = ['--csv', tmp_path / 'found.csv', '--json', tmp_path / 'found.json']
    arguments = ['predict', coco / 'val', '--resume', weights, '--score', '0', '--workers', '0', *files]
    monkeypatch.setattr('sys.argv', list(map(str, arguments)))
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 130
    assert capsys.readouterr().err.endswith('interrupted\n')
    found = COCO(tmp_path / 'found.json')
    assert (len(found.imgs), len(found.anns)) == (2, 2 * 4)
    assert len((tmp_path / 'found.csv').read_text().splitlines()) == 1 + 2 * 4


def test_rows_are_written_as_they_come(tmp_path):
    pixels, box = torch.zeros(3, 9, 9, dtype=torch.uint8), torch.tensor([[1.0, 2, 3, 4]])
    found = Detections(box, torch.tensor([0.9]), torch.tensor([1]), ['=a'], (9, 9))
    with Results(['=a'], tmp_path / 'new' / 'found.csv', tmp_path / 'new' / 'found.json') as results:
        results.add(Frame(Path('a\udce9\x1b.png'), None, pixels), found)
        row = (tmp_path / 'new' / 'found.csv').read_bytes().splitlines()[1]
        assert row == b"a\xe9\x1b.png,,'=a,1,0.9000,1.00,2.00,3.00,4.00"
        assert json.loads((tmp_path / 'new' / 'found.json').read_text())['images'] == []
    assert json.loads((tmp_path / 'new' / 'found.json').read_text())['images'][0]['file_name'] == 'a\udce9\x1b.png'
    with pytest.raises(OutputError), Results(['a'], tmp_path, None):
        pass


def test_names_of_files_need_not_be_unicode(weights, coco, tmp_path):
    name, folder = os.fsdecode(b'caf\xe9'), tmp_path / 'in'
    folder.mkdir()
    shutil.copy(next((coco / 'val').iterdir()), folder / f'{name}.png')
    write_video(folder / f'{name}.avi', 2)
    files = [folder / f'{name}.png', folder / f'{name}.avi']
    lines = predict(*files, '--resume', weights, '--output', tmp_path / 'drawn')
    assert {line.split('\t')[0] for line in lines[:-1]} == {
        f'{folder}/caf\\udce9{end}' for end in ('.png', '.avi:0', '.avi:1')
    }
    assert (tmp_path / 'drawn' / f'{name}.png').exists()
    assert (tmp_path / 'drawn' / f'{name}.mp4').exists()


def write_video(path, frames, size=(96, 64)):
    writer = cv2.VideoWriter(os.fsencode(path), cv2.VideoWriter_fourcc(*'MJPG'), 10, size)
    for number in range(frames):
        writer.write(np.full((*size[::-1], 3), 40 * number, np.uint8))
    writer.release()


def test_videos_are_read_and_drawn_frame_by_frame(weights, tmp_path):
    path = tmp_path / 'film.avi'
    write_video(path, 5)
    flags = ['--resume', weights, '--output', tmp_path / 'drawn', '--csv', tmp_path / 'found.csv', '--batch-size', '2']
    lines = predict(path, *flags)
    with (tmp_path / 'found.csv').open() as file:
        frames = [int(row['frame']) for row in csv.DictReader(file)]
    assert sorted(set(frames)) == list(range(5))
    assert frames == sorted(frames)
    assert lines[0].startswith(f'{path}:0\t')
    video = cv2.VideoCapture(str(tmp_path / 'drawn' / 'film.mp4'))
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    shown = []
    while (frame := video.read())[0]:
        shown.append(frame[1])
    assert len(shown) == 5
    assert shown[0].shape == (6 * 64, 6 * 96, 3)  # enlarged, so that names are legible
    assert np.median(shown[4]) > 120 > np.median(shown[0])
    assert {line.split('\t')[0] for line in predict(path, '--resume', weights, '--limit', '2')} == {
        f'{path}:0', f'{path}:1'
    }  # fmt: skip
    drawn = tmp_path / 'drawn' / 'film.mp4'
    done = run_here(*PROGRAM, drawn, '--resume', weights, '--output', drawn.parent)
    assert (done.returncode, f'{drawn} would be overwritten' in done.stderr) == (1, True)
    bad = tmp_path / 'bad.mp4'
    bad.write_bytes(b'no video')
    done = run_here(*PROGRAM, bad, path, '--resume', weights, '--csv', tmp_path / 'again.csv', '--score', '0')
    assert done.returncode == 3
    assert f'error: video {bad} cannot be read\nerror: 1 of 2 images cannot be read' in done.stderr
    assert f'{path},0,' in (tmp_path / 'again.csv').read_text()


def test_drawn_videos_play_in_browsers(tmp_path):
    """H.264 in 4:2:0 with the index in front, of even sizes; the frame rate is exact, also of NTSC."""
    path = tmp_path / 'new' / 'film.mp4'
    writer = VideoWriter(path, 29.97002997)
    for number in range(4):
        writer.write(np.full((33, 65, 3), (250, 60 * number, 0), np.uint8))
    writer.close()
    content = path.read_bytes()
    assert 0 < content.index(b'moov') < content.index(b'mdat')
    with av.open(path) as video:
        (stream,) = video.streams
        assert (stream.codec.name, stream.pix_fmt, stream.average_rate) == ('h264', 'yuv420p', Fraction(30000, 1001))
        frames = [frame.to_ndarray(format='rgb24') for frame in video.decode(video=0)]
    assert [frame.shape for frame in frames] == [(34, 66, 3)] * 4
    for number, frame in enumerate(frames):
        assert np.abs(frame.reshape(-1, 3).mean(axis=0) - (250, 60 * number, 0)).max() < 12
    with pytest.raises(OutputError, match='film.mp4'):
        VideoWriter(path / 'film.mp4', 25).write(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize('fps', [0.0, -1.0, float('nan'), float('inf')])
def test_frame_rates_that_no_video_has_become_25(fps, tmp_path, monkeypatch):
    monkeypatch.setattr('detection.frames.cv2.VideoCapture', lambda path: Namespace(get=lambda key: fps))
    assert Video(tmp_path / 'film.mp4').fps == 25


def test_videos_are_turned_upright(tmp_path):
    writer = VideoWriter(tmp_path / 'film.mp4', 10)
    writer.write(np.zeros((32, 64, 3), np.uint8))
    writer.close()
    content = bytearray((tmp_path / 'film.mp4').read_bytes())
    matrix = content.index(b'tkhd') + 44  # of the track's header, as a phone writes it
    content[matrix : matrix + 36] = struct.pack('>9i', 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    (tmp_path / 'film.mp4').write_bytes(content)
    (frame,) = Video(tmp_path / 'film.mp4')
    assert frame.pixels.shape == (3, 64, 32)


def test_drawing_a_video_without_pyav_is_refused(weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'av', None)
    write_video(tmp_path / 'film.avi', 1)
    line = error_line(*PROGRAM, tmp_path / 'film.avi', '--resume', weights, '--output', tmp_path / 'drawn')
    assert 'needs PyAV: pip install av' in line
