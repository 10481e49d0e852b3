"""Compiled functions: machine code that is made once and kept for the next process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile at the first call, and keep the machine code for the next process where there is a place for it.

    Arithmetic is IEEE's and in the order that is written; a division by zero gives an infinity.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return cast("Function", njit(cache=True, **options)(function))
    except RuntimeError:
        # Neither the package's folder nor the user's cache can be written to: compile in every process.
        return cast("Function", njit(**options)(function))


def inlined(function: Function) -> Function:
    """Compile as a part of each compiled function that calls it, where constant arguments are known to the compiler."""
    return cast("Function", njit(nogil=True, error_model="numpy", forceinline=True)(function))


def for_constants(function: Function) -> Function:
    """Compile for each set of constants that it asks for (``literally``), as a part of the function that calls it.

    A function made for them within another would do as well, but what calls it could not be kept: numba knows it by
    what it holds, and a compiled function is another one in each process.
    """
    return cast("Function", njit(nogil=True, error_model="numpy")(function))
