"""Which stored models a family can start from, by transformers' model types; post-LN ones are refused."""

from collections.abc import Mapping

from rayllp.errors import SettingsError

# Post-LN model types, each with the family that is its pre-LN relative. A stored "bert" is post-LN too; our family "bert" is pre-LN.
POST_LN = dict.fromkeys(("roberta", "distilbert", "albert", "electra", "camembert", "xlm-roberta", "deberta", "deberta-v2"), "bert")
POST_LN |= {"openai-gpt": "gpt2", "marian": "mt", "bart": "mt", "fsmt": "mt"}
STORED_POST_LN = {**POST_LN, "bert": "bert"}


def check_model_type(stored: str, ours: str, source: str) -> None:
    """Refuse a checkpoint of another model type than the family's."""
    if stored == ours:
        return
    refuse_post_ln(stored, f"model.from_pretrained {source}: {stored}", STORED_POST_LN)
    raise SettingsError(
        f"model.from_pretrained {source} is a {stored or 'model of no type'}, but the family's model is a {ours}: set model.family to "
        "match, or add an adapter for it (docs/families.md)"
    )


def refuse_post_ln(name: str, what: str, relatives: Mapping[str, str] = POST_LN) -> None:
    """Refuse a post-LN model and name its pre-LN relative."""
    if name in relatives:
        raise SettingsError(
            f"{what} is post-LN: its norms follow the residual sum, so that a layer is no step x + h·F(x) and MGRIT does not apply. "
            f"Use its pre-LN relative, model.family={relatives[name]}"
        )
