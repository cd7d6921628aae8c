"""The `myna` program: its commands, their arguments, and what an error looks like.

Owns parsing and exit codes only; each command's work is in its own file, imported when it runs, so
that `myna --help` loads no torch.
"""

import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from myna import __version__
from myna.device import limit_kernel_cache
from myna.errors import ConfigError, MynaError

if TYPE_CHECKING:
    from myna.config_file import ResolvedConfig

app = typer.Typer(
    name="myna",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [KEY=VALUE ...]",
        help="A YAML or a run directory, then settings that override it.",
        show_default=False,
    ),
]
Model = Annotated[str | None, typer.Option(help="Base model: a folder or a hub id.")]
Data = Annotated[
    list[str] | None,
    typer.Option(help="Training data: a file, a folder, a glob or a hub id (repeatable)."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python files that come with the model. Only for models whose code you have read.",
    ),
]
ForceBase = Annotated[
    bool,
    typer.Option(
        "--force-base",
        help="Use the adapter on another base, tokenizer or template than it was trained with.",
    ),
]
Source = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN|MODEL]",
        help="A run directory, an adapter folder, a model folder or a hub id. Default: newest run.",
        show_default=False,
    ),
]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, help="0 is greedy. Default: the model's own.")
]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")]
TopK = Annotated[int | None, typer.Option(min=0, help="Sample among the k likeliest; 0: all.")]
RepetitionPenalty = Annotated[float | None, typer.Option(min=0.01, help="Above 1: repeat less.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")]
System = Annotated[
    str | None,
    typer.Option(help="Persona or instruction. Default: the one used in training."),
]


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """LoRA fine-tuning of chat models without silent mistakes.

    Start with `myna demo`, or `myna train --model MODEL --data FILE`.
    """
    if version:
        typer.echo(f"myna {__version__}")
        raise typer.Exit


@app.command()
def train(
    settings: Settings = None,
    model: Model = None,
    data: Data = None,
    output: Annotated[str | None, typer.Option(help="Run directory.")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start another run in the next free directory.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Do everything up to step 1, the trial of memory too; write nothing."
        ),
    ] = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Resume although this setting, or data, tokenizer, template, base, torch …, is "
            "another one now (repeatable).",
        ),
    ] = None,
    force_base: ForceBase = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train an adapter. The same command resumes an interrupted run."""
    from myna.cli.place import say_if_finished
    from myna.cli.terminal import console

    resolved = _resolve(settings, {"model": model, "data": data, "output": output})
    # Before anything heavy is loaded.
    if not (fresh or dry_run or allow_change) and say_if_finished(resolved, console):
        return
    from myna.cli import train as command

    options = command.Options(
        fresh=fresh,
        dry_run=dry_run,
        allow_change=tuple(allow_change or ()),
        force_base=force_base,
        trust_remote_code=trust_remote_code,
    )
    command.run(resolved, options)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Where the runs are.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """List runs: running, finished, stopped or failed, with step, loss and last sign of life."""
    from myna.cli import runs as command
    from myna.cli.terminal import console

    command.show(folder, as_json=as_json, console=console)


@app.command()
def data(
    settings: Settings = None,
    model: Model = None,
    data: Data = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write all of it as one page for a browser.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Show the first N answers token by token.")
    ] = None,
    row: Annotated[
        str | None,
        typer.Option(help="Show one row: its number in the file (84), or FILE:LINE."),
    ] = None,
    find: Annotated[
        str | None, typer.Option(help="Show answers with this text in them or in their prompt.")
    ] = None,
    only: Annotated[
        Literal["trained", "refused", "truncated", "duplicate", "conflict"] | None,
        typer.Option(help="Show answers of one kind."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show what would be trained: accounting, lengths, odd rows, coloured tokens.

    A tokenizer is enough. With --row, --find or --only: those answers, in a pager (q leaves it).
    """
    from myna.cli import data as command
    from myna.cli.preparation import prepare_rows
    from myna.cli.terminal import console

    config = _resolve(settings, {"model": model, "data": data}).config
    prepared = prepare_rows(config, trust_remote_code=trust_remote_code, needs_model=False)
    command.run(
        prepared,
        config,
        as_json=as_json,
        html=html,
        rows=rows,
        wanted=command.Wanted(row, find, only),
        console=console,
    )


@app.command()
def chat(
    source: Source = None,
    prompt: Annotated[
        str | None, typer.Option(help="Ask this, print the answer and leave.")
    ] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    force_base: ForceBase = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to an adapter or a model. /clear forgets, /quit leaves."""
    from myna.cli import chat as command

    command.run(
        source,
        prompt=prompt,
        system=system,
        sampling={
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        },
        force_base=force_base,
        trust_remote_code=trust_remote_code,
    )


@app.command()
def generate(
    source: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="As in `myna chat`.")],
    questions: Annotated[Path, typer.Argument(metavar="INPUT", help="A data file of questions.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSONL with the answers.")],
    system: System = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows answered at once.")] = 8,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    force_base: ForceBase = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer every row of a file."""
    from myna.cli import generate as command

    command.run(
        source,
        questions,
        output,
        system=system,
        batch_size=batch_size,
        sampling={
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        },
        force_base=force_base,
        trust_remote_code=trust_remote_code,
    )


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    data: Annotated[
        str | None, typer.Option(help="Judge these rows, not those that the run held out.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="exact_match, contains, json, bleu, chrf, rouge, regex:PATTERN, or "
            "FILE.py:FUNCTION, called with answer, reference and question (repeatable). Default: "
            "the run's own, or exact_match and chrf.",
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="TASK,TASK", help="Tasks of lm-eval to run as well.")
    ] = None,
    tasks_folder: Annotated[Path | None, typer.Option(help="Task files of your own.")] = None,
    forgetting: Annotated[
        Path | None,
        typer.Option(help="A neutral text, in place of the sentences that myna brings."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest answer, in tokens. Default: twice the rows' own, at most 256."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows answered at once. Default: 8.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first N rows, and of each task.")
    ] = None,
    force_base: ForceBase = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare a run's adapter with its base: losses, answers, metrics, forgetting."""
    from myna.cli import eval as command

    options = command.Options(
        data=data,
        metrics=tuple(metric or ()),
        tasks=tuple(name.strip() for name in tasks.split(",")) if tasks else (),
        tasks_folder=tasks_folder,
        forgetting=forgetting,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        limit=limit,
        force_base=force_base,
        trust_remote_code=trust_remote_code,
    )
    command.run(run, options)


@app.command()
def report(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Page to write. Default: RUN/report.html.")
    ] = None,
) -> None:
    """Make a page of a run: curves, answers, data, settings, cost, and how to use it."""
    from myna.cli import report as command
    from myna.cli.terminal import console

    command.run(source, output, console=console)


@app.command()
def merge(
    source: Annotated[str, typer.Argument(metavar="RUN", help="A run or an adapter folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    dtype: Annotated[
        Literal["float32"] | None,
        typer.Option(help="Store every number in it. Default: as the base stores it."),
    ] = None,
    force_base: ForceBase = False,
) -> None:
    """Add an adapter to its base: one model that plain transformers loads.

    Computed in float32 from the base's own files, then compared with base and adapter on held-out
    rows of the run; refused, with nothing at OUT, where they differ by more than rounding.
    """
    from myna.cli import merge as command
    from myna.cli.terminal import console

    command.run(source, out, dtype=dtype, force_base=force_base, console=console)


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run, an adapter folder, or a model.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="FILE.gguf, or a folder for ollama.")],
    to: Annotated[Literal["gguf", "ollama"], typer.Option(help="The program it is for.")],
    kind: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"],
        typer.Option("--type", help="How numbers are stored; q8_0 takes half of f16."),
    ] = "f16",
    adapter_only: Annotated[
        bool,
        typer.Option("--adapter-only", help="The adapter alone, for a GGUF of its base."),
    ] = False,
    force_base: ForceBase = False,
) -> None:
    """Write a model for llama.cpp (GGUF) or Ollama, with its template, stop tokens and persona.

    What these programs would compute or read otherwise than it was trained is refused.
    """
    from myna.cli import export as command
    from myna.cli.terminal import console

    command.run(
        source,
        out,
        to=to,
        kind=kind,
        adapter_only=adapter_only,
        force_base=force_base,
        console=console,
    )


@app.command()
def serve(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN [RUN ...]",
            help="Runs or adapter folders on one base; each is a model name. Or a model alone.",
        ),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="What clients have to send. Default: the environment's MYNA_API_KEY, else none.",
        ),
    ] = None,
    engine: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(help="vllm: run vLLM, where it is installed, with these runs."),
    ] = "transformers",
    force_base: ForceBase = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve runs to clients of OpenAI's interface, with a chat page for browsers."""
    from myna.cli import serve as command

    command.run(
        sources,
        host=host,
        port=port,
        api_key=api_key,
        engine=engine,
        trust_remote_code=trust_remote_code,
        force_base=force_base,
    )


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="A new repository is private, not public.")
    ] = False,
    base_id: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="What the base is called there, where the run names a folder.",
        ),
    ] = None,
) -> None:
    """Publish the adapter of a run on the Hugging Face hub, with its model card."""
    from myna.cli import push as command
    from myna.cli.terminal import console

    command.run(run, repo, private=private, base_id=base_id, console=console)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
) -> None:
    """Fine-tune the embedded model in about a minute and show what it learned."""
    from myna.cli import demo as command

    command.run(output)


@app.command()
def doctor(model: Model = None) -> None:
    """Show whether all is installed, hardware, speed, versions, and what would fit."""
    from myna.cli import doctor as command
    from myna.cli.terminal import console

    command.run(model, console)


def _resolve(settings: list[str] | None, flags: Mapping[str, object]) -> "ResolvedConfig":
    from myna.config_file import load_config

    rest = list(settings or [])
    path = Path(rest.pop(0)) if rest and "=" not in rest[0] else None
    return load_config(path, rest, flags)


def main() -> None:
    """Run a command; errors of ours become one message and an exit code, bugs a traceback."""
    limit_kernel_cache()
    try:
        app()
    except MynaError as error:
        _print_error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error, ImportError):
            _stop_if_incomplete()
        traceback.print_exc()
        _print_error(
            "this is a bug in myna, not a mistake of yours.\n"
            "  Please report it with the lines above and the output of `myna doctor`."
        )
        sys.exit(1)


def _stop_if_incomplete() -> None:
    """A package that cannot be imported is our bug only where all of them are there."""
    from myna.installation import incomplete

    if missing := incomplete():
        print(f"error: {missing}", file=sys.stderr)  # rich may be what is missing
        sys.exit(ConfigError.exit_code)


def _print_error(text: str) -> None:
    from myna.cli.terminal import error_console

    error_console.print("[bold red]error:[/] ", end="")
    error_console.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
