"""Operator registration: the schema from a record of the arguments, the kernel, and the derivative.

Operators are registered through `torch.library.Library`: a call costs half of what a `torch.library.custom_op` costs,
and at 32 rows the call is the cost. An operator changes none of its arguments in place, because autograd, functional
transforms and `torch.compile` need that; what a call updates, it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import compress
from operator import itemgetter
from types import ModuleType
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from diffmic_fast import _native
from diffmic_fast.ops._backend import stream_of
from diffmic_fast.ops._torch_internals import below_autograd

_library = torch.library.Library("diffmic_fast", "FRAGMENT")

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    float: "float",
    str: "str",
    Sequence[bool]: "bool[]",
    Sequence[int]: "SymInt[]",
    Sequence[float]: "float[]",
    Sequence[Tensor]: "Tensor[]",
}

Call = TypeVar("Call", bound=tuple[Any, ...])
Result = TypeVar("Result")


class Derivative(NamedTuple):
    """The backward pass of an operator.

    Attributes:
        gradients: `gradients(call, result, wanted, *grads)`, the gradients of the arguments by name; a missing name
            means none. `call` and `result` are the records of the forward pass, with None in place of tensors that
            were not saved; `wanted` is the set of the arguments, by name, whose gradients are asked for; `grads` are
            those of the outputs, None where an output was not used (not all of them).
        saves: names of the tensors among the arguments that are saved for the backward pass.
        saved_results: names of the results that are saved.
        outputs: how many of the results are differentiable, from the first on.
    """

    gradients: Callable[..., Mapping[str, Tensor | None]]
    saves: Sequence[str]
    saved_results: Sequence[str] = ()
    outputs: int = 1


def register(
    name: str,
    call: type[Call],
    result: type[Result],
    kernel: Callable[[Call], Result],
    fake: Callable[[Call], Result],
    derivative: Derivative | None = None,
) -> Callable[[Call], Result]:
    """Registers the operator `diffmic_fast::name`.

    Args:
        name: name of the operator.
        call: NamedTuple of the arguments, whose annotations give the schema. One field at most may be a NamedTuple of
            tensors itself; its fields are arguments of the operator in its place.
        result: `Tensor`, or a NamedTuple of tensors.
        kernel: the operator on tensors with data.
        fake: the same on tensors that have only shapes: allocates the results.
        derivative: the backward pass; without one, no gradient passes.

    Returns:
        The operator as a function of the record.
    """
    schema = list(_schema(call))
    returns = "Tensor" if result is Tensor else ", ".join(f"{t} {n}" for n, t in _schema(result))
    _library.define(f"{name}({', '.join(f'{t} {n}' for n, t in schema)}) -> ({returns})")
    pack, unpack = _packing(call)
    _library.impl(name, lambda *arguments: kernel(unpack(arguments)), "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"diffmic_fast::{name}", lambda *arguments: fake(unpack(arguments)), lib=_library
    )
    operator = getattr(torch.ops.diffmic_fast, name).default
    # Not result._make, which older versions of torch.compile do not trace.
    as_result: Any = _identity if result is Tensor else lambda values: result(*values)
    differentiable = operator
    if derivative is not None:
        results = [] if result is Tensor else [name for name, _ in _schema(result)]
        differentiable = _register_derivative(
            name, schema, results, operator, unpack, as_result, derivative
        )

    def run(arguments: Call) -> Result:
        # A tracer records the operator. Otherwise the first thing that the dispatcher calls is the function registered
        # for autograd, and the way there converts every argument to C++ and back.
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
        call = operator if tracing else differentiable
        found: Result = as_result(call(*pack(arguments)))
        return found

    return run


def _register_derivative(
    name: str,
    schema: Sequence[tuple[str, str]],
    results: Sequence[str],
    operator: Any,
    unpack: Callable[[Sequence[Any]], Any],
    as_result: Callable[[Any], Any],
    derivative: Derivative,
) -> Callable[..., Any]:
    # As torch.library.register_autograd, which searches the whole schema for default values in every call: 75 us a
    # call of `conditioning`.
    names = [name for name, _ in schema]
    tensors = [i for i, (_, kind) in enumerate(schema) if kind in ("Tensor", "Tensor?")]
    constants = [i for i in range(len(names)) if i not in tensors]
    saved = [names.index(name) for name in derivative.saves]
    saved_results = [results.index(name) for name in derivative.saved_results]
    take_saved, take_results = _taker(saved), _taker(saved_results)
    take_constants = _taker(constants)
    # Where each argument and result lies in (saved tensors, saved results, constants, None).
    kept = [*saved, *(-1 - i for i in saved_results), *constants]
    absent = len(kept)
    arguments_of = _taker([kept.index(i) if i in kept else absent for i in range(len(names))])
    results_of = _taker(
        [kept.index(-1 - i) if i in saved_results else absent for i in range(len(results))]
    )

    class Derived(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with below_autograd():
                found = operator(*arguments)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*found[derivative.outputs :] if results else ())
            ctx.save_for_backward(*take_saved(arguments), *take_results(found))
            ctx.constants = take_constants(arguments)
            return found

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            for grad in grads:
                if grad is not None:
                    break
            else:
                return (None,) * len(names)
            values = (*ctx.saved_tensors, *ctx.constants, None)
            wanted = set(compress(names, ctx.needs_input_grad))
            gradients = derivative.gradients(
                unpack(arguments_of(values)), as_result(results_of(values)), wanted, *grads
            )
            return tuple(map(gradients.get, names))

    def derived(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            for i in tensors:
                if arguments[i] is not None and arguments[i].requires_grad:
                    return Derived.apply(*arguments)
        with below_autograd():
            return operator(*arguments)

    _library.impl(name, derived, "Autograd")
    return derived


def _schema(record: type) -> Iterator[tuple[str, str]]:
    """Name and type in the schema of each field."""
    for name, hint in get_type_hints(record).items():
        if hint in _SCHEMA_TYPES:
            yield name, _SCHEMA_TYPES[hint]
        else:
            yield from _schema(hint)


def _packing(record: Any) -> tuple[Callable[..., tuple[Any, ...]], Callable[..., Any]]:
    """The functions from a record to an operator's arguments and back."""
    hints = list(get_type_hints(record).values())
    nested = [i for i, hint in enumerate(hints) if hint not in _SCHEMA_TYPES]
    if not nested:
        return _identity, record._make
    (i,) = nested
    inner, end = hints[i], i + len(hints[i]._fields)

    def pack(call: tuple[Any, ...]) -> tuple[Any, ...]:
        values = [*call]  # older versions of torch.compile cannot slice a NamedTuple
        return (*values[:i], *values[i], *values[i + 1 :])

    def unpack(arguments: Sequence[Any]) -> Any:
        return record(*arguments[:i], inner(*arguments[i:end]), *arguments[end:])

    return pack, unpack


def _taker(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """The function from a sequence to the tuple of its elements at some indices."""
    if len(indices) > 1:
        return itemgetter(*indices)  # one call into C
    if not indices:
        return lambda values: ()
    (i,) = indices
    return lambda values: (values[i],)


def _identity(value: Any) -> Any:
    return value


def kernels_of(backend: str, tensor: Tensor) -> tuple[ModuleType, int]:
    """The module of a backend's kernels, and the last argument of its functions: threads, or the CUDA stream."""
    if backend == "cpu":
        return _native.extension(), torch.get_num_threads()
    return _native.cuda(backend), stream_of(tensor)
