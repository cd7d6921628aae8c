"""`myna export`: a model or an adapter for llama.cpp or Ollama.

Owns what goes with what among the options, and what is printed. The files are `export`'s.
"""

from pathlib import Path
from typing import Literal

from rich.console import Console

from myna.cli.place import short
from myna.errors import ConfigError
from myna.export.gguf import Kind, export_adapter, export_model
from myna.export.ollama import MODELFILE, export_ollama
from myna.export.origin import open_origin


def run(
    source: str,
    out: Path,
    *,
    to: Literal["gguf", "ollama"],
    kind: Kind,
    adapter_only: bool,
    force_base: bool,
    console: Console,
) -> None:
    """Write what `source` names to `out`, a file for gguf and a folder for ollama.

    Raises ConfigError where the other program would read something else than was trained.
    """
    if to == "gguf" and out.suffix != ".gguf":
        file = out / "model.gguf" if out.is_dir() else out.with_name(out.name + ".gguf")
        raise ConfigError(
            f"{out}: expected the name of a file that ends in .gguf.\n  Use {file}, for example."
        )
    if to == "ollama" and adapter_only:
        raise ConfigError(
            "--adapter-only with --to ollama: which model of Ollama's would be this base is not "
            "known here.\n  Use --to gguf, and name the file in an ADAPTER line of your Modelfile."
        )

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    origin = open_origin(source, needs_adapter=adapter_only, force_base=force_base)
    place = short(out.absolute())
    if adapter_only:
        export_adapter(origin, out, kind, say=say)
        say(f"The adapter is in {place}")
        say(f"  llama-cli -m BASE.gguf --lora {place}")
    elif to == "gguf":
        export_model(origin, out, kind, say=say)
        say(f"The model is in {place}")
        say(f"  llama-cli -m {place}")
    else:
        export_ollama(origin, out, kind, say=say)
        say(f"The model is in {place}")
        say(f"  ollama create {origin.name} -f {place}/{MODELFILE}")
