"""Guard what ComfyUI calls: inputs have the types of the schema, and errors can be printed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from ...gmflow_core.files.errors import make_printable, printable
from .input_checks import check_inputs, check_lists
from .notices import clear

DOORS = ("execute", "fingerprint_inputs", "validate_inputs")  # methods that ComfyUI calls


def guarded(function: Callable) -> Callable:
    """Return the function, with errors that every log can print.

    ComfyUI logs the messages of an error and of those that led to it. A message with a lone
    surrogate, as a file's name or a text may hold one, would end the thread that runs prompts.
    It is for functions that ComfyUI calls outside of a node: samplers, guiders, wrappers.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            make_printable(error)
            kind = plain_kind(error)
            if kind is not type(error):
                trace = error.__traceback__
                raise kind(str(error)).with_traceback(trace) from error.__cause__
            raise

    return call


def plain_kind(error: Exception) -> type[Exception]:
    """Return the class to raise an error as: Python's own instead of one of this project's.

    ComfyUI puts the class in front of the message on the node, with the whole path of the module:
    that of this extension is the path of its folder, and would hide the message.
    """
    kind = type(error)
    if "gmflow_core." not in kind.__module__:
        return kind
    return next(each for each in kind.__mro__ if each.__module__ == "builtins")


def guarded_node(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Return the node class, its methods guarded and its inputs checked by their types."""
    for name in DOORS:
        if name in vars(node):
            function = vars(node)[name].__func__
            door = _validation if name == "validate_inputs" else _door
            guard = guarded(door(node, function, complete=name == "execute"))
            guard.__signature__ = inspect.signature(function)  # ComfyUI passes what it names
            setattr(node, name, classmethod(guard))
    return node


def _door(node: type[io.ComfyNode], function: Callable, complete: bool) -> Callable:
    """Return a method that checks its inputs first.

    Args:
        complete: False if links are not followed yet: their values are None.
    """
    parameters = inspect.signature(function).parameters
    names = list(parameters)[1:]
    named = {name for name in names if parameters[name].kind is not inspect.Parameter.VAR_KEYWORD}
    chosen = own_choices(node)

    @functools.wraps(function)
    def call(cls: type, *args: Any, **inputs: Any) -> Any:
        if complete:
            clear()  # what an earlier run of the node has said
        inputs = {**dict(zip(names, args, strict=False)), **inputs}
        known = {*named, *_inputs_of(node)}  # ComfyUI hands on links to any other name too
        inputs = {name: value for name, value in inputs.items() if name in known}
        check = check_lists if _takes_lists(node) else check_inputs
        return function(cls, **check(_inputs_of(node), inputs, chosen, complete))

    return call


def _validation(node: type[io.ComfyNode], function: Callable, complete: bool) -> Callable:
    """Return a validation that never raises: its result tells what is wrong, in printable text."""
    call = _door(node, function, complete)

    @functools.wraps(function)
    def validate(cls: type, *args: Any, **inputs: Any) -> bool | str:
        try:
            result = call(cls, *args, **inputs)
        except Exception as error:  # ComfyUI would answer the whole prompt with an error 500
            make_printable(error)
            return str(error)
        return printable(result) if isinstance(result, str) else result

    return validate


def own_choices(node: type[io.ComfyNode]) -> set[str]:
    """Return the inputs that the node validates itself, such as the names of files."""
    function = vars(node).get("validate_inputs")
    return set(inspect.signature(function.__func__).parameters) if function else set()


@functools.cache
def _takes_lists(node: type[io.ComfyNode]) -> bool:
    """Return whether ComfyUI hands a node every input as a list."""
    return bool(getattr(node.define_schema(), "is_input_list", False))


@functools.cache
def _inputs_of(node: type[io.ComfyNode]) -> dict[str, io.Input]:
    """Return the inputs of a node class by their ids."""
    return {each.id: each for each in node.define_schema().inputs}
