"""bitsandbytes, where it is installed: 8-bit moments and 4-bit weights."""

from __future__ import annotations

from types import ModuleType

from grpo.errors import UserError


def import_bitsandbytes(key: str) -> ModuleType:
    """The library. Raises UserError that names the recipe's ``key`` where it is missing."""
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(f"{key} needs bitsandbytes, which is not installed: pip install 'grpo-train[8bit]'") from None
    return bitsandbytes
