"""Refuse post-LN models, to which MGRIT does not apply, and name their pre-LN relatives; transformers is not imported for it."""

from collections.abc import Mapping

from rayllp.errors import SettingsError

# Post-LN model types, each with the family that is its pre-LN relative. A stored "bert" is post-LN too; our family "bert" is pre-LN.
POST_LN = dict.fromkeys(("roberta", "distilbert", "albert", "electra", "camembert", "xlm-roberta", "deberta", "deberta-v2"), "bert")
POST_LN |= {"openai-gpt": "gpt2", "marian": "mt", "bart": "mt", "fsmt": "mt"}
STORED_POST_LN = {**POST_LN, "bert": "bert"}


def refuse_post_ln(name: str, what: str, relatives: Mapping[str, str] = POST_LN) -> None:
    """Refuse a post-LN model and name its pre-LN relative."""
    if name in relatives:
        raise SettingsError(
            f"{what} is post-LN: its norms follow the residual sum, so that a layer is no step x + h·F(x) and MGRIT does not apply. "
            f"Use its pre-LN relative, model.family={relatives[name]}"
        )
