"""torch.compile for the pure functions of this folder, and what the log says of machine forms."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

OPTIONS = {"max_fusion_size": 512, "cpp.enable_floating_point_contract_flag": "fast"}


class NotCompiledError(RuntimeError):
    """torch.compile failed: no C++ compiler, an unsupported platform, and so on."""


def compiled(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Callable:
    """Compile a function of tensors with torch.compile, at its first call.

    Raises (when called):
        NotCompiledError: torch.compile failed; the message says why, in one line.
    """
    program = None

    def run(*arguments):
        nonlocal program
        try:
            if program is None:
                from torch._inductor import config  # takes a second, so not at import

                known = config.get_config_copy()  # older versions lack some, or of other types
                options = {
                    name: value
                    for name, value in OPTIONS.items()
                    if isinstance(known.get(name), type(value))
                }
                program = torch.compile(function, fullgraph=True, options=options)
            return program(*arguments)
        except Exception as error:  # torch.compile has many kinds, of several packages
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise NotCompiledError(reason) from error

    return run


declined: set[Hashable] = set()  # kinds of calls that a machine form cannot serve


def decline(
    kind: Hashable, what: str, error: Exception, instead: str = "the plain form takes its place"
) -> None:
    """Remember that a machine form cannot serve `kind`; log once what runs instead."""
    declined.add(kind)
    reason = (
        str(error) if isinstance(error, NotCompiledError) else f"{type(error).__name__}: {error}"
    )
    log_once(f"GMFlow: {what} ({reason.splitlines()[0]}); {instead}")


@functools.cache
def log_once(message: str) -> None:
    """Log a warning, the first time only."""
    logging.warning(message)
