#!/usr/bin/env python3
"""Perplexity of masked dense models in PyTorch, to compare the engine with: nothing is folded, no weight is skipped.

    dev/simulate.py MODEL --calib TEXT --file TEXT [--sparsity 0.5] [--chunks 40] [--draw SEED] [--rows NAME...]

The same function as `larosa sparsify MODEL -o OUT --preset paper --form simulate --sparsity S --calib TEXT` and
`larosa perplexity OUT -f TEXT -c 1024` (row `after-gain`), computed by transformers in float32. Both read the same
calibration windows unless --draw asks for random ones. --sparsity counts activation entries, as the paper does:
its sites get 0.8 s, 1.2 s, 0.8 s and 1.2 s, which at 0.5 is --sparsity 0.46875 of mix-88m's weights.

Needs torch, transformers and safetensors (CPU).
"""

import argparse
import contextlib
import math
import pathlib

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOWS = 16  # that calibrate
SITE_SCALE = (0.8, 1.2, 0.8, 1.2)  # of h1, h2, h3, h4

# name: (scale of each site's sparsity, site whose moments give the basis of h1, of h3, the moments' activation).
# "gained": the basis and the selection act after the norm's gain; "bare": before it, as folding demands.
ROWS = {
    "dense": None,
    "top-k": (SITE_SCALE, None, None, "gained"),
    "after-gain": (SITE_SCALE, "h1", "h1", "gained"),
    "before-gain": (SITE_SCALE, "h1", "h1", "bare"),
    "pooled": (SITE_SCALE, "pooled", "pooled", "bare"),
    "separate": (SITE_SCALE, "h1", "h3", "bare"),
}


def thin(x, sparsity, basis):
    """Keeps the round(D (1 - sparsity)) largest entries of each row of x (.., D), in the basis if there is one."""
    y = x if basis is None else x @ basis
    keep = y.abs().topk(round(y.shape[-1] * (1 - sparsity)), -1).indices
    y = torch.zeros_like(y).scatter_(-1, keep, y.gather(-1, keep))
    return y if basis is None else y @ basis.T


def normalised(norm, x):
    """What an RMSNorm makes of x before its gain."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


@contextlib.contextmanager
def hooked(handles):
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def site_norms(layer):
    return {"h1": layer.input_layernorm, "h3": layer.post_attention_layernorm}


@torch.no_grad()
def second_moments(model, windows):
    """{(layer, site, "gained" or "bare"): sum of xᵀx in float64} of the dense model; "pooled" is h1 + h3."""
    sums = {}

    def observe(l, site):
        def hook(norm, arguments, gained):
            for kind, x in (("gained", gained), ("bare", normalised(norm, arguments[0]))):
                x = x.flatten(0, -2).double()
                key = (l, site, kind)
                sums[key] = sums.get(key, 0) + x.T @ x
        return hook

    handles = [norm.register_forward_hook(observe(l, site))
               for l, layer in enumerate(model.model.layers) for site, norm in site_norms(layer).items()]
    with hooked(handles):
        for window in windows:
            model.model(window[None])
    for l in range(len(model.model.layers)):
        for kind in ("gained", "bare"):
            sums[l, "pooled", kind] = sums[l, "h1", kind] + sums[l, "h3", kind]
    return sums


def eigenbasis(moment):
    """Eigenvectors in float64, as float32 columns. The method's 1 % on the diagonal moves none of them."""
    return torch.linalg.eigh(moment).eigenvectors.float()


def masks(model, row, sparsity, moments):
    """Hooks that thin all sites of all layers; their handles."""
    if row is None:
        return []
    scale, basis_h1, basis_h3, kind = row
    s = [sparsity * factor for factor in scale]
    handles = []

    def thin_norm(share, basis):
        def hook(norm, arguments, gained):
            if kind == "gained":
                return thin(gained, share, basis)
            return thin(normalised(norm, arguments[0]), share, basis) * norm.weight
        return hook

    for l, layer in enumerate(model.model.layers):
        for site, name, share in (("h1", basis_h1, s[0]), ("h3", basis_h3, s[2])):
            basis = eigenbasis(moments[l, name, kind]) if name else None
            handles.append(site_norms(layer)[site].register_forward_hook(thin_norm(share, basis)))
        for projection, share in ((layer.self_attn.o_proj, s[1]), (layer.mlp.down_proj, s[3])):
            handles.append(projection.register_forward_pre_hook(lambda _, x, share=share: thin(x[0], share, None)))
    return handles


@torch.no_grad()
def log_losses(model, windows):
    """-log p of all tokens of each window but its first."""
    losses = []
    for window in windows:
        logits = model(window[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    return torch.stack(losses)


def encode(tokenizer, path):
    text = path.read_bytes().decode()  # line ends as they are
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def calibration_windows(ids, window, draw):
    """WINDOWS rows of `window` ids: evenly spaced, as larosa's calibration, or random with the seed `draw`."""
    last = len(ids) - window
    if draw is None:
        first = [last * w // (WINDOWS - 1) for w in range(WINDOWS)]
    else:
        first = torch.randint(0, last + 1, (WINDOWS,), generator=torch.Generator().manual_seed(draw)).tolist()
    return torch.stack([ids[i:i + window] for i in first])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--calib", type=pathlib.Path, required=True, help="calibration text")
    parser.add_argument("--file", type=pathlib.Path, required=True, help="text that is scored")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--chunks", type=int, help="score the first CHUNKS windows only")
    parser.add_argument("--draw", type=int, metavar="SEED", help="random calibration windows instead of even ones")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    window = model.config.max_position_embeddings
    calibration = calibration_windows(encode(tokenizer, arguments.calib), window, arguments.draw)
    moments = second_moments(model, calibration)
    ids = encode(tokenizer, arguments.file)
    windows = ids[:len(ids) // window * window].view(-1, window)[:arguments.chunks]
    for name in arguments.rows:
        with hooked(masks(model, ROWS[name], arguments.sparsity, moments)):
            mean = log_losses(model, windows).mean().item()
        print(f"{name:12} {math.exp(mean):9.4f}   {len(windows)} windows", flush=True)


if __name__ == "__main__":
    main()
