#!/usr/bin/env python3
"""Writes what tests/tokenizer_test.cpp compares with: ids and decoded text of Hugging Face tokenizers.

    dev/tokenizer_golden.py                               tests/golden/tokenizers/demo-7m.json, which is committed
    dev/tokenizer_golden.py --out FILE --text T... DIR... random slices of the texts T for the tokenizers in DIR...;
                                                          LAROSA_TOKENIZER_GOLDEN=FILE tokenizer_test reads them

Needs tokenizers; for directories without tokenizer.json also transformers, protobuf and tiktoken. Same seed, same file.
"""

import argparse
import json
import pathlib
import random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

HARD = ["", " ", "  ", "   a", "a   ", "\t", "\n", "\r\n", "\n\n  x\n", "a\u00a0b\u2003c\u3000d", "Hello, World!", "don't WE'LL I'M",
        "1 12 123 1234 12345.678", "é e\u0301 ﬁ Å ǆ", "日本語のテキスト。", "Привет, мир", "שלום مرحبا", "हिन्दी",
        "👍🏽👩‍👩‍👧 🇨🇭", "\ufffd", "\u2581a \u2581\u2581b", "<s> </s> <unk> <0x0A>", "<|endoftext|>", "a <|begin_of_text|> b",
        "<|begin_of_text|><|begin_of_text|>", "<|begin_of_text|", "x" * 300, " " * 77, "=-" * 40, "\u0000\u0001\u007f",
        "a\u200bb\u200dc", "𝔘𝔫𝔦", "ſ İ ı ß ẞ", "for (int i = 0; i < n; ++i) {\n\treturn x[i];\n}\n", "http://a.b/c?d=e&f=%20"]


def oracle(folder):
    """The Hugging Face tokenizer of a directory, made from the files that lie there."""
    if (folder / "tokenizer.json").exists():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    if (folder / "tokenizer.model").exists():
        path = folder / "tokenizer.model"
        if path.read_bytes()[:1] != b"\n":
            from transformers.convert_slow_tokenizer import TikTokenConverter
            reserved = (f"<|reserved_special_token_{i}|>" for i in range(256))
            names = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>",
                     9: "<|eot_id|>"}
            return TikTokenConverter(str(path), extra_special_tokens=[names.get(i) or next(reserved)
                                                                      for i in range(256)]).converted()
        # The class LlamaTokenizer of transformers 5 loses the scores of a bare model; what AutoTokenizer makes keeps them.
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
        # The text steps of the tokenizer.json that Llama 2, Mistral and TinyLlama publish.
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        parts = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
        return Tokenizer.from_str(json.dumps(parts))
    if (folder / "tokenizer_config.json").exists():
        from transformers import AutoTokenizer
        return AutoTokenizer.from_pretrained(folder).backend_tokenizer
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def slices(texts, count, longest, rng):
    for _ in range(count):
        text = rng.choice(texts)
        start = rng.randrange(len(text))
        yield text[start:start + rng.randint(1, longest)]


def cases(tokenizer, inputs):
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for text in inputs:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        yield {"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=False)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = pathlib.Path(__file__).resolve().parent.parent
    parser.add_argument("folders", nargs="*", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--text", nargs="+", type=pathlib.Path, default=[root / "text/demo.valid.txt"])
    parser.add_argument("--count", type=int, default=10000)
    arguments = parser.parse_args()
    small = not arguments.folders
    if not small and not arguments.out:
        parser.error("--out FILE is needed with DIR")
    texts = [path.read_text(encoding="utf-8") for path in arguments.text]
    golden = []
    for folder in arguments.folders or [root / "models/demo-7m"]:
        inputs = HARD + list(slices(texts, 200 if small else arguments.count, 50 if small else 200, random.Random(1)))
        dir_name = str(folder.relative_to(root)) if small else str(folder.resolve())
        golden.append({"dir": dir_name, "cases": list(cases(oracle(folder), inputs))})
        print(f"{folder.name}: {len(inputs)} texts")
    out = arguments.out or root / "tests/golden/tokenizers/demo-7m.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
