"""Sizes that a pretrained checkpoint fixes, read from its config.json, so that they need not be set again."""

import json
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

# Our setting: what transformers' configurations call it.
NAMES = {
    "width": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "encoder_attention_heads"),
    "feed_forward": ("intermediate_size", "n_inner", "encoder_ffn_dim"),
    "kv_heads": ("num_key_value_heads",),
    "patch_size": ("patch_size",),
    "encoder_layers": ("encoder_layers",),
}
LAYERS = ("num_hidden_layers", "n_layer")


def model_type(source: str) -> str:
    """What transformers calls the model of a local checkpoint; empty where that cannot be known."""
    path = Path(source) / "config.json"
    return str(json.loads(path.read_text()).get("model_type", "")) if path.is_file() else ""


def with_pretrained_sizes(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`values` with the sizes of model.from_pretrained where they were not given; as they are without a local config.json."""
    model = values.get("model")
    source = model.get("from_pretrained") if isinstance(model, Mapping) else None
    path = Path(str(source)) / "config.json"
    if not source or not path.is_file():
        return values
    stored = json.loads(path.read_text())
    config = stored.get("transformers_config", stored)
    found = {ours: next((config[name] for name in names if config.get(name) is not None), None) for ours, names in NAMES.items()}
    layers = next((config[name] for name in LAYERS if name in config), None)
    if config.get("encoder_layers") and config.get("decoder_layers"):
        layers = config["encoder_layers"] + config["decoder_layers"]
    given = {**{name: size for name, size in {**found, "layers": layers}.items() if size is not None}, **dict(model or {})}
    return {**_steps(stored.get("step_sizes")), **values, "model": given}


def _steps(sizes: list[float] | None) -> dict[str, Any]:
    """step and buffers of a network whose layers have these Δt: the middle is what is not as long as its ends."""
    if not sizes:
        return {"step": {"middle": 1.0}, "buffers": {"open": 0, "close": 0}}
    middle = sizes[len(sizes) // 2]
    ends = [len(list(takewhile(lambda size: size != middle, side))) for side in (sizes, sizes[::-1])]
    return {
        "step": {"middle": middle, "buffer": sizes[0] if ends[0] else sizes[-1] if ends[1] else 1.0},
        "buffers": {"open": ends[0], "close": ends[1]},
    }
