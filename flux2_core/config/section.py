"""What every section of the configuration is, and the kinds of number that several of them have."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Dtype = Literal["bf16", "fp16", "fp32"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


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
