#!/usr/bin/env python3
"""Writes a GGUF file with random weights in the shape that a config.json describes, so that llama.cpp can be timed on
real sizes without downloads.

    random_gguf.py CONFIG TYPE OUT       TYPE: BF16, Q8_0 or Q4_0

Every matrix has TYPE, the embedding and the output too (published files often keep the output in more bits, which is
slower); norms are float32. Tied embeddings are stored once: llama.cpp then uses them as the output. The vocabulary has
the right size and no words, and rotary frequencies are not scaled: neither changes what is computed per token.
Weights are written in chunks: memory stays below 200 MB whatever the size. The layout is that of GGUF version 3.
"""

import json
import math
import os
import struct
import sys

import numpy as np

ALIGNMENT = 32  # of every tensor's data, GGUF's default
CHUNK = 1 << 26  # bytes made at once
F32 = 0  # ggml's number

# name: (ggml's number, values and bytes of a block, root mean square of the stored integers)
TYPES = {"BF16": (30, 1, 2, None), "Q8_0": (8, 32, 34, 73.9), "Q4_0": (2, 32, 18, 4.64)}


def shapes(c):
    """(name, inputs, outputs) of every tensor; one output: a vector of ones."""
    dim, ffn, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    head_dim = c.get("head_dim") or dim // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    block = [("attn_norm", dim, 1), ("attn_q", dim, q), ("attn_k", dim, kv), ("attn_v", dim, kv),
             ("attn_output", q, dim), ("ffn_norm", dim, 1), ("ffn_gate", dim, ffn), ("ffn_up", dim, ffn),
             ("ffn_down", ffn, dim)]
    tensors = [("token_embd.weight", dim, c["vocab_size"])]
    for layer in range(layers):
        tensors += [(f"blk.{layer}.{name}.weight", n, out) for name, n, out in block]
    tensors.append(("output_norm.weight", dim, 1))
    if not c["tie_word_embeddings"]:
        tensors.append(("output.weight", dim, c["vocab_size"]))
    return tensors


def metadata(c):
    head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    return {
        "general.architecture": "llama", "general.name": "random", "tokenizer.ggml.model": "none",
        "llama.vocab_size": c["vocab_size"], "llama.context_length": c["max_position_embeddings"],
        "llama.embedding_length": c["hidden_size"], "llama.feed_forward_length": c["intermediate_size"],
        "llama.block_count": c["num_hidden_layers"], "llama.attention.head_count": c["num_attention_heads"],
        "llama.attention.head_count_kv": c["num_key_value_heads"], "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim, "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": float(c.get("rope_theta", 10000.0)),
        "llama.attention.layer_norm_rms_epsilon": float(c["rms_norm_eps"]),
    }


def text(s):
    return struct.pack("<Q", len(s)) + s.encode()


def value(v):
    if isinstance(v, str):
        return struct.pack("<I", 8) + text(v)
    return struct.pack("<If", 6, v) if isinstance(v, float) else struct.pack("<II", 4, v)


def stored_bytes(inputs, outputs, kind):
    if outputs == 1:
        return 4 * inputs
    _, values, size, _ = TYPES[kind]
    return inputs // values * size * outputs


def random_bytes(rng, count, inputs, kind):
    """`count` bytes, whole blocks, of a matrix whose rows meet `inputs` values: its products keep a vector's size about
    as it is, so that activations stay finite through any number of layers."""
    _, _, size, rms = TYPES[kind]
    data = rng.integers(0, 1 << 64, -(-count // 8), np.uint64).view(np.uint8)[:count]
    if kind == "BF16":  # sign and mantissa are random: |w| in [1, 2) of one power of two, whose root mean square is 1.53
        exponent = 127 - math.ceil(math.log2(1.53 * math.sqrt(inputs)))
        words = data.view(np.uint16)
        words &= np.uint16(0x807F)
        words |= np.uint16(exponent << 7)
    else:  # a float16 scale before the integers
        scale = np.array([1 / (rms * math.sqrt(inputs))], np.float16)
        data.reshape(-1, size)[:, :2] = scale.view(np.uint8)
    return data


def write(out, c, kind):
    tensors, rng = shapes(c), np.random.Generator(np.random.SFC64(1))
    out.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata(c))))
    for key, v in metadata(c).items():
        out.write(text(key) + value(v))
    offset = 0
    for name, inputs, outputs in tensors:
        dims = [inputs] if outputs == 1 else [inputs, outputs]
        number = F32 if outputs == 1 else TYPES[kind][0]
        out.write(text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, offset))
        offset += -(-stored_bytes(inputs, outputs, kind) // ALIGNMENT) * ALIGNMENT
    for _, inputs, outputs in tensors:
        out.write(bytes(-out.tell() % ALIGNMENT))
        if outputs == 1:
            out.write(np.ones(inputs, np.float32))
            continue
        left, step = stored_bytes(inputs, outputs, kind), CHUNK // TYPES[kind][2] * TYPES[kind][2]
        while left > 0:
            out.write(random_bytes(rng, min(left, step), inputs, kind))
            left -= step


def check(c, path, kind):
    if kind not in TYPES:
        sys.exit(f"error: type '{kind}': expected one of {', '.join(TYPES)}")
    if c.get("model_type") not in ("llama", "mistral") or c.get("attention_bias"):
        sys.exit(f"error: {path}: expected a llama or mistral shape without biases, found {c.get('model_type')}")
    values = TYPES[kind][1]
    for name, inputs, _ in shapes(c):
        if inputs % values:
            sys.exit(f"error: {path}: {name} has rows of {inputs} values, {kind} needs a multiple of {values}")


def main():
    if len(sys.argv) != 4:
        sys.exit("usage: random_gguf.py CONFIG BF16|Q8_0|Q4_0 OUT")
    path, kind, out = sys.argv[1:]
    with open(path, encoding="utf-8") as file:
        config = {"tie_word_embeddings": False, **json.load(file)}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    check(config, path, kind)
    with open(out + ".part", "wb") as file:  # a file of its own name is complete
        write(file, config, kind)
    os.rename(out + ".part", out)


if __name__ == "__main__":
    main()
