"""Check that tensors read from a file are those that a network has."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(
    expected: Shapes, found: Shapes, target: str, *, source: str = "", advice: str = ""
) -> None:
    """Check that both have the same names and shapes.

    Args:
        expected: the network's tensors, as from `shapes_of(network.state_dict())`.
        found: those of the file.
        target: what the tensors should fit, such as "its config".
        source: the file, named at the start of the message.
        advice: what to do, at the end of the message.

    Raises:
        ValueError: tensors are missing, left over, or of another shape; the message counts them
            and quotes the first.
    """
    names = sorted(expected.keys() | found.keys())
    wrong = [name for name in names if expected.get(name) != found.get(name)]
    if wrong:
        raise ValueError(
            f"{source}{': ' if source else ''}{len(wrong)} tensors do not fit {target}, "
            f"first {wrong[0][:200]!r}: expected {expected.get(wrong[0], 'none')}, "
            f"found {found.get(wrong[0], 'none')}{'; ' if advice else ''}{advice}"
        )
