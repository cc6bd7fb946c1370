"""The model of `transformers` inside of what other packages wrap around it."""

from __future__ import annotations

import sys
from typing import Any


def unwrap(model: Any) -> Any:
    """The model inside of a `PeftModel`; every other one is returned as it is.

    peft puts its layers into that model itself, so that it computes with them either way.
    """
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel):
        return model.get_base_model()
    return model
