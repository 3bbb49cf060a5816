#!/usr/bin/env python3
"""Runs llama.cpp's llama-bench and `larosa bench` alternately and compares them: a markdown table to stdout, every
sample to a JSON file. Called by bench/peers/llama_cpp, which builds the one and finds the other.

Both make a prompt test (-p tokens as one batch from an empty context, logits of the last) and a generation test (-n
tokens one after another, logits of each), both after a warm-up, with random weights, random tokens, and keys and values
in float16. A round runs each program once; rounds begin with the one and the other in turn, so that a machine that
drifts favours neither. A rate is the median of a round's repetitions, a ratio is taken within a round, and the table
has the medians over the rounds, for ratios with the smallest and the largest.
"""

import argparse
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import time

import random_gguf

HERE = pathlib.Path(__file__).resolve().parent
GGUF_TYPES = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}  # larosa's name: llama.cpp's of as many bits
ENGINES = ("llama.cpp", "larosa dense", "larosa sparse")


def parse_args():
    parser = argparse.ArgumentParser(prog="bench/peers/llama_cpp WORK", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=pathlib.Path, default=HERE.parent / "configs/llama-3.2-1b.json")
    parser.add_argument("--weights", default="bf16,int8,int4", help="of bf16, int8, int4 (BF16, Q8_0, Q4_0 there)")
    parser.add_argument("--sparsity", default="0.5", help="of larosa's sparse rows (default: %(default)s)")
    parser.add_argument("-p", "--prompt", type=int, default=512, help="tokens; 0: no such test (default: %(default)s)")
    parser.add_argument("-n", "--gen", type=int, default=32, help="tokens; 0: no such test (default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count())
    parser.add_argument("-k", "--rounds", type=int, default=5)
    parser.add_argument("-r", "--reps", type=int, default=1, help="repetitions within a round (default: %(default)s)")
    parser.add_argument("--llama-flags", default="-fa on -lm mmap", help="of llama-bench (default: %(default)s)")
    parser.add_argument("--larosa-flags", default="--weights {weights} --adapter-weights int8 --head-weights {weights} --kv f16 --products bf16",
                        help="of larosa bench (default: %(default)s)")
    parser.add_argument("--json", type=pathlib.Path, help="every sample, setting and version goes here")
    parser.add_argument("--lock", type=pathlib.Path, help="flock(1)'s lock to hold during a round, on a shared machine")
    for hidden in ("--llama-bench", "--larosa", "--gguf", "--llama-version", "--llama-build"):
        parser.add_argument(hidden, required=True, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.weights = args.weights.split(",")
    if unknown := set(args.weights) - set(GGUF_TYPES):
        parser.error(f"--weights: expected some of {', '.join(GGUF_TYPES)}, found {', '.join(sorted(unknown))}")
    return args


@contextlib.contextmanager
def held(lock):
    if lock is None:
        yield
        return
    with open(lock, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def busy_share():
    """What other programs take of this machine's cores, over half a second: rates of a busy machine mean little (a
    thread of llama.cpp that waits for a preempted one spins)."""
    def ticks():
        with open("/proc/stat", encoding="utf-8") as file:
            values = [int(word) for word in file.readline().split()[1:9]]
        return sum(values), values[3] + values[4]  # all, idle and waiting for the disk
    before = ticks()
    time.sleep(0.5)
    total, idle = (b - a for a, b in zip(before, ticks()))
    return 1 - idle / total


def gguf_file(args, weights):
    """The random model, made if the config is newer."""
    path = pathlib.Path(args.gguf) / f"{args.config.stem}-{GGUF_TYPES[weights]}.gguf"
    if not path.exists() or path.stat().st_mtime < args.config.stat().st_mtime:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"peers: making {path}", file=sys.stderr)
        subprocess.run([sys.executable, HERE / "random_gguf.py", args.config, GGUF_TYPES[weights], path], check=True)
    return path


def json_of(command):
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"error: {shlex.join(str(word) for word in command)}\n{done.stderr}")
    return json.loads(done.stdout)


def sizes(args):
    return ["-p", args.prompt, "-n", args.gen, "-r", args.reps, "-t", args.threads]


def run_llama(args, weights):
    """{(engine, test): result} of one process, as run_larosa."""
    rows = json_of([args.llama_bench, "-m", gguf_file(args, weights), *sizes(args), "-b", "512", "-ub", "512", "-o", "json",
                    *shlex.split(args.llama_flags)])
    for row in rows:
        del row["model_filename"]  # a path of this machine
    return {(ENGINES[0], "pp%d" % row["n_prompt"] if row["n_prompt"] else "tg%d" % row["n_gen"]): row for row in rows}


def run_larosa(args, weights):
    rows = json_of([args.larosa, "bench", "--config", args.config, "--random-weights", "--sparsity", args.sparsity,
                    *sizes(args), "-o", "json", "--no-progress", *shlex.split(args.larosa_flags.format(weights=weights))])
    return {(ENGINES[2] if row["sparsity"] > 0 else ENGINES[1], row["test"]): row for row in rows}


def measure(args, weights):
    """One {(engine, test): result} per round, and how busy the machine was before each."""
    gguf_file(args, weights)  # before the first lock
    rounds, busy = [], []
    for k in range(args.rounds):
        results = {}
        with held(args.lock):
            busy.append(busy_share())
            for run in (run_llama, run_larosa)[:: 1 if k % 2 == 0 else -1]:
                results.update(run(args, weights))
        rounds.append(results)
        print(f"peers: {weights} round {k + 1} of {args.rounds}, busy {busy[-1]:.0%}: " + ", ".join(
            f"{engine} {test} {rate(row):.2f}" for (engine, test), row in results.items()), file=sys.stderr)
    return rounds, busy


def rate(row):
    return statistics.median(row["samples_ts"])


def spread(ratios):
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})"


def table(args, measured):
    sparse = f"larosa {float(args.sparsity):.0%} sparse"
    print(f"| weights | test | llama.cpp t/s | larosa dense t/s | {sparse} t/s | dense / llama.cpp | {sparse} / llama.cpp "
          "| dense, of bandwidth |\n|---|---|--:|--:|--:|--:|--:|--:|")
    for weights, rounds in measured.items():
        for test in dict.fromkeys(test for _, test in rounds[0]):
            rates = {engine: [rate(r[engine, test]) for r in rounds] for engine in ENGINES}
            ratios = [[a / b for a, b in zip(rates[engine], rates[ENGINES[0]])] for engine in ENGINES[1:]]
            shares = [r[ENGINES[1], test].get("bandwidth_share") for r in rounds]
            print(f"| {weights}, {GGUF_TYPES[weights]} | {test} | "
                  + " | ".join(f"{statistics.median(rates[engine]):.2f}" for engine in ENGINES) + " | "
                  + " | ".join(spread(r) for r in ratios) + " | "
                  + (f"{statistics.median(shares):.0%} |" if shares[0] else "|"))


def bytes_read(args, measured):
    """What a generated token reads, in MB: llama.cpp's from its file, without an embedding that is not the output."""
    with open(args.config, encoding="utf-8") as file:
        config = json.load(file)
    for weights, rounds in measured.items():
        first = {engine: row for (engine, test), row in rounds[0].items() if test.startswith("tg")}
        if not first:
            continue
        size = first[ENGINES[0]]["model_size"]
        if not config.get("tie_word_embeddings"):
            size -= random_gguf.stored_bytes(config["hidden_size"], config["vocab_size"], GGUF_TYPES[weights])
        yield weights, {ENGINES[0]: size, **{engine: first[engine]["bytes_per_token"] for engine in ENGINES[1:]}}


def main():
    args = parse_args()
    both = {weights: measure(args, weights) for weights in args.weights}
    measured, busy = ({weights: pair[i] for weights, pair in both.items()} for i in range(2))
    llama, larosa = (next(row for (engine, _), row in measured[args.weights[0]][0].items() if engine == e)
                     for e in ENGINES[:2])
    settings = {
        "date": datetime.date.today().isoformat(), "machine": llama["cpu_info"].strip(),
        "busy before each round": ", ".join(f"{b:.0%}" for rounds in busy.values() for b in rounds),
        "config": args.config.name, "threads": args.threads, "rounds": args.rounds, "repetitions": args.reps,
        "llama.cpp": f"{args.llama_version}, commit {llama['build_commit']}", "llama.cpp build": args.llama_build,
        "llama.cpp flags": f"-b 512 -ub 512 {args.llama_flags}", "larosa": f"{larosa['version']}, {larosa['backend']}",
        "larosa flags": args.larosa_flags,
    }
    read = dict(bytes_read(args, measured))
    if args.json:
        rounds = {weights: [[{"engine": engine, **row} for (engine, _), row in r.items()] for r in rs]
                  for weights, rs in measured.items()}
        args.json.write_text(json.dumps({**settings, "bytes per token": read, "measured": rounds}, indent=1) + "\n")
    print("\n".join(f"- {name}: {text}" for name, text in settings.items()))
    for weights, each in read.items():
        print(f"- MB per token, {weights}: " + ", ".join(f"{name} {count * 1e-6:.0f}" for name, count in each.items()))
    print()
    table(args, measured)


if __name__ == "__main__":
    main()
