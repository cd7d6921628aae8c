"""From settings to encoded rows: what `myna data` shows and `myna train` trains.

Owns putting a tokenizer, a template and data files together, and the bar that is seen meanwhile. It
needs no model weights. Encoding is `data`'s, tokenizers are `models`'.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from myna.cli.terminal import error_console
from myna.config import Config
from myna.data.dataset import Dataset
from myna.data.encode import Encoder
from myna.data.pipeline import encode_files
from myna.data.sources import Source, find_sources
from myna.data.templates import choose_template
from myna.models.load import context_length, load_config
from myna.models.tokenizer import LoadedTokenizer, load_tokenizer


@dataclass(frozen=True)
class Prepared:
    """Encoded rows, and what they were encoded with."""

    dataset: Dataset
    loaded: LoadedTokenizer
    encoder: Encoder

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of what decides the token ids: a resumed run must find the same."""
        return {
            "data": self.dataset.content_hash,
            "tokenizer": self.loaded.fingerprint,
            "template": self.dataset.template.fingerprint,
        }


def prepare_rows(
    config: Config,
    *,
    trust_remote_code: bool,
    needs_model: bool = True,
    console: Console = error_console,
) -> Prepared:
    """Read, map and encode the data of `config` with the tokenizer of its model.

    A folder of tokenizer files will do unless `needs_model`; nothing limits the length then.

    Raises DataError with every bad row before a model is loaded.
    """
    sources, notes = sources_of(config)
    loaded, encoder = make_encoder(
        config, trust_remote_code=trust_remote_code, needs_model=needs_model
    )
    with _rows_shown(console) as show:
        dataset = encode_files(
            encoder,
            sources,
            tokenizer_hash=_tokenizer_hash(loaded),
            on_bad_row=config.train.on_bad_row,
            on_rows=show,
        )
    return Prepared(replace(dataset, notes=(*notes, *dataset.notes)), loaded, encoder)


def sources_of(config: Config) -> tuple[list[Source], list[str]]:
    """The files of `config.data`, and notes on what was chosen."""
    sources, notes = find_sources(config.data)
    # What an entry says of its columns goes before what is said of all.
    sources = [replace(source, columns={**config.columns, **source.columns}) for source in sources]
    return sources, notes


def make_encoder(
    config: Config, *, trust_remote_code: bool, needs_model: bool = True
) -> tuple[LoadedTokenizer, Encoder]:
    """The tokenizer of the model of `config`, and what makes prompts and labels with it."""
    loaded = load_tokenizer(config.model, trust_remote_code=trust_remote_code)
    template = choose_template(loaded.tokenizer, loaded.model_type, override=config.template)
    limit = config.train.max_length
    has_config = (loaded.folder / "config.json").is_file()
    if needs_model or has_config:
        model_config = load_config(config.model, trust_remote_code=trust_remote_code)
        limit = limit or context_length(model_config)
    encoder = Encoder(
        loaded.tokenizer,
        template,
        stop_ids=loaded.special.stop_ids,
        system=config.system,
        max_length=limit,
        over_length=config.train.over_length,
        control_tokens=config.train.control_tokens,
        limit_is_models=config.train.max_length is None,
        train_on=config.train.train_on,
    )
    if limit is None and not has_config:
        encoder.notes.append("no config.json beside the tokenizer, so max_length is not limited")
    return loaded, encoder


def _tokenizer_hash(loaded: LoadedTokenizer) -> str:
    """The fingerprint, and where Python code decides the ids, all files that code may read."""
    if loaded.tokenizer.is_fast:
        return loaded.fingerprint
    digest = hashlib.sha256(loaded.fingerprint.encode())
    for path in sorted(loaded.folder.iterdir()):
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt", ".pth", ".gguf"):
            digest.update(f"{path.name}:{path.stat().st_size}:".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _rows_shown(console: Console) -> Iterator[Callable[[int], None]]:
    """On a terminal, the rows done and the rows a second."""
    with Progress(
        SpinnerColumn(),
        TextColumn("[bold]encoding"),
        TextColumn("{task.completed:,.0f} rows"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("encoding", total=None, rate="")
        started = time.monotonic()

        def show(rows: int) -> None:
            rate = rows / max(time.monotonic() - started, 1e-3)
            progress.update(task, completed=rows, rate=f"{rate:,.0f} rows/s")

        yield show
