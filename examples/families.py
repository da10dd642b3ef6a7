"""Each of the paper's tasks in small, from the same seed: trained exactly (mode serial), and as its example says (mode adaptive).

    python examples/families.py --data DATA --output runs/families [--tasks mc vit …]

Prints a table of the final metric and loss, over the whole held-out set, and of how many steps were exact. DATA holds what the tasks read
(see TASKS); a task whose files are missing is skipped. Runs that are complete already are not repeated.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import ray

import rayllp
from rayllp.report import read_lines

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Task:
    """A config of this folder, the files it reads below DATA, settings to go with them, and the metric to compare."""

    config: str
    metric: str
    files: dict[str, str]
    settings: tuple[str, ...] = ()


GUM = "ud_english_gum/en_gum-ud-"
TASKS = {
    "gpt2": Task("gpt2_shakespeare", "perplexity", {"data.path": "tinyshakespeare/input.txt.gz"}, ("model.layers=20", "steps=800")),
    "mc": Task("mc_gum", "word_accuracy", {"data.path": GUM + "train.slim.conllu.gz", "data.validation_path": GUM + "dev.slim.conllu.gz"}),
    "bert": Task("bert_shakespeare", "masked_accuracy", {"data.path": "tinyshakespeare/input.txt.gz"}),
    "vit": Task("vit_mnist", "accuracy", {"data.path": "mnist"}, ("model.patch_size=7",)),
    "mt": Task("mt_multi30k", "bleu", {"data.path": "multi30k"}),
    "llama": Task("llama_shakespeare", "perplexity", {"data.path": "tinyshakespeare/input.txt.gz"}),
}


def train(task: Task, data: Path, run: Path, changes: list[str]) -> tuple[dict, float]:
    """The run's last evaluation, and the share of its steps that were exact; trains it unless it is complete."""
    files = [f"{setting}={data / path}" for setting, path in task.files.items()]
    config = rayllp.load_config(HERE / f"{task.config}.yaml", [*files, *task.settings, *changes])
    evaluations = read_lines(run / "evals.jsonl")
    if not evaluations or evaluations[-1]["step"] < config.steps:
        rayllp.train(config, output=run)
        evaluations = read_lines(run / "evals.jsonl")
    modes = [metric["mode"] for metric in read_lines(run / "metrics.jsonl")]
    return evaluations[-1], modes.count("serial") / len(modes)


def compare(name: str, task: Task, data: Path, output: Path) -> str:
    """A row of the table."""
    exact, _ = train(task, data, output / name / "serial", ["mode=serial"])
    adaptive, share = train(task, data, output / name / "adaptive", [])
    scale = 100 if "accuracy" in task.metric else 1
    values = [scale * evaluation[task.metric] for evaluation in (exact, adaptive)]
    losses = f"{exact['loss']:.4f} | {adaptive['loss']:.4f}"
    return f"| {name} | {task.metric} | {values[0]:.2f} | {values[1]:.2f} | {values[1] - values[0]:+.2f} | {losses} | {share:.0%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    rows = []
    for name in arguments.tasks:
        missing = [path for path in TASKS[name].files.values() if not (arguments.data / path).exists()]
        if missing:
            print(f"{name} is skipped: {arguments.data / missing[0]} is not there")
            continue
        rows.append(compare(name, TASKS[name], arguments.data.absolute(), arguments.output))
    heads = "task | metric | exact | adaptive | difference | loss, exact | adaptive | exact steps"
    print("| " + heads + " |", "|" + "---|" * (heads.count("|") + 1), *rows, sep="\n")


if __name__ == "__main__":
    main()
