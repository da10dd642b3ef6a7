"""Each of the paper's tasks in small: trained serially, and layer-parallel with a serial last part, from the same seed.

    python examples/families.py --data DATA --output runs/families [--tasks mc vit …] [--switch 0.75]

Prints a table of the final metric, and of what the layer-parallel run had when it was switched. DATA holds what the tasks read (see
TASKS); a task whose files are missing is skipped. Runs that are complete already are not repeated.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import ray

import rayllp

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


def load(task: Task, data: Path, changes: list[str]) -> rayllp.TrainConfig:
    files = [f"{setting}={data / path}" for setting, path in task.files.items()]
    return rayllp.load_config(HERE / f"{task.config}.yaml", [*files, *task.settings, *changes])


def evaluations(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "evals.jsonl").read_text(encoding="utf-8").splitlines()]


def train(config: rayllp.TrainConfig, run: Path) -> list[dict]:
    """The run's evaluations; trains it unless it is complete."""
    if not (run / "evals.jsonl").exists() or evaluations(run)[-1]["step"] < config.steps:
        rayllp.train(config, output=run)
    return evaluations(run)


def compare(name: str, task: Task, data: Path, output: Path, switch: float) -> str:
    """A row of the table."""
    config = load(task, data, [])
    at = int(switch * config.steps)
    modes = {"serial": ["mode=serial"], "switched": ["mode=parallel", f"adaptive.switch_at={at}"]}
    found = {mode: train(load(task, data, changes), output / name / mode) for mode, changes in modes.items()}
    last = {mode: values[-1] for mode, values in found.items()}
    before = next((e for e in reversed(found["switched"]) if e["step"] <= at), None)
    scale = 100 if "accuracy" in task.metric else 1
    values = [last["serial"][task.metric] * scale, last["switched"][task.metric] * scale]
    m = config.mgrit
    solve = f"L {m.levels.forward}/{m.levels.backward}, c_f {m.coarsening}, {m.iterations.forward}+{m.iterations.backward}"
    at_switch = f"{before['loss']:.4f}" if before else "–"
    losses = f"{last['serial']['loss']:.4f} | {last['switched']['loss']:.4f}"
    return (
        f"| {name} | {config.model.layers} | {solve} | {config.steps} ({at} parallel) | {task.metric} | {values[0]:.2f} | "
        f"{values[1]:.2f} | {values[1] - values[0]:+.2f} | {losses} | {at_switch} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--switch", type=float, default=0.75, help="share of the steps after which the parallel run becomes serial")
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    rows = []
    for name in arguments.tasks:
        missing = [path for path in TASKS[name].files.values() if not (arguments.data / path).exists()]
        if missing:
            print(f"{name} is skipped: {arguments.data / missing[0]} is not there")
            continue
        rows.append(compare(name, TASKS[name], arguments.data.absolute(), arguments.output, arguments.switch))
    heads = "task | layers | solve | steps | metric | serial | switched | gap | loss, serial | switched | at the switch"
    print("| " + heads + " |", "|" + "---|" * (heads.count("|") + 1), *rows, sep="\n")


if __name__ == "__main__":
    main()
