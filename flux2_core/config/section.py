"""What every section of the configuration is, and the kinds of number that several of them have."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

Dtype = Literal["bf16", "fp16", "fp32"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
EPOCH = "epoch"  # an interval that is as long as an epoch


def interval(least: int) -> AfterValidator:
    """Allow so many steps from `least` on, "epoch", or such as "500 samples"."""

    def allowed(given: int | str) -> int | str:
        if least <= given if isinstance(given, int) else re.fullmatch(rf"{EPOCH}|[1-9]\d{{0,8}} samples?", given):
            return given
        raise ValueError(f'an interval is a number of steps from {least} on, "{EPOCH}", or such as "500 samples"')

    return AfterValidator(allowed)


class Section(BaseModel):
    """A frozen section; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", check_fields=False)
    @classmethod
    def _holds_no_password(cls, value: Any) -> Any:
        """A configuration is stored, shown and copied: it never holds a secret."""
        texts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(text, str) and re.match(r"[a-z0-9]+://[^/]*@", text) for text in texts):
            raise ValueError("a URL with a name or password in it; credentials come from the environment")
        return value
