"""Check that torch can use a device here."""

from __future__ import annotations

import torch


def usable_device(name: str | torch.device | None, option: str = "the device") -> torch.device:
    """Return a device after a small computation on it; a GPU, if there is one, for None.

    Args:
        option: how the message calls it.

    Raises:
        ValueError: torch cannot use it, or there is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        advice = "" if str(name) == "cpu" else "; give another one, such as cpu"
        raise ValueError(f"{option} {str(name)[:60]} cannot be used here: {why}{advice}") from error
    return device
