"""Which of transformers' model types train here: a tiny random network of each, against transformers' own forward and backward.

    python examples/architectures.py --results types.jsonl [--tasks causal masked …] [--types qwen3 …]
    python examples/architectures.py --results types.jsonl --docs docs        # architectures.md, from what has been found

A type trains if outputs, loss and every gradient of exact steps on 1, 2 and 3 workers equal the model's own to 1e-9 in float64, and so do
those of enough MGRIT iterations on 2 workers (post-norm types are refused there). The table says so, or why the type is refused.
"""

import argparse
import gc
import json
import signal
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from rayllp.channel import LocalChannel, run_workers
from rayllp.config import TrainConfig, make_config
from rayllp.control import Accuracy
from rayllp.data import IGNORE, Batches, DatasetFacts
from rayllp.engine import Engine
from rayllp.engine.batch import EXACT
from rayllp.engine.reduce_gradients import add_shared_gradients
from rayllp.errors import SettingsError
from rayllp.models import build_architecture
from rayllp.models.model_types import CLASSES

TITLES = {
    "causal": "Causal language models",
    "masked": "Masked language models",
    "images": "Image classification",
    "translation": "Encoder–decoders",
}
VOCABULARY, PAD, IMAGE, LABELS, LENGTH, LIMIT_S = 96, 95, (3, 32, 32), ("a", "b", "c"), 10, 300
ENOUGH = Accuracy(serial=False, levels_forward=2, levels_backward=2, iterations_forward=4, iterations_backward=4)
TOLERANCE, TOLERANCE_IN_FLOAT32 = 1e-9, 1e-6
"""The second where a type computes norms or outputs in float32 whatever its dtype: several workers or iterations then round elsewhere."""
ROUNDED = "trains (float32 within)"
SMALL = {
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "kv_channels": 8, "attention_head_dim": 8,
    "state_size": 8, "conv_kernel": 4, "word_embed_proj_dim": 32, "embedding_size": 32, "rotary_dim": 4, "moe_num_experts": 4,
    "ffn_hidden_size": 64, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "global_head_dim": 8,
    "num_global_key_value_heads": 2, "num_channels": 3, "rotary_pct": 1.0, "sliding_window": 6, "attention_window": 4, "block_size": 4,
    "moe_k": 2, "num_experts_per_token": 2, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0,
}  # fmt: skip
"""Sizes of what only some have, so that a network is tiny; those that a type does not know are left out."""
SPECIAL = {
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "xlnet": {"d_head": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
    "modernbert-decoder": {"pad_token_id": 0},
    "reformer": {"is_decoder": True},
    "lfm2_moe": {"layer_types": ["full_attention"] * 6},
    "dots3_note_text": {"num_key_value_heads": 4},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 6},
    "deepseek_v32": {"qk_rope_head_dim": 8, "index_head_dim": 8},
    "glm_moe_dsa": {"qk_rope_head_dim": 8, "index_head_dim": 8},
    "axk2": {"qk_rope_head_dim": 8, "index_head_dim": 8},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp"] * 2, "mamba_num_heads": 8, "mamba_head_dim": 8},
    "dbrx": {"tie_word_embeddings": False},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    "esmc": {"num_key_value_heads": 4},
    "led": {"attention_window": 10},
    "perceiver": {
        "num_self_attends_per_block": 6,
        "num_blocks": 1,
        "d_latents": 32,
        "num_latents": 6,
        "d_model": 32,
        "image_size": 32,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 1,
    },
}
"""By type, what it needs besides."""


class Random(Batches):
    """Random tokens or images, padded where the task knows any padding."""

    def __init__(self, task: str) -> None:
        self.task = task

    @property
    def facts(self) -> DatasetFacts:
        padded = self.task in ("masked", "translation")
        return DatasetFacts(
            vocabulary=VOCABULARY,
            classes=LABELS if self.task == "images" else (),
            pad=PAD if padded else None,
            bos=1,
            eos=2,
            image=IMAGE if self.task == "images" else None,
        )

    def batch(self, split: str, step: int, size: int) -> tuple[Any, Tensor]:
        g = torch.Generator().manual_seed(step)
        if self.task == "images":
            return torch.randn(size, *IMAGE, generator=g), torch.randint(0, 3, (size,), generator=g)
        tokens = torch.randint(3, PAD, (2, size, LENGTH), generator=g)
        targets = torch.randint(3, PAD, (size, LENGTH), generator=g)
        if self.task == "causal":
            return tokens[0], targets
        lengths = torch.tensor([LENGTH, 7, 5, 8])[:size, None]
        tokens = torch.where(torch.arange(LENGTH) < lengths, tokens, PAD)
        targets = targets.masked_fill(tokens[-1] == PAD, IGNORE)
        return (tuple(tokens) if self.task == "translation" else tokens[1]), targets


def config_of(task: str, kind: str, workers: int, mode: str) -> TrainConfig:
    known = set(vars(transformers.CONFIG_MAPPING[kind]()))
    return make_config({
        "model": {
            "architecture": kind, "head": task, "layers": 6, "width": 32, "heads": 4, "kv_heads": 2, "feed_forward": 64, "patch_size": 8,
            "config_overrides": {**{name: value for name, value in SMALL.items() if name in known}, **SPECIAL.get(kind, {})},
        },
        "buffers": {"open": 0, "close": 0}, "step": {"middle": 1.0}, "sequence_length": LENGTH,
        "batch_size": 4, "steps": 2, "dtype": "float64", "mode": mode, "workers": workers, "microbatches": 1,
        "solver": "mgrit", "mgrit": {"coarsening": 2}, "adaptive": {"probe_every": 0, "consistency": 0},
    })  # fmt: skip


def ours(config: TrainConfig, accuracy: Accuracy) -> tuple[dict[str, Any], dict[str, Tensor], Tensor, float]:
    """Gradients, weights, outputs and loss, of worker threads."""

    def work(channel: Any) -> Any:
        data = Random(config.model.task)
        engine = Engine(build_architecture(config, data.facts), config, data, channel, LocalChannel.alone(), torch.device("cpu"))
        outputs: list[Tensor] = []
        batch, architecture = engine.step_batch(1, accuracy), engine.block.architecture
        leave = architecture.leave
        architecture.leave = lambda *given: outputs.append(leave(*given)) or outputs[-1]  # type: ignore
        formed = engine.gradients(batch)
        add_shared_gradients(engine.block, engine.layer_channel, 1)
        parameters = engine.block.parameters
        weights = {name: p.detach() for name, p in parameters.items()}
        return {name: p.grad for name, p in parameters.items()}, weights, outputs[0].detach() if outputs else None, formed.loss

    everyone = run_workers(config.layer_workers, work)
    gradients = {name: value for worker in everyone for name, value in worker[0].items()}
    weights = {name: value for worker in everyone for name, value in worker[1].items()}
    return gradients, weights, *everyone[-1][2:]


def theirs(config: TrainConfig, weights: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor, float]:
    """The same of transformers' own model with these weights."""
    data = Random(config.model.task)
    architecture = build_architecture(config, data.facts)
    model = architecture.model_class._from_config(architecture.config, attn_implementation=architecture.config._attn_implementation)
    model = model.double().train()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected:
        raise AssertionError(f"transformers does not know {unexpected[:3]}")
    parameters = dict(model.named_parameters())
    unfilled = [name for name in missing if name in parameters and not any(parameters[name] is model.get_parameter(w) for w in weights)]
    inputs, targets = data.batch("train", 1, config.batch_size)
    arguments = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in architecture.arguments(inputs).items()
    }
    outputs = model(**arguments).logits
    loss = architecture.loss(outputs, targets) / architecture.count(targets)
    loss.backward()
    left = [name for name in unfilled if parameters[name].grad is not None]
    if left:
        raise AssertionError(f"weights that no worker has, but the model uses: {left[:3]}")
    everyone = dict(model.named_parameters(remove_duplicate=False))
    return {name: everyone[name].grad for name in weights}, outputs.detach(), float(loss.detach())


def difference(a: Tensor, b: Tensor) -> float:
    """Of two tensors, relative to the larger of 1 and the second's largest element."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0))


def compare(found: Any, wanted: Any) -> float:
    """The largest difference of outputs, loss and gradients."""
    gradients, _, outputs, loss = found
    their_gradients, their_outputs, their_loss = wanted
    worst = max(difference(outputs, their_outputs), abs(float(loss.detach()) - their_loss))
    for name, gradient in their_gradients.items():
        mine = gradients.get(name)
        if gradient is not None or mine is not None:
            worst = max(worst, difference(*(torch.zeros(()) if each is None else each for each in (mine, gradient))))
    return worst


def outcome_of(result: dict[str, Any]) -> str:
    """By the largest difference."""
    within = max(result["worst"], result["iterated"])
    return "trains" if within <= TOLERANCE else ROUNDED if within <= TOLERANCE_IN_FLOAT32 else "differs"


def check(task: str, kind: str) -> dict[str, Any]:
    """What became of a type: trains, refused or not constructible, and why."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {LIMIT_S} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    worst = 0.0
    try:
        config = config_of(task, kind, 1, "serial")
        found = ours(config, EXACT)
        wanted = theirs(config, found[1])
        worst = compare(found, wanted)
        for workers in (2, 3):
            worst = max(worst, compare(ours(config_of(task, kind, workers, "serial"), EXACT), wanted))
        try:
            iterated, parallel = compare(ours(config_of(task, kind, 2, "parallel"), ENOUGH), wanted), ""
        except SettingsError as error:
            iterated, parallel = 0.0, str(error)
        told = {"task": task, "type": kind, "worst": worst, "iterated": iterated, "parallel": not parallel, "why": parallel}
        return {**told, "outcome": outcome_of(told)}
    except SettingsError as error:
        sizes = ("transformers cannot make a", "is made of several networks")
        outcome = "not constructible" if any(each in str(error) for each in sizes) else "refused"
        return {"task": task, "type": kind, "outcome": outcome, "why": str(error)}
    except Exception as error:
        return {"task": task, "type": kind, "outcome": "fails", "why": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    finally:
        signal.alarm(0)
        gc.collect()


def table(results: list[dict[str, Any]]) -> str:
    """The results of a task, by type."""
    lines = ["| type | outcome | exact steps | iterations | why |", "|---|---|---|---|---|"]
    for result in sorted(results, key=lambda each: each["type"]):
        exact = f"{result['worst']:.0e}" if "worst" in result else ""
        iterated = f"{result['iterated']:.0e}" if result.get("parallel") else ""
        why = (
            "exact steps only (post-norm)"
            if result["outcome"].startswith("trains") and result["why"]
            else " ".join(result["why"].split())[:160]
        )
        why = why.replace("|", "/").replace("[", r"\[")  # no cell's end, and no link
        lines.append(f"| {result['type']} | {result['outcome']} | {exact} | {iterated} | {why} |")
    return "\n".join(lines)


def write(results: Path, docs: Path) -> None:
    """The page of all types, each by its latest result."""
    latest = {(each["task"], each["type"]): each for each in map(json.loads, results.read_text(encoding="utf-8").splitlines())}
    for result in latest.values():
        if "iterated" in result:
            result["outcome"] = outcome_of(result)
    parts = [PAGE.format(version=transformers.__version__)]
    for task, title in TITLES.items():
        of_task = [result for (known, _), result in latest.items() if known == task]
        counted = Counter(result["outcome"] for result in of_task)
        parts.append(f"## {title}\n\n{', '.join(f'{outcome} {n}' for outcome, n in counted.most_common())}.\n\n{table(of_task)}")
    (docs / "architectures.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


PAGE = """# Which model types train

Made by `python examples/architectures.py` with transformers {version}. It compares every type, as a tiny random network of six layers, with
transformers' own forward and backward pass in float64. The columns "exact steps" and "iterations" give the largest difference, relative
to the larger of 1 and the tensor's largest element. Outcomes are:

- **trains**: outputs, loss and every gradient equal the model's own, for exact steps on 1, 2 and 3 workers and for enough MGRIT
  iterations on 2 workers;
- **trains (float32 within)**: the same up to float32 rounding, as the type computes norms or outputs in float32 whatever its dtype, and
  several workers and iterations add in another order;
- **refused**: with a reason, before training;
- **not constructible**: not with the sizes that this script sets; a checkpoint may work;
- **fails**: in transformers, or on the inputs that this script makes up."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--types", nargs="+")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, added to")
    parser.add_argument("--docs", type=Path, help="only write the page of what RESULTS has")
    arguments = parser.parse_args()
    if arguments.docs:
        write(arguments.results, arguments.docs)
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    counted: Counter[tuple[str, str]] = Counter()
    for task in arguments.tasks:
        for kind in sorted(CLASSES[task]):
            if arguments.types and kind not in arguments.types:
                continue
            began = time.perf_counter()
            result = check(task, kind)
            counted[task, result["outcome"]] += 1
            print(
                f"{time.perf_counter() - began:5.1f} s",
                task,
                kind,
                result["outcome"],
                f"{result.get('worst', 0):.1e}",
                result["why"][:230],
                flush=True,
            )
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    print(dict(counted))


if __name__ == "__main__":
    main()
