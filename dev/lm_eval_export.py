#!/usr/bin/env python3
"""Writes lm-evaluation-harness's own requests as files that `larosa eval` reads.

    dev/lm_eval_export.py arc_easy sciq … -o DIR [--local DATA] [--limit N]
    dev/lm_eval_export.py mmlu -o DIR --num-fewshot 5

For every task DIR/TASK.requests.jsonl, a line per document: the (context, continuation) pairs that lm-eval makes of it, its
answers and which is right. Then `larosa eval MODEL --tasks arc_easy,sciq --data DIR`. Any task of type multiple_choice or
loglikelihood will do; a group of tasks becomes one file, so that its mean is the one over all documents (as lm-eval weights
mmlu). --num-fewshot puts N examples before each document, the ones that lm-eval's command draws with its default seed.
Documents come from where lm-eval takes them (downloads), or with --local from the files that `larosa eval` reads itself,
turned back into what lm-eval's data sets hold (LOCAL below), without examples.

Needs lm_eval (0.4.13).
"""

import argparse
import json
import pathlib
import re

import datasets
import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

TASKS = pathlib.Path(lm_eval.tasks.__file__).parent
FEWSHOT_SEED = 1234  # of lm-eval's command line
LETTERS = "ABCD"


def behind(text, start):
    assert text.startswith(start), text
    return text[len(start):]


def json_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def lettered(row):
    return {"choices": {"text": row["choices"], "label": list(LETTERS[:len(row["choices"])])}, "answerKey": LETTERS[row["gold"]]}


def arc(row):
    return {"question": behind(row["query"], "Question: "), **lettered(row)}


def piqa(row):
    goal = behind(row["query"], "Question: ")
    assert goal.endswith("\n")
    return {"goal": goal[:-1], "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}


def openbookqa(row):
    return {"question_stem": row["query"], **lettered(row)}


def boolq(row):
    passage, question = behind(row["query"], "Passage: ").rsplit("\nQuestion: ", 1)
    assert question.endswith("?") and row["choices"] == ["no", "yes"]
    return {"passage": passage, "question": question[:-1], "label": row["gold"]}


def winogrande(row):
    """The blank stands where the two contexts begin to differ."""
    first, second = row["context_options"]
    at = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
    return {"sentence": first[:at] + "_ " + row["continuation"], "option1": first[at:], "option2": second[at:],
            "answer": str(row["gold"] + 1)}


def lambada(row):
    return {"text": row["context"] + " " + row["continuation"]}


def hellaswag(lines):
    """ctx_a and ctx_b stand joined in the file. ctx_b is what follows the last sentence; where the text ends with one there is
    no ctx_b."""
    label, text = lines[0].split(": ", 1)
    tail = None if text.endswith(".") else re.match(r"(.*[.!?][\"')]*) +([^ ].*)$", text)
    a, b = tail.groups() if tail else (text, "")
    return {"activity_label": label, "ctx_a": a, "ctx_b": b, "endings": lines[2:], "label": lines[1]}


def six_lines(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    return [lines[i:i + 6] for i in range(0, len(lines) - 5, 6)]


# name: (lm-eval's configuration, file, how it is cut, how a piece becomes a document of lm-eval's data set)
LOCAL = {
    "arc_easy": ("arc/arc_easy.yaml", "arc_easy.jsonl", json_lines, arc),
    "arc_challenge": ("arc/arc_challenge.yaml", "arc_challenge.jsonl", json_lines, arc),
    "piqa": ("piqa/piqa.yaml", "piqa.jsonl", json_lines, piqa),
    "openbookqa": ("openbookqa/openbookqa.yaml", "openbook_qa.jsonl", json_lines, openbookqa),
    "winogrande": ("winogrande/default.yaml", "winogrande.jsonl", json_lines, winogrande),
    "boolq": ("super_glue/boolq/default.yaml", "boolq.jsonl", json_lines, boolq),
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag_val.txt", six_lines, hellaswag),
    "lambada": ("lambada/lambada_openai.yaml", "lambada_openai.jsonl", json_lines, lambada),
}


def local_task(name, data, limit=None):
    """lm-eval's task, its documents made from the file in the folder `data`."""
    config, file, pieces, document = LOCAL[name]
    config = load_yaml(TASKS / config)
    rows = pieces(pathlib.Path(data) / file)[:limit]
    split = config.get("test_split") or config["validation_split"]
    documents = datasets.Dataset.from_list([document(row) for row in rows])
    # The configuration as it is, but for where the documents come from.
    config.update(task=name, custom_dataset=lambda **_: datasets.DatasetDict({split: documents}))
    for other in ("training_split", "validation_split", "test_split"):
        if config.get(other) != split:
            config[other] = None
    return ConfigurableTask(config=config)


def lines_of(task, limit=None):
    """The task's requests, a line per document."""
    task.build_all_requests(limit=limit)
    documents = list(task.eval_docs)
    rows = {}
    for instance in task.instances:
        rows.setdefault(instance.doc_id, []).append(instance)
    for doc_id, instances in sorted(rows.items()):
        instances.sort(key=lambda i: i.idx)
        line = {"arguments": [list(i.args) for i in instances]}
        if task.OUTPUT_TYPE == "multiple_choice":
            doc = documents[doc_id]
            gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            choices = task.doc_to_choice(doc)
            line["gold"] = choices.index(gold) if isinstance(gold, str) else gold
            if "acc_norm" in task._metric_fn_list:
                line["choices"] = choices
        yield line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("-o", "--output", type=pathlib.Path, required=True)
    parser.add_argument("--local", type=pathlib.Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--num-fewshot", type=int)
    args = parser.parse_args()
    if args.local and args.num_fewshot:
        raise SystemExit("--num-fewshot: the files of --local hold no examples")
    args.output.mkdir(parents=True, exist_ok=True)
    manager = None if args.local else lm_eval.tasks.TaskManager()
    for name in args.tasks:
        tasks = [local_task(name, args.local, args.limit)] if args.local else list(manager.load([name])["tasks"].values())
        for task in tasks:
            if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
                raise SystemExit(f"{name}: is of type {task.OUTPUT_TYPE}, expected multiple_choice or loglikelihood")
        path = args.output / f"{name}.requests.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for task in tasks:
                if args.num_fewshot is not None:
                    task.set_config("num_fewshot", args.num_fewshot)
                task.set_fewshot_seed(FEWSHOT_SEED)
                for line in lines_of(task, args.limit):
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(path)


if __name__ == "__main__":
    main()
