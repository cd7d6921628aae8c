"""Loading: the seconds in which a command imports torch and transformers and reads a model.

Owns that Python's cyclic garbage collector rests meanwhile. Millions of objects are made then that
stay until the end; looking through them again and again took an eighth of the time
(`benchmarks/README.md`).
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_resting() -> Iterator[None]:
    """No garbage is looked for inside the block, nor ever among what was made in it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
