"""A slow, plain PyTorch statement of the method, for comparing with on any small LLaMA, OPT or Gemma checkpoint.

    python slow_reference.py --ckpt DIR --ids calibration.npy --samples 8 --length 64 --method wanda --rebuild \
        --granularity output1 --alpha 0.1 --metric wd --out masks.npz
    python slow_reference.py --check ORACLE_DIR          # every case in its cases.json

Needs torch, transformers, safetensors, numpy. float32, one sample at a time where gradients are taken, host loops
over outputs: it is meant to be read and to be right, not to be fast.
"""

import argparse
import copy
import json

import numpy as np
import torch
from transformers import AutoModelForCausalLM


class Family:
    """What differs between LLaMA, OPT and Gemma: where the blocks are and how a sub-block is called."""

    def __init__(self, model, ids):
        L = ids.shape[1]
        causal = torch.full((L, L), float("-inf")).triu(1)[None, None]
        if model.config.model_type == "opt":
            dec = model.model.decoder
            self.prefix, self.blocks = "model.decoder.layers", dec.layers
            self.hidden = dec.embed_tokens(ids) + dec.embed_positions.weight[torch.arange(L) + 2][None]
            self.subs = [
                (
                    "self_attn",
                    ["q_proj", "k_proj", "v_proj", "out_proj"],
                    "self_attn_layer_norm",
                    lambda b, x: b.self_attn(hidden_states=x, attention_mask=causal)[0],
                ),
                ("", ["fc1", "fc2"], "final_layer_norm", lambda b, x: b.fc2(b.activation_fn(b.fc1(x)))),
            ]
        elif model.config.model_type in ("gemma2", "gemma3_text"):
            inner, kinds = model.model, model.config.layer_types
            self.prefix, self.blocks = "model.layers", inner.layers
            self.hidden, steps = inner.embed_tokens(ids), torch.arange(L)[None]
            # A window's mask hides what is further back; each kind of block has a mask and, in Gemma 3, a rotation.
            far = torch.full((L, L), float("-inf")).tril(-model.config.sliding_window)[None, None]
            masks = {"full_attention": causal, "sliding_attention": causal + far}
            kind_alone = (lambda kind: (kind,)) if model.config.model_type == "gemma3_text" else lambda kind: ()
            ropes = {kind: inner.rotary_emb(self.hidden[:1], steps, *kind_alone(kind)) for kind in set(kinds)}

            def attention(b, x):
                kind = kinds[b.self_attn.layer_idx]
                y = b.self_attn(hidden_states=x, position_embeddings=ropes[kind], attention_mask=masks[kind])[0]
                return b.post_attention_layernorm(y)

            self.subs = [
                ("self_attn", ["q_proj", "k_proj", "v_proj", "o_proj"], "input_layernorm", attention),
                (
                    "mlp",
                    ["gate_proj", "up_proj", "down_proj"],
                    "pre_feedforward_layernorm",
                    lambda b, x: b.post_feedforward_layernorm(b.mlp(x)),
                ),
            ]
        else:
            inner = model.model
            self.prefix, self.blocks = "model.layers", inner.layers
            self.hidden = inner.embed_tokens(ids)
            rope = inner.rotary_emb(self.hidden[:1], torch.arange(L)[None])
            self.subs = [
                (
                    "self_attn",
                    ["q_proj", "k_proj", "v_proj", "o_proj"],
                    "input_layernorm",
                    lambda b, x: b.self_attn(hidden_states=x, position_embeddings=rope, attention_mask=causal)[0],
                ),
                ("mlp", ["gate_proj", "up_proj", "down_proj"], "post_attention_layernorm", lambda b, x: b.mlp(x)),
            ]

    def linear(self, block, key):
        sub, name = key
        return getattr(getattr(block, sub) if sub else block, name)

    def run(self, block, h):
        for _, _, norm, f in self.subs:
            h = h + f(block, getattr(block, norm)(h))
        return h


def groups(pattern):
    return None if pattern == "unstructured" else tuple(map(int, pattern.split(":")))


def start_mask(W, X, method, p, pattern):
    """[O, I] kept mask, and the weights that go with it. X: [S, L, I] inputs of this linear on stream A."""
    nm = groups(pattern)
    if method == "sparsegpt":
        return sparsegpt(W, X, p, nm)
    score = W.abs() if method == "magnitude" else W.abs() * X.pow(2).sum(1).mean(0).sqrt()
    if nm:
        keep, m = nm
        g = score.view(W.shape[0], -1, m)
        drop = torch.argsort(g, dim=2, stable=True)[:, :, : m - keep]
        return torch.ones_like(g, dtype=torch.bool).scatter_(2, drop, False).view_as(W), W
    if method == "magnitude":
        drop = torch.argsort(score.flatten(), stable=True)[: int(W.numel() * p)]
        return torch.ones(W.numel(), dtype=torch.bool).scatter_(0, drop, False).view_as(W), W
    drop = torch.argsort(score, dim=1, stable=True)[:, : int(W.shape[1] * p)]
    return torch.ones_like(W, dtype=torch.bool).scatter_(1, drop, False), W


def sparsegpt(W, X, p, nm, width=128):
    W, n = W.clone(), W.shape[1]
    flat = X.reshape(-1, n)
    H = 2.0 / X.shape[0] * flat.T @ flat
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H += 0.01 * H.diagonal().mean() * torch.eye(n)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for a in range(0, n, width):
        b = min(a + width, n)
        block, Ub, err = W[:, a:b].clone(), U[a:b, a:b], torch.zeros(W.shape[0], b - a)
        if nm is None:
            score = block**2 / Ub.diagonal() ** 2
            drop = score <= score.flatten().sort()[0][int(score.numel() * p)]
        else:
            drop = torch.zeros_like(block, dtype=torch.bool)
        for i in range(b - a):
            if nm and i % nm[1] == 0:
                score = block[:, i : i + nm[1]] ** 2 / Ub.diagonal()[i : i + nm[1]] ** 2
                drop.scatter_(1, i + torch.topk(score, nm[1] - nm[0], dim=1, largest=False)[1], True)
            w = block[:, i]
            q = torch.where(drop[:, i], 0.0, w)
            err[:, i] = (w - q) / Ub[i, i]
            block[:, i:] -= err[:, i : i + 1] @ Ub[i : i + 1, i:]
            W[:, a + i] = q
        W[:, b:] -= err @ U[a:b, b:]
    return W != 0, W


def swaps(metric, kept, alpha):
    """Flat indices to revive and to prune in one comparison group."""
    pruned, alive = np.nonzero(~kept)[0], np.nonzero(kept)[0]
    up = pruned[np.argsort(-metric[pruned], kind="stable")]
    down = alive[np.argsort(metric[alive], kind="stable")]
    n = min(len(up), len(down))
    R = int((metric[up[:n]] > metric[down[:n]]).sum())
    k = int(np.floor(np.float32(R) * np.float32(alpha)))
    return up[:k], down[:k]


def rebuild_masks(metric, mask, granularity, alpha, pattern):
    keys, nm = list(mask), groups(pattern)
    new = {k: mask[k].numpy().copy() for k in keys}
    met = {k: metric[k].numpy() for k in keys}
    if nm:
        m = nm[1]
        for k in keys:
            old = mask[k].numpy()
            for o in range(old.shape[0]):
                up, _ = swaps(met[k][o], old[o], alpha)
                new[k][o, up] = True
                for g in np.unique(up // m):
                    ix = np.arange(g * m, g * m + m)
                    alive = ix[old[o, ix]]
                    down = alive[np.argsort(met[k][o, alive], kind="stable")][: int((up // m == g).sum())]
                    new[k][o, down] = False
    elif granularity == "block":
        flat = np.concatenate([new[k].ravel() for k in keys])
        up, down = swaps(np.concatenate([met[k].ravel() for k in keys]), flat.copy(), alpha)
        flat[up], flat[down] = True, False
        at = 0
        for k in keys:
            new[k] = flat[at : at + new[k].size].reshape(new[k].shape)
            at += new[k].size
    else:
        for k in keys:
            a, g = new[k], met[k]
            if granularity == "layer":
                a, g = a.reshape(1, -1), g.reshape(1, -1)
            elif granularity == "input1":
                a, g = a.T, g.T
            for row in range(a.shape[0]):
                up, down = swaps(g[row], a[row].copy(), alpha)
                a[row, up], a[row, down] = True, False
    return {k: torch.from_numpy(new[k]) for k in keys}


def prune(
    model,
    ids,
    method="wanda",
    sparsity=0.5,
    pattern="unstructured",
    rebuild=True,
    granularity="output1",
    alpha=0.1,
    metric="wd",
    retain=False,
):
    """Hugging Face name -> bool [O, I] kept mask. ids: int64 [S, L]."""
    model = copy.deepcopy(model)
    fam, S, masks = Family(model, ids), ids.shape[0], {}
    A = B = fam.hidden
    for i, block in enumerate(fam.blocks):
        keys = [(s, n) for s, ns, _, _ in fam.subs for n in ns]
        lin = {k: fam.linear(block, k) for k in keys}
        dense = {k: lin[k].weight.data.clone() for k in keys}
        X = {}
        hooks = [lin[k].register_forward_hook(lambda _, inp, __, k=k: X.__setitem__(k, inp[0].clone())) for k in keys]
        fam.run(block, A)
        for h in hooks:
            h.remove()
        start = {k: start_mask(dense[k], X[k], method, sparsity, pattern) for k in keys}
        mask, weight = {k: v[0] for k, v in start.items()}, {k: v[1] for k, v in start.items()}

        def put(ks, w):
            for k in ks:
                lin[k].weight.data = w[k] * mask[k]

        put(keys, weight)
        A_next = fam.run(block, A)
        if rebuild:
            for s, ns, norm, f in fam.subs:
                ks = [(s, n) for n in ns]
                x = getattr(block, norm)(B)
                target = f(block, x)
                for k in ks:
                    lin[k].weight.data = dense[k].clone()
                    lin[k].weight.requires_grad_(True)
                square = {k: torch.zeros_like(dense[k]) for k in ks}
                for j in range(S):
                    loss = (f(block, x[j : j + 1]) - target[j : j + 1]).pow(2).mean()
                    for k, g in zip(ks, torch.autograd.grad(loss, [lin[k].weight for k in ks])):
                        square[k] += g.pow(2) / S
                for k in ks:
                    lin[k].weight.requires_grad_(False)
                base = {k: torch.where(mask[k], weight[k], dense[k]) if retain else dense[k] for k in ks}
                score = {
                    k: {"wd": base[k].abs() * square[k].sqrt(), "w": base[k].abs(), "d": square[k].sqrt()}[metric]
                    for k in ks
                }
                mask |= rebuild_masks(score, {k: mask[k] for k in ks}, granularity, alpha, pattern)
                put(ks, base)
                B = B + f(block, x)
        A = A_next
        for s, n in keys:
            masks[f"{fam.prefix}.{i}.{s + '.' if s else ''}{n}.weight"] = mask[(s, n)].numpy()
    return masks


def load(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    return model.requires_grad_(False)


def check(folder):
    cases, model = json.load(open(f"{folder}/cases.json")), load(folder)
    ids = torch.from_numpy(np.load(f"{folder}/calibration_ids.npy")).long()
    for c in cases["cases"]:
        got = prune(
            model,
            ids,
            c["method"],
            c["ratio"],
            c["type"],
            c["barber"],
            c["gran"],
            c["thr"],
            c["metric"].lower(),
            c["retain"],
        )
        ref = np.load(f"{folder}/{c['masks']}")
        agree = {k: float((np.unpackbits(ref[k])[: v.size] == v.ravel()).mean()) for k, v in got.items()}
        worst = min(agree, key=agree.get)
        print(
            f"{c['masks']} {c['method']:9s} {c['type']:12s} rebuild={c['barber']!s:5s} {c['gran']:7s} {c['metric']} "
            f"retain={c['retain']!s:5s} worst {agree[worst]:.5f} {worst}"
        )


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check")
    p.add_argument("--ckpt")
    p.add_argument("--ids")
    p.add_argument("--samples", type=int, default=8)
    p.add_argument("--length", type=int, default=64)
    p.add_argument("--method", default="wanda")
    p.add_argument("--sparsity", type=float, default=0.5)
    p.add_argument("--pattern", default="unstructured")
    p.add_argument("--rebuild", action="store_true")
    p.add_argument("--granularity", default="output1")
    p.add_argument("--alpha", type=float, default=0.1)
    p.add_argument("--metric", default="wd")
    p.add_argument("--retain", action="store_true")
    p.add_argument("--out", default="masks.npz")
    a = p.parse_args()
    if a.check:
        check(a.check)
    else:
        ids = torch.from_numpy(np.load(a.ids)[: a.samples, : a.length]).long()
        got = prune(
            load(a.ckpt), ids, a.method, a.sparsity, a.pattern, a.rebuild, a.granularity, a.alpha, a.metric, a.retain
        )
        np.savez_compressed(a.out, **{k: np.packbits(v) for k, v in got.items()})
