#!/usr/bin/env python3
"""Writes what tests/golden_test.cpp compares with: logits of transformers, weights widened to float32, eager attention.

    dev/golden.py tiny    [--out tests/golden/models]     random models of every family, with logits of a prompt
    dev/golden.py sparse  [--out tests/golden/sparse]     the same of models that are trained to be sparse
    dev/golden.py trained DIR... [--out tests/golden]     <name>.json of trained models: a prompt, its greedy
                                                          continuation of 200 ids, logits at three positions

Needs torch, transformers and safetensors (CPU). Same seeds, same files. The trained models that the tests know:
models/demo-7m, and mix-88m and stories260k from a data folder.
"""

import argparse
import json
import math
import pathlib
import shutil
import zlib

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

PROMPT, GREEDY, CANDIDATES, SAMPLED, SAFE_MARGIN = 40, 200, 48, 24, 0.01

COMMON = dict(hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              vocab_size=128, max_position_embeddings=128, rms_norm_eps=1e-5, hidden_act="silu", bos_token_id=1,
              eos_token_id=2, tie_word_embeddings=False)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)

# name: (architecture, model_type, what differs from COMMON, stored type, files). LLAMA3's original context is so short
# that with 8 frequencies all three bands occur (kept, blended, slowed).
TINY = {
    "llama2-f16": ("Llama", "llama", dict(num_key_value_heads=4), "float16", 1),
    "llama3-bf16-shards": ("Llama", "llama", dict(rope_theta=500000.0, eos_token_id=[2, 3]), "bfloat16", 2),
    "llama3.1-f32": ("Llama", "llama", dict(rope_theta=10000.0, head_dim=16, num_hidden_layers=3,
                                            rope_scaling=dict(LLAMA3, rope_type="llama3")), "float32", 1),
    "llama3.2-bf16": ("Llama", "llama", dict(head_dim=16, tie_word_embeddings=True,
                                             rope_parameters=dict(LLAMA3, rope_type="llama3", rope_theta=10000.0)),
                      "bfloat16", 1),
    "llama-biases-f16": ("Llama", "llama", dict(attention_bias=True), "float16", 1),
    "tinyllama-bf16": ("Llama", "llama", dict(num_key_value_heads=1, rope_scaling=None), "bfloat16", 1),
    "smollm2-bf16": ("Llama", "llama", dict(num_attention_heads=3, num_key_value_heads=1, rope_theta=100000,
                                            tie_word_embeddings=True, rope_interleaved=False), "bfloat16", 1),
    "mistral-window-bf16": ("Mistral", "mistral", dict(sliding_window=8), "bfloat16", 1),
    "mistral-f16": ("Mistral", "mistral", dict(sliding_window=None, head_dim=16, rope_theta=1000000.0), "float16", 1),
    "qwen2-bf16": ("Qwen2", "qwen2", dict(sliding_window=16, use_sliding_window=False, max_window_layers=1,
                                          tie_word_embeddings=True, rms_norm_eps=1e-6), "bfloat16", 1),
    "qwen2-window-bf16": ("Qwen2", "qwen2", dict(sliding_window=8, use_sliding_window=True, max_window_layers=1),
                          "bfloat16", 1),
    "qwen3-bf16": ("Qwen3", "qwen3", dict(head_dim=32, rope_theta=1000000, tie_word_embeddings=True, rms_norm_eps=1e-6),
                   "bfloat16", 1),
}



def fatrelu(model, config):
    """ProSparse: the gate's values up to the threshold become zero."""
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Threshold(config["hidden_act_param"], 0.0)


def drelu(model, config):
    """TurboSparse: ReLU on gate and up."""
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda module, inputs, output: F.relu(output))


def qsparse(model, config):
    """Q-Sparse: every projection reads the largest int((1 - sparse_ratio) n) entries of its input; with
    sparse_rescale divided by their length."""
    def keep(module, inputs):
        x = inputs[0]
        kept = x.abs().topk(int((1 - config["sparse_ratio"]) * x.shape[-1]), dim=-1).indices
        x = torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))
        return F.normalize(x, dim=-1) if config.get("sparse_rescale") else x,
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(keep)


# As TINY, and: the model_type that transformers knows, what makes the model of it.
SPARSE = {
    "relu-f32": ("Llama", "llama", dict(hidden_act="relu"), "float32", 1, None, None),
    "relu2-bf16": ("Llama", "llama", dict(hidden_act="relu2", attention_bias=True), "bfloat16", 1, None, None),
    "prosparse-f16": ("SparseLlama", "sparsellama", dict(hidden_act="fatrelu", hidden_act_param=0.1), "float16", 1,
                      "llama", fatrelu),
    "turbosparse-bf16": ("Bamboo", "bamboo", dict(hidden_act="relu", sliding_window=None), "bfloat16", 1,
                         "mistral", drelu),
    "qsparse-bf16": ("Qwen2", "qwen2", dict(use_sliding_window=False, sparse_ratio=0.4), "bfloat16", 1, None, qsparse),
    "qsparse-rescaled-bf16": ("Llama", "llama", dict(attention_bias=True, sparse_ratio=0.4, sparse_rescale=True),
                              "bfloat16", 1, None, qsparse),
}


def randomize(model, generator, dtype):
    """Random values of a size that keeps every block's share of the stream visible, rounded to the stored type."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.5 * noise
        elif "embed" in name:
            value = 0.5 * noise
        else:
            value = 1.5 * noise / math.sqrt(p.shape[1])
        p.data = value.to(dtype).float()


def write_weights(state, folder, files):
    """One model.safetensors, or `files` shards with their index."""
    if files == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return
    names = sorted(state)
    weight_map = {}
    for i in range(files):
        shard = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        part = {n: state[n] for n in names[i * len(names) // files:(i + 1) * len(names) // files]}
        save_file(part, folder / shard, {"format": "pt"})
        weight_map |= {n: shard for n in part}
    total = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


@torch.no_grad()
def tiny(out, table):
    for name, row in table.items():
        family, model_type, changes, stored, files, known, change = row + (None,) * (7 - len(row))
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config = COMMON | changes | dict(architectures=[family + "ForCausalLM"], model_type=model_type,
                                         torch_dtype=stored)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        dtype = getattr(torch, stored)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        understood = dict(config, model_type=known, hidden_act="relu") if known else config
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**understood), attn_implementation="eager",
                                                 dtype=torch.float32).eval()
        randomize(model, generator, dtype)
        if change:
            change(model, config)
        state = {n: p.detach().to(dtype).contiguous().clone() for n, p in model.named_parameters()}
        write_weights(state, folder, files)
        prompt = torch.randint(0, config["vocab_size"], (PROMPT,), generator=generator)
        logits = model(prompt[None]).logits[0].float()
        save_file({"logits": logits.contiguous()}, folder / "golden.safetensors", {"prompt": json.dumps(prompt.tolist())})
        print(f"{name}: rms of logits {logits.square().mean().sqrt():.3f}")


@torch.no_grad()
def candidates(model, generator):
    """CANDIDATES rows: SAMPLED ids drawn from the model after bos, then GREEDY ids; and the least top-2 margin."""
    ids = torch.full((CANDIDATES, 1), model.config.bos_token_id)
    margin = torch.full((CANDIDATES,), math.inf)
    cache, step = None, ids
    for i in range(SAMPLED + GREEDY - 1):
        result = model(step, past_key_values=cache, use_cache=True)
        cache, logits = result.past_key_values, result.logits[:, -1].float()
        if i < SAMPLED - 1:
            step = torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)
        else:
            best = logits.topk(2).values
            margin = torch.minimum(margin, best[:, 0] - best[:, 1])
            step = logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, step], 1)
    return ids, margin


@torch.no_grad()
def trained(folders, out):
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        ids, margin = candidates(model, torch.Generator().manual_seed(1))
        # Of the paths that rounding cannot turn aside, the one that repeats itself least.
        variety = torch.tensor([len(set(row[SAMPLED:].tolist())) for row in ids])
        row = int((variety * (margin > SAFE_MARGIN)).argmax())
        ids = ids[row]
        logits = model(ids[None]).logits[0].float()
        best = logits[SAMPLED - 1:-1].topk(2)
        assert best.indices[:, 0].tolist() == ids[SAMPLED:].tolist(), "batch and single row disagree"
        rows = []
        for position in (SAMPLED - 1, SAMPLED + GREEDY // 2, SAMPLED + GREEDY - 1):
            x = logits[position]
            top = x.topk(min(50, len(x)) if len(x) > 1024 else len(x))
            rows.append(dict(position=position, rms=float(x.square().mean().sqrt()), logsumexp=float(x.logsumexp(0)),
                             ids=top.indices.tolist(), logits=[round(v, 6) for v in top.values.tolist()]))
        golden = dict(min_margin=float((best.values[:, 0] - best.values[:, 1]).min()), prompt=ids[:SAMPLED].tolist(),
                      greedy=ids[SAMPLED:].tolist(), rows=rows)
        path = out / (pathlib.Path(folder).name + ".json")
        path.write_text(json.dumps(golden) + "\n")
        print(f"{path}: least margin {golden['min_margin']:.4f}, {len(set(golden['greedy']))} different ids")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tiny", "sparse", "trained"])
    parser.add_argument("folders", nargs="*", metavar="DIR")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    root = pathlib.Path(__file__).resolve().parent.parent
    torch.set_num_threads(2)
    if arguments.what == "tiny":
        tiny(arguments.out or root / "tests/golden/models", TINY)
    elif arguments.what == "sparse":
        tiny(arguments.out or root / "tests/golden/sparse", SPARSE)
    else:
        trained(arguments.folders, arguments.out or root / "tests/golden")


if __name__ == "__main__":
    main()
