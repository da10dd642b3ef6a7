"""The table of all settings, made from the code, for `rayllp settings` and the docs.

python -m rayllp.report.settings     # updates the tables in docs/trainer.md and docs/settings.md of a checkout
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from rayllp.config import TrainConfig

WORTH_KNOWING = (
    "model.family model.layers model.width data.path data.dataset data.tokenizer sequence_length batch_size steps workers mesh.data mode "
    "solver windows.length recompute mgrit.coarsening mgrit.levels.forward mgrit.levels.backward "
    "mgrit.iterations.forward mgrit.iterations.backward "
    "mgrit.coarse_step_weight buffers.open buffers.close step.middle "
    "adaptive.rule adaptive.probe_every adaptive.consistency adaptive.switch_at optimizer.name optimizer.lr"
).split()
BEGIN, END = "<!-- settings: ", "<!-- end of settings -->"


def settings_table(only: Collection[str] | None = None) -> str:
    """Return a Markdown table of settings: name, type, default and meaning.

    Args:
        only: names of the settings to include; None: all.
    """
    lines = ["| setting | takes | default | meaning |", "|---|---|---|---|"]
    rows = [row for row in _rows(TrainConfig()) if only is None or row[0] in only]
    lines += [f"| `{name}` | {kind} | `{default}` | {text} |" for name, kind, default, text in rows]
    return "\n".join(lines)


def documents(root: Path) -> dict[Path, str]:
    """Return the texts of docs/trainer.md and docs/settings.md, with tables made from the code.

    Args:
        root: the checkout.
    """
    chosen = root / "docs" / "trainer.md"
    before, _, rest = chosen.read_text(encoding="utf-8").partition(BEGIN)
    comment, _, rest = rest.partition("\n")
    after = rest.partition(END)[2]
    return {
        chosen: f"{before}{BEGIN}{comment}\n{settings_table(WORTH_KNOWING)}\n{END}{after}",
        root / "docs" / "settings.md": f"# Every setting\n\nSet by YAML or `--set name=value`.\n\n{settings_table()}\n",
    }


def _rows(settings: BaseModel, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield from _rows(value, f"{prefix}{name}.")
        else:
            yield prefix + name, _kind(field.annotation), _plain(value), (field.description or "").replace("|", "\\|")


def _kind(annotation: Any) -> str:
    arguments, origin = get_args(annotation), get_origin(annotation)
    if origin is Literal:
        return ", ".join(str(argument) for argument in arguments)
    if origin in (Union, type(int | str)):
        return " or ".join(_kind(argument) for argument in arguments if argument is not type(None))
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is tuple:
        return "list of " + _kind(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(f"{name}: {_kind(field.annotation)}" for name, field in annotation.model_fields.items()) + "}"
    return {int: "integer", float: "number", str: "text", bool: "true or false"}.get(annotation, str(annotation))


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)


if __name__ == "__main__":
    for path, text in documents(Path()).items():
        path.write_text(text, encoding="utf-8")
