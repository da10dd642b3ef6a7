"""The base class of all groups of settings."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of all groups of settings: immutable, and unknown names are refused."""

    # A number that is not finite is a mistake (1e400, a division in a script): training would give NaN, or never end. So is an empty text
    # (an unset variable of the shell), which would count as "not set".
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False, str_min_length=1)
