"""What every group of settings is."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of every group of settings: immutable, no unknown names."""

    # A number that is not finite is a slip (1e400, a division in a script): it would train to NaN, or never end. So is an empty text
    # (a variable of the shell that is not set): it would count as none.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False, str_min_length=1)
