"""Window attention, written out: what each path of `models.attention` is compared with."""

import torch


def written_out(qkv, bias, scale):
    """softmax(scale q k^T + bias) v, in double precision; arguments as of `models.attention.attend`."""
    windows, N, channels = qkv.shape
    q, k, v = qkv.double().view(windows, N, 3, bias.shape[1], -1).permute(2, 0, 3, 1, 4)
    weights = (scale * q @ k.transpose(-2, -1) + bias.double()).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).reshape(windows, N, channels // 3)


def relative_errors(function, windows, N, heads, head_channels, dtype=torch.float32, device='cpu'):
    """Of output and gradients for qkv and bias, against `written_out`: norms of differences over norms."""
    generator = torch.Generator(device).manual_seed(windows)
    shape, scale = (windows, N, 3 * heads * head_channels), head_channels**-0.5
    qkv = torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
    bias = torch.randn((1, heads, N, N), generator=generator, device=device).requires_grad_()
    out = function(qkv, bias, scale)
    direction = torch.randn(out.shape, generator=generator, device=device).to(dtype)
    exact = written_out(qkv, bias, scale)
    ours = (out, *torch.autograd.grad(out, (qkv, bias), direction))
    theirs = (exact, *torch.autograd.grad(exact, (qkv, bias), direction.double()))
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True)]
