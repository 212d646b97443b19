"""One block of the network in NumPy, written from the paper's description: loops in place of reshapes."""

import math

import numpy as np


def layer_norm(token, weight, bias):
    centred = token - token.mean()
    return centred / math.sqrt((centred**2).mean() + 1e-5) * weight + bias


def gelu(x):
    return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])


def bias_of(query, key, head, w, table, rel_pos_msg):
    """Position bias of token `query` towards token `key`; token 0 is the MSG token."""
    if query == 0:
        return rel_pos_msg[head, 1, 0, 0]
    if key == 0:
        return rel_pos_msg[head, 0, 0, 0]
    query_row, query_column = divmod(query - 1, w)
    key_row, key_column = divmod(key - 1, w)
    row, column = query_row - key_row + w - 1, query_column - key_column + w - 1
    return table[row * (2 * w - 1) + column, head]


def attention(tokens, weights, w, heads):
    """Attention of the N tokens (N, C) of one window."""
    N, C = tokens.shape
    d = C // heads
    qkv = [weights['attn.qkv.weight'] @ token + weights['attn.qkv.bias'] for token in tokens]
    out = np.zeros((N, C))
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        query, key, value = ([x[which * C : (which + 1) * C][part] for x in qkv] for which in range(3))
        for i in range(N):
            scores = np.array(
                [
                    query[i] @ key[j] / math.sqrt(d)
                    + bias_of(i, j, head, w, weights['attn.relative_position_bias_table'], weights['attn.rel_pos_msg'])
                    for j in range(N)
                ]
            )
            share = np.exp(scores - scores.max())
            share /= share.sum()
            for j in range(N):
                out[i, part] += share[j] * value[j]
    return [weights['attn.proj.weight'] @ token + weights['attn.proj.bias'] for token in out]


def shuffle(msg, s):
    """Exchange chunks among the MSG tokens {(row, column): token} of every region of s x s windows."""
    rows, columns = max(r for r, _ in msg) + 1, max(c for _, c in msg) + 1
    new = {}
    for top in range(0, rows, s):
        for left in range(0, columns, s):
            region = [(top + r, left + c) for r in range(s) for c in range(s)]
            for g, place in enumerate(region):
                new[place] = np.concatenate([np.split(msg[other], len(region))[g] for other in region])
    return new


def block(x, weights, w, s, heads):
    """The block on windows x (nH, nW, N, C) of one image, with dropout and drop path off."""
    x = x.copy()
    nH, nW, N, _ = x.shape
    for r in range(nH):
        for c in range(nW):
            tokens = np.array([layer_norm(t, weights['norm1.weight'], weights['norm1.bias']) for t in x[r, c]])
            x[r, c] += attention(tokens, weights, w, heads)
    for place, token in shuffle({(r, c): x[r, c, 0].copy() for r in range(nH) for c in range(nW)}, s).items():
        x[place][0] = token
    for r in range(nH):
        for c in range(nW):
            for n in range(N):
                token = layer_norm(x[r, c, n], weights['norm2.weight'], weights['norm2.bias'])
                hidden = gelu(weights['mlp.fc1.weight'] @ token + weights['mlp.fc1.bias'])
                x[r, c, n] += weights['mlp.fc2.weight'] @ hidden + weights['mlp.fc2.bias']
    return x
