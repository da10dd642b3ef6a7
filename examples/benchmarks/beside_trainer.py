"""Fine-tuning a checkpoint on several workers, beside transformers' own Trainer with the same batches; with adapters, beside peft's.

    python examples/benchmarks/beside_trainer.py FOLDER --text input.txt [--answers pairs.jsonl] [--lora] [--steps 20] [--workers 2]

FOLDER is a causal model as save_pretrained writes it, with its tokenizer. Prints each step's loss from both, the largest difference,
seconds a step and the peak of resident memory: of each worker, and of the Trainer's process, which has as many threads as there are
workers.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rayllp.config import TrainConfig, load_config, make_config, to_yaml
from rayllp.data import IGNORE, load_data

TARGETS = ["q_proj", "v_proj"]


def config_of(arguments: argparse.Namespace) -> TrainConfig:
    """The settings of our run, which the Trainer's follow."""
    data: dict[str, Any] = {"path": str(arguments.text), "max_bytes": 2_000_000}
    if arguments.answers is not None:
        data = {"path": str(arguments.answers), "text_field": "prompt", "answer_field": "answer"}
    lora = {"lora": {"rank": 8, "alpha": 16.0, "targets": TARGETS}} if arguments.lora else {}
    return make_config({
        "model": {"from_pretrained": str(arguments.folder), **lora}, "data": {**data, "tokenizer": str(arguments.folder)},
        "sequence_length": arguments.length, "batch_size": arguments.batch, "steps": arguments.steps, "workers": arguments.workers,
        "mode": arguments.mode, "buffers": {"open": 0, "close": 0}, "step": {"middle": 1.0}, "snapshot_every": 0, "spare_workers": False,
        "optimizer": {"lr": 1e-3 if arguments.lora else 2e-5, "warmup": 2, "weight_decay": 0.0},
        "eval": {"every": 0, "batches": 2, "final_batches": 2, "sample": 0}, "checkpoint": {"best": False, "minutes": 0},
        "timeline_every": 0,
    })  # fmt: skip


def peak_mib(pid: int | None = None) -> float:
    """The most that a process has had in memory."""
    if pid is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = next(line for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def ours(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Losses, seconds and memory of our workers."""
    import rayllp

    peaks: dict[int, float] = {}

    class Watch(rayllp.Listener):
        def on_step(self, metric: Any) -> None:
            for process in workers():
                peaks[process] = peak_mib(process)

    result = rayllp.train(config, output=folder / "run", listeners=[Watch()])
    rows = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"losses": [row["loss"] for row in rows], "seconds": [row["step_time_s"] for row in rows], "peaks": sorted(peaks.values())}


def workers() -> list[int]:
    """Processes of Ray actors that hold a block."""
    import psutil

    return [p.pid for p in psutil.process_iter(["cmdline"]) if any("BlockWorker" in part for part in p.info["cmdline"] or ())]


def theirs(config: TrainConfig, folder: Path, threads: int) -> None:
    """The Trainer's losses, seconds and memory, printed as JSON."""
    import time

    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from rayllp.config.schedule import learning_rate

    torch.set_num_threads(threads)
    data = load_data(config)
    model = AutoModelForCausalLM.from_pretrained(config.model.from_pretrained, dtype=torch.float32)
    if config.model.lora is not None:
        from peft import LoraConfig, get_peft_model

        lora = config.model.lora
        model = get_peft_model(model, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets or ())))
        with torch.no_grad():  # the same random adapters as ours
            from rayllp.models import build_architecture

            architecture = build_architecture(config, data.facts)
            for n in range(architecture.layers):
                stored = {architecture.prefix(n) + name: p for name, p in architecture.build(n, config.seed).named_parameters()}
                for name, parameter in model.named_parameters():
                    ours_ = stored.get(name.removeprefix("base_model.model."))
                    if ours_ is not None and "lora_" in name:
                        parameter.copy_(ours_)

    class Rows(torch.utils.data.Dataset):
        """Each batch's sequences one after the other, with the last target behind them."""

        def __len__(self) -> int:
            return config.steps * config.batch_size

        def __getitem__(self, index: int) -> dict[str, Any]:
            inputs, targets = data.batch("train", index // config.batch_size, config.batch_size)
            ids, wanted = inputs[index % config.batch_size], targets[index % config.batch_size]
            last = wanted[-1:].clamp(min=0)
            return {"input_ids": torch.cat([ids, last]), "labels": torch.cat([torch.tensor([IGNORE]), wanted])}

    losses: list[float] = []
    seconds: list[float] = []

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(Rows())

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            found = super().compute_loss(model, inputs, return_outputs, **kwargs)
            losses.append(float(found.detach()))
            return found

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    settings = config.optimizer
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(settings, step, config.steps) / settings.lr)
    options = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=config.batch_size, max_steps=config.steps, use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, max_grad_norm=settings.clip, logging_steps=10**6,
    )  # fmt: skip
    InOrder(model=model, args=options, train_dataset=Rows(), optimizers=(optimizer, schedule), callbacks=[Clock()]).train()
    print("RESULT " + json.dumps({"losses": losses, "seconds": seconds, "peaks": [peak_mib()]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--answers", type=Path, help="jsonl with columns prompt and answer: the loss counts the answers alone")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--mode", default="serial", choices=["serial", "adaptive"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--trainer-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trainer_of is not None:
        theirs(load_config(arguments.trainer_of), arguments.trainer_of.parent, arguments.workers)
        return
    config = config_of(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        found = ours(config, folder)
        command = [
            sys.executable,
            __file__,
            str(arguments.folder),
            "--trainer-of",
            str(folder / "config.yaml"),
            "--workers",
            str(arguments.workers),
        ]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        wanted = json.loads(next(line for line in output.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))
    for step, (loss, other) in enumerate(zip(found["losses"], wanted["losses"], strict=True)):
        print(f"step {step:3d}  rayllp {loss:.6f}  Trainer {other:.6f}")
    worst = max(abs(a - b) for a, b in zip(found["losses"], wanted["losses"], strict=True))
    print(f"largest difference of a loss: {worst:.1e}")
    for who, result in (("rayllp", found), ("Trainer", wanted)):
        print(f"{who}: {median(result['seconds'][2:]):.2f} s a step, peak {', '.join(f'{peak:.0f}' for peak in result['peaks'])} MiB")


if __name__ == "__main__":
    main()
