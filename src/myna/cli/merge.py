"""`myna merge`: an adapter and its base as one model.

Owns which texts the result is compared on, and what is printed. Merging and comparing are
`export.merge`'s.
"""

from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from myna.cli.place import short
from myna.cli.preparation import prepare_rows
from myna.config_file import load_config
from myna.data.held_out import split_held_out
from myna.errors import ConfigError, DataError
from myna.export.merge import merge
from myna.export.origin import Origin, built_in_prompts, open_origin
from myna.export.verify import MOST_TEXTS
from myna.run_dir import RunDir


def run(
    source: str,
    out: Path,
    *,
    dtype: Literal["float32"] | None,
    force_base: bool,
    console: Console,
) -> None:
    """Merge the adapter that `source` names into its base, at `out`.

    Raises ConfigError where that cannot be done truthfully, with nothing at `out`.
    """
    origin = open_origin(source, needs_adapter=True, force_base=force_base)
    texts, where_from = texts_to_compare(source, origin)
    console.print(f"to compare on: {where_from}", markup=False, soft_wrap=True)
    agreement = merge(
        origin,
        out,
        texts,
        dtype=getattr(torch, dtype) if dtype is not None else None,
        say=lambda text: console.print(text, markup=False, soft_wrap=True),
    )
    console.print(f"the same but for rounding: {agreement}", markup=False, soft_wrap=True)
    console.print(f"The merged model is in {short(out.absolute())}", markup=False, soft_wrap=True)


def texts_to_compare(source: str, origin: Origin) -> tuple[list[tuple[int, ...]], str]:
    """Token ids of held-out rows of the run, else of built-in questions; and which they are."""
    rows: list[tuple[int, ...]] = []
    why = "it is no run directory"
    if RunDir(Path(source).expanduser()).config.is_file():
        why = "the run held none out"
        config = load_config(Path(source).expanduser()).config
        if config.held_out:
            try:
                # What was prepared for the training is kept, and read from there.
                prepared = prepare_rows(config, trust_remote_code=False)
                _, held_out = split_held_out(
                    prepared.dataset.examples, config.held_out, config.train.seed
                )
                rows = [(*row.prompt_ids, *row.completion_ids) for row in held_out[:MOST_TEXTS]]
            except (ConfigError, DataError) as error:
                why = f"the run's own cannot be read any more: {str(error).splitlines()[0]}"
    if rows:
        return rows, f"{len(rows)} held-out rows of the run"
    return built_in_prompts(origin.encoder), f"built-in questions, not held-out rows ({why})"
