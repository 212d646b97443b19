import pytest
from torch import nn

from config import load_config
from detection.models import build_detector
from engine.config_tree import ConfigError
from models.pyramid import Size
from tests.helpers.detectors import tiny_detector
from tests.helpers.paths import DETECTION_CONFIGS, ROOT
from tools.summary.complexity import (
    count_classifier,
    count_complexity,
    count_detector,
    count_exchanges,
    exchange_table,
)
from tools.tasks import find_task


def count(path):
    task = find_task(path)
    return count_complexity(task, task.tree.load(path))


def test_formula_and_real_operators_differ_by_the_norms():
    counted = count(ROOT / 'configs' / 'msg_tiny_p4_win7_224.yaml')
    assert (counted.parameters, counted.formula) == (28290166, 4588614144)
    # Two norms per token in a block, one in the embedding and in merging
    tokens = [56 * 56 + 64, 28 * 28 + 16, 14 * 14 + 4, 49 + 1]
    norms = sum(2 * depth * t * 96 * 2**i for i, (depth, t) in enumerate(zip((2, 2, 6, 2), tokens, strict=True)))
    norms += 56 * 56 * 96 + sum(t * 96 * 2**i for i, t in enumerate(tokens[:3])) + 768 * 50
    assert counted.formula - counted.measured == norms
    other = count_classifier(load_config(ROOT / 'configs' / 'msg_tiny_p4_win7_224.yaml'), Size(224, 448))
    assert (other.image, other.parameters) == ('224 x 448', counted.parameters)
    assert 1.9 * counted.measured < other.measured < 2.1 * counted.measured


@pytest.mark.parametrize(
    ('name', 'parameters', 'published', 'tolerance'),
    [
        ('tiny', 85_631_616, 747.64e9, 0.005e9),
        pytest.param('small', 106_949_808, 841.88e9, 0.005e9, marks=pytest.mark.slow),
        pytest.param('base', 144_979_802, 989.65e9, 0.005e9, marks=pytest.mark.slow),
        ('v2_tiny', 82.56e6, 730.63e9, 0.005e9),
        pytest.param('v2_small', 113.31e6, 830.82e9, 0.005e9, marks=pytest.mark.slow),
        pytest.param('v2_base', 141.73e6, 956.48e9, 0.007e9, marks=pytest.mark.slow),
    ],
)
def test_published_counts_of_detectors(monkeypatch, name, parameters, published, tolerance):
    """The published ones have two operations per value of a norm, one per bias of the pyramid and the heads."""
    added = {'norms': 0, 'biases': 0}

    def add(kind, times):
        def hook(module, inputs, output):
            added[kind] += times * output.numel()

        return hook

    def build_with_hooks(config):
        model = build_detector(config)
        for path, module in model.named_modules():
            if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
                # A block has two norms of the same tokens; here, the first one also norms the padding.
                times = {'norm1': 0, 'norm2': 2}.get(path.split('.')[-1], 1)
                module.register_forward_hook(add('norms', times))
            elif path.startswith(('backbone.fpn', 'roi_heads')) and getattr(module, 'bias', None) is not None:
                module.register_forward_hook(add('biases', 1))
        return model

    monkeypatch.setattr('tools.summary.complexity.build_detector', build_with_hooks)
    counted = count(DETECTION_CONFIGS / f'cascade_mask_rcnn_msg_{name}_3x.yaml')
    if isinstance(parameters, int):
        assert counted.parameters == parameters
    else:
        assert counted.parameters == pytest.approx(parameters, abs=0.005e6)
    assert counted.formula is None
    assert counted.measured == pytest.approx(published, rel=1e-3)
    assert counted.measured + 2 * added['norms'] + added['biases'] == pytest.approx(published, abs=tolerance)


@pytest.mark.slow
def test_the_documented_table_of_exchanges_is_the_one_that_is_printed():
    counts = count_exchanges(load_config(ROOT / 'configs' / 'msg_tiny_p4_win7_224.yaml'))
    documented = (ROOT / 'docs' / 'exchange.md').read_text()
    rows = [row for row in exchange_table(counts).splitlines() if row in documented]
    assert len(rows) == 2 + 7  # a test may have registered another
    plain = counts['none']
    for name, count in counts.items():
        assert count.formula - plain.formula == count.measured - plain.measured, name


def test_configs_that_inherit_their_type_from_a_base_are_counted(tmp_path):
    for base, name in (('msg_tiny_p4_win7_224', 'classifier'), ('../detection/configs/digits', 'detector')):
        path = tmp_path / f'{name}.yaml'
        path.write_text(f'BASE: [{ROOT}/configs/{base}.yaml]\nMODEL: {{NAME: {name}}}\n')
        counted = count(path)
        assert (counted.name, counted.formula is None) == (name, name == 'detector')
    path.write_text('MODEL: {TYPE: cascade_rcnn, NUM_CLASES: 3}\n')
    with pytest.raises(ConfigError, match='did you mean MODEL.NUM_CLASSES'):
        count(path)


def test_networks_of_timm_are_measured(tmp_path):
    path = tmp_path / 'swin.yaml'
    path.write_text(
        f'BASE: [{ROOT}/configs/msg_tiny_p4_win7_224.yaml]\n'
        'MODEL: {TYPE: timm:swin_tiny_patch4_window7_224, NAME: swin}\n'
    )
    counted = count(path)
    assert (counted.parameters, counted.formula) == (28_288_354, None)
    blocks = sum(  # windows of 49 patches, which tile every stage
        depth * H * H * C * (12 * C + 2 * 49) for depth, H, C in ((2, 56, 96), (2, 28, 192), (6, 14, 384), (2, 7, 768))
    )
    merging = sum(H * H * 4 * C * 2 * C for H, C in ((28, 96), (14, 192), (7, 384)))
    assert counted.measured == 56 * 56 * 96 * 48 + blocks + merging + 768 * 1000


def test_multiply_adds_per_roi():
    config = tiny_detector()
    none, boxes, both = (count_detector(config, 64, 64, *n).measured for n in ((0, 0), (10, 0), (10, 10)))
    box_head = 7 * 7 * 9 * 16 * 16 + 7 * 7 * 16 * 32 + 32 * (4 + 12)
    mask_head = 14 * 14 * 9 * 16 * 16 + 14 * 14 * 16 * 16 * 4 + 28 * 28 * 16 * 3
    assert (boxes - none, both - boxes) == (3 * 10 * box_head, 3 * 10 * mask_head)
