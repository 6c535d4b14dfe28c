"""How what happens between two network calls is computed: the user's choice of a method, and torch.compile where that is it.

`fusible` marks a function whose operations torch.compile makes a few loops of. It takes and gives tensors, numbers, and objects
made of tensors (`Parts`). Its code is written once: it runs as it stands, or compiled.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

METHODS = (
    "plain",
    "tiled",
    "compiled",
    "triton",
)  # see `gmflow_core.rollout`; all but the third are of rollouts only
METHOD_VARIABLE = "GMFLOW_METHOD"  # of the environment
OPTIONS = {  # of torch.compile's inductor
    "max_fusion_size": 512,
    "cpp.enable_floating_point_contract_flag": "fast",
    "size_asserts": False,
}


def chosen_method(method: str | None = None) -> str | None:
    """`method`, else the environment's GMFLOW_METHOD, else None for the usual way.

    Raises:
        ValueError: there is no such method.
    """
    method = method or os.environ.get(METHOD_VARIABLE) or None
    if method is not None and method not in METHODS:
        known = ", ".join(METHODS)
        raise ValueError(
            f"method {method!r} (of the argument, or of {METHOD_VARIABLE}) is unknown; take one of {known}"
        )
    return method


class Parts:
    """An object that is its attributes: tensors, numbers, or Parts. What is cached in one has a name that begins with "_"."""

    def settled(self) -> Parts:
        """The same, where something that was computed since can take its place."""
        return self


def fusible(function: Callable) -> Callable:
    """A function that is compiled where the method is "compiled" and no gradient is asked for: from the second call with
    arguments of a kind on, and again for sizes that are new to it. Its results are made of tensors only. Numbers reach the
    compiled code as tensors without dimensions, but for integers, which are part of the kind. Where torch.compile fails, the
    log says so once and the function runs as it stands.
    """

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or chosen_method() != "compiled" or _resting.get():
            return function(*arguments)
        return run.compiled(*arguments)

    run.compiled = functools.partial(_run_compiled, function)  # whatever was chosen
    return run


_resting: ContextVar[bool] = ContextVar(
    "resting", default=False
)  # while all is part of what will be compiled


class _Program:
    """A function compiled for arguments of this template, with a result like this one."""

    def __init__(self, function: Callable, template: Any, result: Any):
        def of_tensors(numbers: Tensor | None, *tensors: Tensor) -> list[Tensor]:
            given = _put_together(
                template, iter(tensors), iter(() if numbers is None else numbers.unbind())
            )
            found: list[Tensor] = []
            _take_apart(function(*given), found, [], [])
            return found

        self.run, self.result = compiled(of_tensors), _template(result)


_programs: dict[tuple, _Program] = {}


def _run_compiled(function: Callable, *arguments: Any) -> Any:
    tensors, numbers, kind = [], [], [function]
    _take_apart(arguments, tensors, numbers, kind)
    kind = tuple(kind)
    if kind in declined or _any_followed(tensors) or not tensors[0].numel():
        return function(*arguments)
    program = _programs.get(kind)
    if program is None:  # what the result is made of is seen in the first
        logging.info(
            "GMFlow: %s will be compiled when it comes again: this takes a while",
            function.__qualname__,
        )
        template = _template(arguments)  # now: the function may settle some
        token = _resting.set(True)
        try:
            result = function(*arguments)
        finally:
            _resting.reset(token)
        _programs[kind] = _Program(function, template, result)
        return result
    try:
        found = program.run(_in_one_tensor(numbers, tensors[0].device), *tensors)
    except NotCompiled as error:
        declined.add(kind)
        log_once(f"GMFlow: {function.__qualname__} is not compiled ({error}); it runs as it stands")
        return function(*arguments)
    return _put_together(program.result, iter(found), iter(()))


def compiles(*values: Any) -> bool:
    """Whether a fusible function of these values is compiled."""
    return chosen_method() == "compiled" and not followed(*values)


def followed(*values: Any) -> bool:
    """Whether autograd follows a tensor, or one in a tuple or in Parts."""
    if not torch.is_grad_enabled():
        return False
    tensors: list[Tensor] = []
    _take_apart(values, tensors, [], [])
    return _any_followed(tensors)


def _any_followed(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)


def _in_one_tensor(numbers: list[float], device: torch.device) -> Tensor | None:
    """In double precision where the device has it."""
    if not numbers:
        return None
    if device.type == "cpu":
        return torch.tensor(numbers, dtype=torch.float64)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.stack(
        [torch.full((), each, dtype=dtype, device=device) for each in numbers]
    )  # fills, which wait for nothing


def _take_apart(value: Any, tensors: list[Tensor], numbers: list[float], kind: list) -> None:
    """Adds the tensors and the numbers of `value`, and what is the same for all values that one program serves."""
    if isinstance(value, Parts):
        value = value.settled()
        kind.append(type(value))
        for name, each in value.__dict__.items():
            if name[0] == "_":
                continue
            if type(each) is Tensor:  # most are, and this is called often
                tensors.append(each)
                kind.append(
                    each.shape[1:3] if name == "means" else None
                )  # K and C, for which code is made
            else:
                _take_apart(each, tensors, numbers, kind)
    elif isinstance(value, Tensor):
        tensors.append(value)
        kind.append(Tensor)
    elif _is_number(value):
        numbers.append(float(value))
        kind.append(float)
    elif isinstance(value, tuple):
        kind.append(len(value))
        for each in value:
            _take_apart(each, tensors, numbers, kind)
    else:
        kind.append(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, Real) and not isinstance(value, Integral))


def _template(value: Any) -> Any:
    """`value` without its tensors and numbers, for `_put_together`."""
    if isinstance(value, Tensor):
        return Tensor
    if _is_number(value):
        return float
    if isinstance(value, tuple):
        return tuple, (), tuple([_template(each) for each in value])
    if isinstance(value, Parts):
        value = value.settled()
        names = tuple([name for name in value.__dict__ if name[0] != "_"])
        return type(value), names, tuple([_template(value.__dict__[name]) for name in names])
    return None, value, ()


def _put_together(template: Any, tensors: Iterator[Tensor], numbers: Iterator[Tensor]) -> Any:
    """A value like that of the template, with other tensors and numbers."""
    if template is Tensor:
        return next(tensors)
    if template is float:
        return next(numbers)
    kind, about, parts = template
    if kind is None:
        return about
    values = [_put_together(part, tensors, numbers) for part in parts]
    if kind is tuple:
        return tuple(values)
    made = object.__new__(kind)
    made.__dict__.update(zip(about, values, strict=True))
    return made


# torch.compile
class NotCompiled(RuntimeError):
    """torch.compile failed, for one of its many reasons."""


_copies = itertools.count()


def compiled(function: Callable) -> Callable:
    """`function` by torch.compile: compiled at the first call, and again for sizes and layouts that are new to it, of which
    each copy has its own count.

    Raises (when called):
        NotCompiled: torch.compile failed.
    """
    name = f"{function.__name__}_{next(_copies)}"  # by file, line and name torch.compile remembers which sizes change
    copy = types.FunctionType(
        function.__code__.replace(co_name=name),
        function.__globals__,
        name,
        function.__defaults__,
        function.__closure__,
    )

    @functools.cache
    def used() -> Callable:
        return torch.compile(copy, fullgraph=True, options=_options())

    def run(*arguments):
        try:
            return used()(*arguments)
        except Exception as error:
            raise NotCompiled(f"{type(error).__name__}: {error}".splitlines()[0]) from error

    return run


def _options() -> dict[str, Any]:
    """Those of OPTIONS that this version of torch knows."""
    from torch._inductor import list_options  # takes a while, and is not in every build

    known = list_options()
    options = {name: value for name, value in OPTIONS.items() if name in known}
    if hasattr(torch.compiler, "keep_tensor_guards_unsafe"):  # versions with such filters
        options["guard_filter_fn"] = _guards_of_arguments
    return options


OF_THE_CODE = {
    "BUILTIN_MATCH",
    "CLASS_MATCH",
    "CLOSURE_MATCH",
    "CONSTANT_MATCH",
    "EQUALS_MATCH",
    "ID_MATCH",
    "MODULE_MATCH",
}


def _guards_of_arguments(guards: list) -> list[bool]:
    """Which checks before every call are kept: not those of whether a program's own code and constants are still the same, as
    they are for good, and to look at them takes longer than all the others."""
    return [guard.guard_type not in OF_THE_CODE for guard in guards]


# What is told
declined: set[tuple] = set()  # kinds that a method does not serve


@functools.cache
def log_once(message: str) -> None:
    """A warning in the log, the first time."""
    logging.warning(message)
