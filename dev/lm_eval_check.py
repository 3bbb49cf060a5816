#!/usr/bin/env python3
"""Compares `larosa eval` with lm-evaluation-harness, item by item.

    dev/lm_eval_check.py MODEL --data DATA [--tasks T,…] [--limit 100] [--larosa build/release/larosa]
    dev/lm_eval_check.py models/demo-7m --data tests/golden/tasks --reference tests/golden/tasks/demo-7m.json

lm-eval runs MODEL through transformers (float32, CPU) on its own task definitions, with documents made from the files in DATA
(dev/lm_eval_export.py); larosa reads the same files itself. Compared are the texts of every request, every log-likelihood, every
greedy flag, every item's metrics and the tables. Exit code 1 where one differs (log-likelihoods: by more than --tolerance,
relative). --reference FILE: lm-eval's side, read from there, or run and written there where the file does not exist yet; the
second command makes what tests/tasks_test.cpp compares with.

Needs lm_eval[hf] (0.4.13) and torch.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM

from lm_eval_export import LOCAL, local_task

METRICS = ("acc", "acc_norm", "perplexity")


def run_lm_eval(args, tasks):
    model = HFLM(pretrained=args.model, dtype="float32", device="cpu", batch_size=args.batch)
    objects = [local_task(name, args.data, args.limit or None) for name in tasks]
    found = lm_eval.simple_evaluate(model=model, tasks=objects, num_fewshot=0, bootstrap_iters=args.bootstrap, log_samples=True)
    samples = {}
    for name in tasks:
        rows = sorted(found["samples"][name], key=lambda s: s["doc_id"])
        samples[name] = [plain(s) for s in rows]
    return {name: {"items": samples[name], "results": results_of(found["results"][name])} for name in tasks}


def results_of(found):
    """{"acc,none": …, "acc_stderr,none": …} without the filter's name and what is no number of ours."""
    short = {key.split(",")[0]: value for key, value in found.items()}
    return {key: value for key, value in short.items() if key.removesuffix("_stderr") in METRICS}


def plain(sample):
    """What is compared of an item, whichever way lm-eval's log nests it."""
    arguments = sample["arguments"]
    if isinstance(arguments, dict):  # gen_args_0: {arg_0, arg_1}
        arguments = [[a["arg_0"], a["arg_1"]] for a in arguments.values()]
    resps = [[float(r[0][0]), bool(r[0][1])] for r in sample["resps"]]
    row = {"arguments": [list(a) for a in arguments], "resps": resps}
    row.update({m: float(sample[m]) for m in METRICS if m in sample})
    return row


def run_larosa(args, tasks):
    with tempfile.TemporaryDirectory() as folder:
        samples, results = pathlib.Path(folder) / "samples.jsonl", pathlib.Path(folder) / "results.json"
        command = [args.larosa, "eval", args.model, "--tasks", ",".join(tasks), "--data", str(args.data), "--samples", str(samples),
                   "-o", str(results), *(["--limit", str(args.limit)] if args.limit else [])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = {name: [] for name in tasks}
        for line in samples.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found[row["task"]].append(row)
        return found, json.loads(results.read_text(encoding="utf-8"))["tasks"]


def compare(name, ours, theirs, tolerance):
    """Counts of what differs in a task; prints the first few."""
    assert len(ours) == len(theirs), (name, len(ours), len(theirs))
    texts = greedy = metrics = likelihoods = shown = 0
    worst = 0.0
    for i, (a, b) in enumerate(zip(ours, theirs)):
        parts = []
        if a["arguments"] != b["arguments"]:
            texts += 1
            parts.append(f"text {a['arguments'][0]!r} against {b['arguments'][0]!r}")
        for (x, g), (y, h) in zip(a["resps"], b["resps"]):
            error = abs(x - y) / max(abs(y), 1e-3)
            worst = max(worst, error)
            greedy += g != h
            if error > tolerance:
                likelihoods += 1
                parts.append(f"log-likelihood {x} against {y}")
        for m in METRICS:
            if m in b and (m == "perplexity" or a[m] == b[m]):
                continue
            if m in b:
                metrics += 1
                parts.append(f"{m} {a[m]} against {b[m]}, likelihoods {a['resps']} against {b['resps']}")
        if parts and shown < 5:
            shown += 1
            print(f"  {name} {i}: " + "; ".join(parts))
    print(f"{name}: {len(ours)} items, {sum(len(a['resps']) for a in ours)} requests; different: {texts} texts, {likelihoods} "
          f"log-likelihoods (largest relative difference {worst:.1e}), {greedy} greedy flags, {metrics} metrics")
    return texts + likelihoods + greedy + metrics


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--tasks", default=",".join(LOCAL))
    parser.add_argument("--limit", type=int, default=0, help="first items of each task; 0: all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bootstrap", type=int, default=1000, help="lm-eval's draws for the error of perplexity")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--larosa", default="build/release/larosa")
    parser.add_argument("--reference", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tasks = args.tasks.split(",")
    if args.reference and args.reference.exists():
        theirs = json.loads(args.reference.read_text(encoding="utf-8"))
    else:
        theirs = run_lm_eval(args, tasks)
        if args.reference:
            args.reference.write_text(json.dumps(theirs, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    ours, our_results = run_larosa(args, tasks)
    different = sum(compare(name, ours[name], theirs[name]["items"], args.tolerance) for name in tasks)
    for name in tasks:
        mine, lm_eval_s = our_results[name], theirs[name]["results"]
        for m in METRICS:
            if m in lm_eval_s:
                print(f"{name} {m}: larosa {mine[m]:.6f} ± {mine[m + '_stderr']:.6f}, lm-eval {lm_eval_s[m]:.6f} ± "
                      f"{lm_eval_s[m + '_stderr']:.6f}")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
