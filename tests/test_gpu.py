"""What the CPU tests show, on a GPU."""

import copy

import pytest
import torch
import torch.nn.functional as F

import detection.main as detection_program
import main as program
from data.device_copies import DeviceCopies
from engine.checkpoint import load_checkpoint
from engine.precision import Precision, build_precision, import_apex_amp
from engine.trainer import Trainer
from engine.weights import hash_weights
from models import MSGTransformer, attention, build_model
from models.attention import attend, choose_path
from models.exchange import EXCHANGES
from tests.helpers.attention import relative_errors
from tests.helpers.coco_data import write_coco
from tests.helpers.detectors import tiny_detector
from tests.helpers.extensions import forgotten_modules
from tests.helpers.golden import fill_, golden, images, labels, micro, normal
from tests.helpers.recipes import RECIPES, options_of, train_and_resume
from tests.helpers.runs import PLAIN, RANDOM, differences, folder_of, last_checkpoint, records
from tools.benchmark.cases import Setting
from tools.benchmark.classifiers import ClassifierCase
from tools.benchmark.timing import time_interleaved
from utils import set_backend_flags

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


@pytest.mark.parametrize('shape', [(64, 50, 3, 32), (70_001, 50, 2, 32), (5, 10, 2, 24), (9, 64, 1, 64)])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_attention_kernel_equals_the_formula(shape, dtype):
    def kernel(qkv, bias, scale):
        assert choose_path(qkv, bias, 0.0, False) == 'kernel'
        return attend(qkv, bias, scale)

    assert max(relative_errors(kernel, *shape, dtype, 'cuda')) < (2e-3 if dtype is torch.float16 else 1.2e-2)


@pytest.mark.parametrize('shape', [(64, 145, 3, 32), (70_001, 50, 2, 32), (6, 64, 2, 32), (4, 576, 2, 32)])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_paths_without_the_kernel_equal_the_formula(monkeypatch, shape, dtype):
    """Larger windows, more of them than PyTorch's kernels take, and window sizes 8 and 24 without MSG tokens."""
    monkeypatch.setattr(attention, 'MAX_TOKENS', 0)
    assert max(relative_errors(attend, *shape, dtype, 'cuda')) < (2e-3 if dtype is torch.float16 else 1.2e-2)


@pytest.mark.parametrize('name', EXCHANGES)
def test_exchanges_equal_those_on_the_cpu(name):
    """Outputs and gradients, on a grid whose border cuts regions."""
    results = []
    for device in ('cpu', 'cuda'):
        exchange = fill_(EXCHANGES[name](48, 2)).to(device)
        msg = normal('msg', (2, 5, 3, 48)).to(device).requires_grad_()
        exchanged = exchange(msg)
        exchanged.square().sum().backward()
        gradients = [parameter.grad for parameter in exchange.parameters()]
        results.append([tensor.cpu() for tensor in (exchanged, msg.grad, *gradients)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('exchange', ['shuf', ['mix', 'attention', 'global']])
@pytest.mark.parametrize('compile_mode', ['compiled', 'graphs'])
@pytest.mark.parametrize('mode', ['inference', 'train'])
def test_compiled_cases_equal_eager_ones_and_are_measured(mode, compile_mode, exchange):
    network, device = fill_(micro(manip_type=exchange)), torch.device('cuda')
    settings = [Setting(mode, compile_mode=x, size=56) for x in ('eager', compile_mode)]
    eager, compiled = (ClassifierCase(copy.deepcopy(network), setting, device) for setting in settings)
    compiled.images, compiled.targets = eager.images, eager.targets
    for _ in range(3):  # updates, or the same logits
        torch.testing.assert_close(compiled(), eager(), rtol=1e-3, atol=1e-3)
    allocated = compiled.peak_memory() - compiled.resident_bytes()
    assert allocated > 0 or (mode, compile_mode) == ('inference', 'graphs')  # graphs have memory pools of their own
    times = time_interleaved({'compiled': compiled}, 3, device)['compiled']
    assert len(times) == 3


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


@pytest.fixture
def deterministic():
    yield {'DEVICE': 'cuda', 'DETERMINISTIC': 'True', 'SAVE_STEPS': '2', 'SAVE_KEEP': '0', **RANDOM}
    set_backend_flags(tf32=False, deterministic=False)


@pytest.mark.parametrize('level', ['O0', 'O1'])
def test_resumed_run_ends_with_the_same_bits(tiny_config, image_tree, deterministic, level):
    options = {'AMP_OPT_LEVEL': level, 'AMP_BACKEND': 'native', 'DATA__DATA_PATH': str(image_tree), **deterministic}
    whole = tiny_config(TAG='whole', **options)
    program.main(whole)
    start = folder_of(whole) / 'ckpt_epoch_1_step_4.pth'
    again = tiny_config(TAG='again', MODEL__RESUME=str(start), DATA__NUM_WORKERS='2', **options)
    program.main(again)
    assert differences(last_checkpoint(whole), last_checkpoint(again)) == []


@pytest.mark.parametrize('recipe', RECIPES)
def test_recipes_resume_bit_for_bit(tiny_config, image_tree, deterministic, recipe):
    if recipe == 'albumentations':
        pytest.importorskip('albumentations')
    options = {'DATA__DATA_PATH': str(image_tree)} | deterministic | options_of(recipe, image_tree)
    with forgotten_modules():
        whole, resumed = train_and_resume(tiny_config, **options)
    assert differences(last_checkpoint(whole), last_checkpoint(resumed)) == []


@pytest.mark.parametrize('options', [{}, {'IMG_SIZES': '[28, 42]', 'IMG_SIZE_EPOCHS': '[0, 1]'}])
def test_training_with_cuda_graphs(tiny_config, image_tree, options):
    options = {f'DATA__{key}': value for key, value in options.items()} | PLAIN
    options |= {'DEVICE': 'cuda', 'AMP_OPT_LEVEL': 'O0', 'DATA__DATA_PATH': str(image_tree), 'TRAIN__EPOCHS': '2'}
    losses = []
    for compiles in ('False', 'True'):
        config = tiny_config(TAG=compiles, TRAIN__COMPILE=compiles, COMPILE_MODE='reduce-overhead', **options)
        program.main(config)
        losses.append([record['train_loss'] for record in records(config, 'epoch')])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize('level', ['O0', 'O1'])
def test_a_detector_trains_evaluates_and_resumes(tmp_path, level):
    options = ['OUTPUT', str(tmp_path), 'DATA.DATA_PATH', str(write_coco(tmp_path / 'coco')), 'DEVICE', 'cuda']
    options += ['AMP_OPT_LEVEL', level, 'SAVE_STEPS', '2', 'SAVE_KEEP', '0', 'MODEL.BOX.SCORE', '0.0']
    whole = tiny_detector(*options, 'TAG', 'whole')
    detection_program.main(whole)
    start = folder_of(whole) / 'ckpt_epoch_1_step_2.pth'
    detection_program.main(tiny_detector(*options, 'TAG', 'again', 'MODEL.RESUME', str(start)))
    again = tiny_detector(*options, 'TAG', 'again')
    for one, two in zip(records(whole, 'epoch')[-1:], records(again, 'epoch')[-1:], strict=True):
        assert two['train_loss'] == pytest.approx(one['train_loss'], rel=0.05)
    detection_program.main(
        tiny_detector(
            *options, 'TAG', 'eval', 'EVAL_MODE', 'True', 'MODEL.RESUME', str(folder_of(again) / 'ckpt_epoch_1.pth')
        )
    )
    folder = folder_of(tiny_detector(*options, 'TAG', 'eval'))
    assert 'box AP' in (folder / 'log_rank0.txt').read_text()


@pytest.mark.skipif(import_apex_amp() is None, reason='NVIDIA Apex with its amp is not installed')
@pytest.mark.parametrize('level', ['O1', 'O2'])
def test_apex_trains_saves_and_resumes(tiny_config, image_tree, level):
    options = {'DEVICE': 'cuda', 'AMP_OPT_LEVEL': level, 'AMP_BACKEND': 'apex', 'DATA__DATA_PATH': str(image_tree)}
    config = tiny_config(TRAIN__EPOCHS='8', TRAIN__BASE_LR='0.5', **options, **PLAIN)
    assert str(build_precision(config, torch.device('cuda'))) == f'Apex {level}'
    program.main(config)
    losses = [record['train_loss'] for record in records(config, 'epoch')]
    assert losses[-1] < 0.6 * losses[0]
    for name in ('ckpt_epoch_7.pth', 'ckpt_best.pth'):  # which may be as new
        (folder_of(config) / name).unlink()
    program.main(config)
    assert 'loss_scaler0' in load_checkpoint(folder_of(config) / 'ckpt_epoch_7.pth')['precision']['amp']


@pytest.mark.parametrize(
    ('dtype', 'optimizer', 'nonfinite'),
    [('bfloat16', 'adamw', 'stop'), ('float16', 'adamw', 'stop'), ('float16', 'sgd', 'skip')],
)
def test_no_update_waits_for_the_gpu(tiny_config, image_tree, monkeypatch, dtype, optimizer, nonfinite):
    """PyTorch raises where an update without a log line makes the host wait."""
    updates = []

    def strict(owner, name):
        function = getattr(owner, name)

        def call(*args):
            if len(updates) > 1:  # before, the optimizer allocates, and cuDNN chooses algorithms
                torch.cuda.set_sync_debug_mode('error')
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode('default')

        monkeypatch.setattr(owner, name, call)

    train_step = Trainer.train_step
    monkeypatch.setattr(Trainer, 'train_step', lambda *args: (updates.append(0), train_step(*args))[1])
    strict(Trainer, 'train_step')
    options = {'DEVICE': 'cuda', 'AMP_OPT_LEVEL': 'O1', 'AMP_BACKEND': 'native', 'AMP_DTYPE': dtype}
    options |= {'TRAIN__OPTIMIZER__NAME': optimizer, 'TRAIN__NONFINITE': nonfinite, 'TRAIN__EMA_DECAY': '0.9'}
    options |= PLAIN | {'AUG__REPROB': '1', 'AUG__REMODE': 'const', 'PRINT_FREQ': '1000'}
    program.main(tiny_config(DATA__DATA_PATH=str(image_tree), **options))
    assert len(updates) > 2


def compute(matrix):
    """Some tenths of a second of work on the current stream."""
    for _ in range(20):
        matrix @ matrix


def test_batches_are_copied_beside_the_work_before():
    device = torch.device('cuda')
    to_device, matrix = DeviceCopies(device), torch.randn(8192, 8192, device=device)
    batch = torch.full((16, 3, 224, 224), 2.0).pin_memory()
    to_device(batch)  # allocates
    compute(matrix)
    torch.cuda.synchronize()
    compute(matrix)
    images = to_device(batch)
    to_device.stream.synchronize()
    assert not torch.cuda.current_stream().query()  # still computing
    assert images.mean().item() == 2


def test_batches_are_read_after_their_copy_and_before_the_next():
    device = torch.device('cuda')
    to_device, matrix = DeviceCopies(device), torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    with torch.cuda.stream(to_device.stream):
        compute(matrix)  # delays the first copy
    means = []
    for number in range(30):
        images, target = to_device(
            [torch.full((16, 3, 224, 224), number).pin_memory(), {'boxes': torch.arange(number)}]
        )
        means.append((images.double().mean(), target['boxes'].sum()))
        del images, target  # their memory is free for the next batch once the sums are there
    assert [(mean.item(), total.item()) for mean, total in means] == [(n, n * (n - 1) // 2) for n in range(30)]


def test_weights_have_the_hash_that_they_have_on_the_cpu():
    weights = {'a': normal('a', (3, 4, 5)), 'b': torch.arange(7, dtype=torch.bfloat16), 'c': torch.tensor(1)}
    weights['d'] = weights['a'].transpose(0, 2)
    assert hash_weights({name: x.cuda() for name, x in weights.items()}) == hash_weights(weights)
