"""What the CPU tests show, on a GPU."""

import pytest
import torch
import torch.nn.functional as F

import main as program
from models import MSGTransformer, build_model
from precision import Precision
from tests.fill import fill_, golden, images, labels
from tests.test_training import PLAIN, folder_of, records
from utils import load_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device'),
]


@pytest.fixture(autouse=True)
def full_precision():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize('version', ['v1', 'v2'])
def test_recorded_outputs_loss_and_gradients(version):
    record = golden(version)['tiny']
    types = {'embed_type': 'overlap', 'merge_type': 'overlap'} if version == 'v2' else {}
    model = fill_(MSGTransformer(drop_path_rate=0.0, **record['kwargs'], **types)).cuda()
    x, target = images(2, 224).cuda(), labels(2, 1000).cuda()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            logits = model(x)
        torch.testing.assert_close(logits[:, :10].cpu(), torch.tensor(record['logits']), rtol=1e-4, atol=1e-4)
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    assert loss.item() == pytest.approx(record['loss'], rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(record['grad_norm'][name], rel=5e-3, abs=1e-5), name


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_mixed_precision_is_near_fp32(dtype):
    model = fill_(MSGTransformer()).cuda().eval()
    x = images(2, 224).cuda()
    with torch.no_grad():
        plain = model(x)
        with Precision('O1', dtype, torch.device('cuda')).autocast():
            low = model(x).float()
    assert (low - plain).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize('level', ['O0', 'O1'])
def test_training_evaluation_and_resume(tiny_config, image_tree, level):
    options = {'DEVICE': 'cuda', 'AMP_OPT_LEVEL': level, 'DATA__DATA_PATH': str(image_tree), **PLAIN}
    config = tiny_config(TRAIN__EPOCHS='8', TRAIN__BASE_LR='0.5', DATA__NUM_WORKERS='2', **options)
    program.main(config)
    losses = [record['train_loss'] for record in records(config, 'epoch')]
    assert losses[-1] < 0.6 * losses[0]
    last = folder_of(config) / 'ckpt_epoch_7.pth'
    program.main(tiny_config(EVAL_MODE='True', MODEL__RESUME=str(last), **options))
    assert load_checkpoint(last)['model'].keys() == build_model(config).state_dict().keys()
