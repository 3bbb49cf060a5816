#!/usr/bin/env python3
"""Random draws of a calibration text, to see how much a result depends on it.

    dev/draw_calibration.py TEXT OUT SEED...

Writes OUT/SEED.txt for every SEED: 16 stretches of 8000 bytes from random beginnings of lines of TEXT, so that the 16
windows that `larosa sparsify --calib` reads of it come from random places.
"""

import argparse
import pathlib
import random

STRETCHES, BYTES = 16, 8000


def draw(text, seed):
    rng = random.Random(seed)
    parts = []
    for _ in range(STRETCHES):
        begin = text.find(b"\n", rng.randrange(len(text) - BYTES)) + 1  # of the text where no line begins any more
        parts.append(text[begin : begin + BYTES].decode("utf-8", "ignore").encode())
    return b"\n".join(parts) + b"\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("seeds", type=int, nargs="+", metavar="SEED")
    args = parser.parse_args()
    try:
        text = args.text.read_bytes()
    except OSError as error:
        parser.error(str(error))
    if len(text) <= BYTES:
        parser.error(f"{args.text}: {len(text)} bytes, more than {BYTES} are needed")
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        (args.out / f"{seed}.txt").write_bytes(draw(text, seed))


if __name__ == "__main__":
    main()
