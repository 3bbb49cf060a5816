#!/usr/bin/env python3
"""Random draws of a calibration text, to see how much a result depends on it.

    dev/draw_calibration.py TEXT OUT SEED...
    dev/draw_calibration.py TEXT OUT SEED... --windows TOKENIZER    a Hugging Face tokenizer.json; needs tokenizers

Writes OUT/SEED.txt for every SEED: 16 stretches of 8000 bytes from random beginnings of lines of TEXT, so that the 16
windows that `larosa sparsify --calib` reads of it come from random places.

With --windows the text is, token by token, 16 windows of 1024 tokens, as a calibration in PyTorch draws them:

    ids = [t for i in range(0, len(text), 500_000) for t in tokenizer.encode(text[i : i + 500_000], add_special_tokens=False).ids]
    starts = torch.randint(0, len(ids) - 1024, (16,), generator=torch.Generator().manual_seed(SEED))

`larosa sparsify --calib` reads exactly these windows of it. Torch is not needed. A draw whose text would be read as
other tokens (a window that begins within a character, a word made of the ends of two) is refused.
"""

import argparse
import pathlib
import random

STRETCHES, BYTES = 16, 8000
WINDOWS, TOKENS, PIECE = 16, 1024, 500_000


def draw(text, seed):
    rng = random.Random(seed)
    parts = []
    for _ in range(STRETCHES):
        begin = text.find(b"\n", rng.randrange(len(text) - BYTES)) + 1  # of the text where no line begins any more
        parts.append(text[begin : begin + BYTES].decode("utf-8", "ignore").encode())
    return b"\n".join(parts) + b"\n"


def torch_randint(high, count, seed):
    """What torch.randint gives with a generator of this seed, high < 2^28: a Mersenne Twister's words modulo high."""
    state = [seed % 2**32]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ state[-1] >> 30) + i) % 2**32)
    rng = random.Random()
    rng.setstate((3, (*state, 624), None))
    return [rng.getrandbits(32) % high for _ in range(count)]


def draw_windows(tokenizer, ids, seed):
    """The text of the windows, None if it would be read as other tokens."""
    starts = torch_randint(len(ids) - TOKENS, WINDOWS, seed)
    drawn = [token for start in starts for token in ids[start : start + TOKENS]]
    text = tokenizer.decode(drawn, skip_special_tokens=False)
    return text.encode() if tokenizer.encode(text, add_special_tokens=False).ids == drawn else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("seeds", type=int, nargs="+", metavar="SEED")
    parser.add_argument("--windows", type=pathlib.Path, metavar="TOKENIZER", help="windows of this tokenizer's tokens")
    args = parser.parse_args()
    try:
        text = args.text.read_bytes()
    except OSError as error:
        parser.error(str(error))
    if args.windows is None:
        if len(text) <= BYTES:
            parser.error(f"{args.text}: {len(text)} bytes, more than {BYTES} are needed")
    else:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            parser.error("--windows needs the Python package tokenizers")
        try:
            tokenizer = Tokenizer.from_str(args.windows.read_text())
        except OSError as error:
            parser.error(str(error))
        except Exception as error:  # which tokenizers raises, and no narrower one
            parser.error(f"{args.windows}: {error}")
        try:
            whole = text.decode()
        except UnicodeDecodeError as error:
            parser.error(f"{args.text}: {error}")
        pieces = (whole[i : i + PIECE] for i in range(0, len(whole), PIECE))
        ids = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False).ids]
        if len(ids) <= TOKENS:
            parser.error(f"{args.text}: {len(ids)} tokens, more than {TOKENS} are needed")
    args.out.mkdir(parents=True, exist_ok=True)
    refused = []
    for seed in args.seeds:
        drawn = draw(text, seed) if args.windows is None else draw_windows(tokenizer, ids, seed)
        if drawn is None:
            refused.append(str(seed))
        else:
            (args.out / f"{seed}.txt").write_bytes(drawn)
    if refused:
        parser.exit(1, f"{parser.prog}: not written, since read as other tokens than were drawn: {', '.join(refused)}\n")


if __name__ == "__main__":
    main()
