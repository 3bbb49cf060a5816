#!/usr/bin/env python3
"""Random draws of a calibration text, to see how much a result depends on it.

    dev/draw_calibration.py TEXT OUT SEED...

Writes OUT/SEED.txt for every SEED: 16 stretches of 8000 bytes from random beginnings of lines of TEXT, so that the 16
windows that `larosa sparsify --calib` reads of it come from random places.
"""

import pathlib
import random
import sys

STRETCHES, BYTES = 16, 8000


def draw(text, seed):
    rng = random.Random(seed)
    parts = []
    for _ in range(STRETCHES):
        begin = text.index(b"\n", rng.randrange(len(text) - BYTES)) + 1
        parts.append(text[begin : begin + BYTES].decode("utf-8", "ignore").encode())
    return b"\n".join(parts) + b"\n"


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    text = pathlib.Path(sys.argv[1]).read_bytes()
    out = pathlib.Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    for seed in sys.argv[3:]:
        (out / f"{seed}.txt").write_bytes(draw(text, int(seed)))


if __name__ == "__main__":
    main()
