"""Training on a corpus larger than one would hold in memory: memory of driver and workers, and seconds to the first step, twice.

    python examples/benchmarks/large_corpus.py TEXT [TEXT …] --folder DIRECTORY [--gb 4] [--tokenizer characters] [--steps 30]

The corpus is made in DIRECTORY from the given texts (.gz allowed): their lines, again and again, each time in another order. It is
tokenised by a process that does nothing else, as the first training on it would; then a small GPT-2 trains on it on two workers. Memory is
read twice a second: a process's own, what it shares with others (Ray's object store), and pages of files, which the system takes back when
it needs them.
"""

import argparse
import contextlib
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil


def make_corpus(texts: list[Path], path: Path, size: int) -> None:
    """Write so many bytes of the texts' lines."""
    lines = [line for text in texts for line in _read(text).splitlines(keepends=True) if line.strip()]
    generator, written = random.Random(0), 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            generator.shuffle(lines)
            block = "".join(lines)
            written += file.write(block)


def _read(path: Path) -> str:
    return (gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")).read()


def memory_of(process: psutil.Process) -> dict[str, int]:
    """Bytes by kind."""
    with open(f"/proc/{process.pid}/status", encoding="utf-8") as file:
        fields = dict(line.split(":", 1) for line in file if line.startswith("Rss"))
    return {name: int(fields[field].split()[0]) * 1024 for name, field in (("own", "RssAnon"), ("shared", "RssShmem"), ("file", "RssFile"))}


def watch(command: list[str], log: Path, metrics: Path | None = None) -> dict[str, Any]:
    """Run a command; its seconds, those to the first line of `metrics`, and the most memory of each process."""
    began, first, most = time.time(), None, dict[str, dict[str, int]]()
    with log.open("w", encoding="utf-8") as file:
        driver = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while driver.poll() is None:
            time.sleep(0.5)
            if first is None and metrics is not None and metrics.is_file() and metrics.stat().st_size:
                first = time.time() - began
            for name, process in _processes(driver.pid):
                with contextlib.suppress(OSError, KeyError):
                    now = memory_of(process)
                    most[name] = {kind: max(most.get(name, now)[kind], now[kind]) for kind in now}
    if driver.returncode:
        raise SystemExit(f"failed: {log.read_text(encoding='utf-8')[-2000:]}")
    return {"first step": first, "seconds": time.time() - began, "memory": most}


def _processes(driver: int) -> list[tuple[str, psutil.Process]]:
    try:
        parent = psutil.Process(driver)
        found = [("driver", parent)]
        workers = [process for process in parent.children(recursive=True) if "BlockWorker" in " ".join(process.cmdline())]
        return found + [(f"worker {number}", process) for number, process in enumerate(sorted(workers, key=lambda process: process.pid))]
    except psutil.Error:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--tokenizer", default="characters")
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    corpus, cache = arguments.folder / "corpus.txt", arguments.folder / "cache"
    if not corpus.exists():
        make_corpus(arguments.texts, corpus, int(arguments.gb * 1e9))
    print(f"corpus: {corpus.stat().st_size:,} bytes; {psutil.virtual_memory().total / 1e9:.1f} GB of memory", flush=True)
    run, data = arguments.folder / "run", {"path": str(corpus), "tokenizer": arguments.tokenizer, "cache": str(cache)}
    for folder in (cache, run):
        shutil.rmtree(folder, ignore_errors=True)
    code = f"from rayllp import make_config; from rayllp.data import load_data; load_data(make_config({{'data': {data!r}}}))"
    made = watch([sys.executable, "-c", code], arguments.folder / "tokenise.log")
    print(json.dumps(made), flush=True)
    settings = {f"data.{name}": value for name, value in data.items()} | {
        "sequence_length": 256, "batch_size": 16, "steps": arguments.steps, "workers": 2, "eval.every": 0, "eval.sample": 0,
    }  # fmt: skip
    command = [sys.executable, "-m", "rayllp", "train", "--output", str(run)]
    command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    trained = watch(command, arguments.folder / "train.log", run / "metrics.jsonl")
    print(json.dumps(trained), flush=True)
    size = sum(path.stat().st_size for path in cache.rglob("*.bin"))
    print(f"\n{size / 1e9:.2f} GB of tokens made in {made['seconds']:.0f} s; with them, {trained['first step']:.0f} s to the first step")
    print("\n| most memory, MiB | own | shared | pages of files |\n|---|---|---|---|")
    for name, memory in {"tokenising": made["memory"]["driver"], **trained["memory"]}.items():
        print(f"| {name} | " + " | ".join(f"{memory[kind] / 2**20:,.0f}" for kind in ("own", "shared", "file")) + " |")


if __name__ == "__main__":
    os.environ.setdefault("RAY_worker_niceness", "0")
    main()
