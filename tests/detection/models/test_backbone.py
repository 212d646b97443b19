"""The classifier's network as a backbone."""

import pytest
import torch

from detection.models.backbone import MSGBackbone
from models import MSGTransformer
from tests.helpers.golden import V2, fill_, images

SMALL = {'embed_dim': 16, 'depths': (1, 1, 2, 1), 'num_heads': (1, 2, 4, 8)}


@pytest.mark.parametrize('version', [{}, V2], ids=['v1', 'v2'])
@pytest.mark.parametrize('training', [False, True])
def test_feature_maps_are_the_normed_maps_of_the_classifier(version, training):
    options = SMALL | version | {'drop_path_rate': 0.3}
    classifier, backbone = fill_(MSGTransformer(**options)), MSGBackbone(**options)
    missing = backbone.load_state_dict(classifier.state_dict(), strict=False)
    assert all(name.startswith('out_norms.') for name in missing.missing_keys)
    assert missing.unexpected_keys == ['head.weight', 'head.bias']
    for model in (classifier, backbone):
        model.train(training)
    for batch in (images(2, 224), images(2, 224)[:, :, :100, :150]):
        torch.manual_seed(3)
        expected = classifier.forward_intermediates(batch, intermediates_only=True)
        torch.manual_seed(3)
        maps = backbone(batch)
        assert list(maps) == ['0', '1', '2', '3']
        norms = (*backbone.out_norms, classifier.norm)
        for x, norm, channels, normed in zip(expected, norms, backbone.out_channels, maps.values(), strict=True):
            assert normed.shape[1] == channels
            assert normed.is_contiguous()
            assert torch.equal(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), normed)


def test_windows_and_regions_are_as_given_for_every_size():
    blocks = [layer.blocks[0] for layer in MSGBackbone(**SMALL, shuffle_size=(4, 4, 2, 2)).layers]
    assert [block.shuffle_size for block in blocks] == [4, 4, 2, 2]
    assert [block.window_size for block in blocks] == [7, 7, 7, 7]


@pytest.mark.parametrize('manip_type', ['shuf', ['mix', 'global', 'attention', 'attention']])
def test_every_parameter_gets_a_gradient(manip_type):
    """DDP waits for them. Nothing reads the exchange after the last feature map: its gradients are zero."""
    backbone = fill_(MSGBackbone(**SMALL, shuffle_size=(2, 2, 2, 2), manip_type=manip_type)).train()
    sum(level.square().mean() for level in backbone(images(2, 224)[:, :, :124, :72]).values()).backward()
    for name, parameter in backbone.named_parameters():
        norm = parameter.grad.norm()
        if name.startswith('layers.3.blocks.0.exchange.'):
            assert norm == 0, name
        else:
            assert name.endswith(('rel_pos_msg', 'qkv.bias')) or 0 < norm < float('inf'), name  # two are noise
