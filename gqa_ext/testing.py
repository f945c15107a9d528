"""For tests: run the same code with each instruction set that this CPU has."""

from collections.abc import Iterator
from contextlib import contextmanager

from . import _core

__all__ = ["available_isas", "use_isa"]


def available_isas() -> tuple[str, ...]:
    """Names that :func:`use_isa` takes here, widest first, such as ``("avx512", "avx2", "scalar")``.

    Examples
    --------
    >>> available_isas()[-1]
    'scalar'
    """
    return _core.isa_available()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Compute with one instruction set inside the ``with`` block, and with the former one after it.

    It holds for the whole process, so other threads are affected while the block runs.

    Parameters
    ----------
    name : str
        One of :func:`available_isas`.

    Raises
    ------
    ValueError
        There is no such instruction set, or this CPU or OS has it not. The message lists what there is.
    TypeError
        name is no str.

    Examples
    --------
    >>> from gqa_ext import cpu_info
    >>> with use_isa("scalar"):
    ...     cpu_info()["isa"]
    'scalar'
    """
    former = _core.isa_current()
    _core.isa_use(name)
    try:
        yield
    finally:
        _core.isa_use(former)
