"""Ollama: a folder with a GGUF and the Modelfile that runs it as it was trained.

Owns the Modelfile: template, persona, every text that ends an answer, context, and the sampling
settings of the base in place of Ollama's. The template is translated by `go_template.py`, the model
written by `gguf.py`.
"""

from collections.abc import Callable
from pathlib import Path

from myna import __version__
from myna.errors import ConfigError
from myna.export.gguf import Kind, check_gguf, context_of, export_model
from myna.export.go_template import Pieces, cut_out, to_go
from myna.export.origin import Origin, check_target
from myna.run_dir import remove_leftovers_of, write_file, written_aside

MODEL_FILE = "model.gguf"
MODELFILE = "Modelfile"
MOST_CONTEXT = 8192
"""Ollama takes memory for the whole context at once; more is asked for by its `num_ctx`."""

Say = Callable[[str], None]


def export_ollama(origin: Origin, out: Path, kind: Kind, *, say: Say = lambda _: None) -> None:
    """Write the folder `out` for `ollama create`.

    Raises ConfigError for a template or a persona that a Modelfile cannot hold truthfully, and as
    `export_model` does; nothing is at `out` then.
    """
    check_gguf()
    check_target(out, origin)
    pieces = cut_out(origin.encoder.template)
    if origin.begins_with_bos:  # by the GGUF's word: Ollama puts it there itself
        pieces = pieces.without_beginning(str(origin.tokenizer.bos_token))
    text = modelfile(origin, pieces)
    for note in pieces.notes:
        say(note)
    remove_leftovers_of(out)
    with written_aside(out) as folder:
        export_model(origin, folder / MODEL_FILE, kind, say=say)
        write_file(folder / MODELFILE, text)


def modelfile(origin: Origin, pieces: Pieces) -> str:
    """The text of the Modelfile. Raises ConfigError for texts that it cannot quote."""
    system = origin.encoder.system
    lines = [
        f"# {origin.name}: made with myna {__version__}.",
        f"#   ollama create {origin.name} -f {MODELFILE}",
        f"#   ollama run {origin.name}",
        f"FROM ./{MODEL_FILE}",
        f"TEMPLATE {_quoted(to_go(pieces), 'chat template')}",
    ]
    if system is not None:
        lines.append(f"SYSTEM {_quoted(system, 'persona')}")
    for stop in origin.stop_ids:
        token = str(origin.tokenizer.convert_ids_to_tokens(stop))
        if '"' in token or "\n" in token:
            raise ConfigError(
                f"The Modelfile cannot hold the stop token {token!r}: it has a quote or a line "
                "break.\n  Use --to gguf, which holds its id."
            )
        lines.append(f'PARAMETER stop "{token}"')
    context, _ = context_of(origin.config)
    if context is not None:
        lines.append(f"PARAMETER num_ctx {min(context, MOST_CONTEXT)}")
    lines += [f"PARAMETER {name} {value:g}" for name, value in _sampling(origin).items()]
    return "\n".join(lines) + "\n"


def _sampling(origin: Origin) -> dict[str, float]:
    """The base's own settings, as `myna chat` uses them; Ollama's defaults are others."""
    own = origin.generation
    found = {"repeat_penalty": float(own.get("repetition_penalty") or 1.0)}
    if not own.get("do_sample"):
        return found | {"temperature": 0.0}
    return found | {
        "temperature": float(own.get("temperature") or 1.0),
        "top_p": float(own.get("top_p") or 1.0),
        "top_k": float(own.get("top_k") or 50),
    }


def _quoted(text: str, what: str) -> str:
    if '"""' in text or text.startswith('"') or text.endswith('"'):
        raise ConfigError(
            f"The Modelfile cannot hold the {what}: three quotes in a row, or one at its edge, "
            "would end it early.\n  Use --to gguf, or another text."
        )
    return f'"""{text}"""'
