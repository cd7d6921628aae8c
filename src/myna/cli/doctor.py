"""`myna doctor`: what this machine is, how fast it computes, and which models fit.

Owns the report and the estimate of memory behind "what would fit". Measuring and looking is done in
`device.py`, counting by the same injection that training uses; whether all packages are there is
known to `installation.py`. A missing extra is a line that says how to mend it.
"""

import importlib.metadata
import os
import platform
import threading
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from rich import box
from rich.console import Console
from rich.table import Table

from myna import __version__
from myna.config import LoraConfig
from myna.device import (
    DTYPES,
    choose_compute,
    gemm_rate,
    memory_available,
    memory_total,
    processor,
)
from myna.errors import ConfigError
from myna.installation import incomplete

if TYPE_CHECKING:
    from peft import PeftModel

ROWS, TOKENS = 8, 512
"""The micro-batch that "what would fit" is stated for."""

_PACKAGES = (
    "transformers", "peft", "accelerate", "safetensors", "tokenizers", "sentencepiece",
    "huggingface-hub", "pydantic",
)  # fmt: skip
_HUB_SECONDS = 2.0
_GIGA = 1e9


@dataclass(frozen=True)
class Need:
    """Bytes that training takes, by what takes them; activations for `ROWS` x `TOKENS` tokens."""

    base: int
    adapter: int
    """A and B, their gradients and AdamW's two moments, float32."""
    activations: int
    recomputed_activations: int
    """The same with `train.checkpointing: all`."""


def run(model: str | None, console: Console) -> None:
    """Print the report; with `model` (a folder or hub id) also what training it would take.

    Raises ConfigError if that model cannot be found, and for an installation that is not complete,
    with everything that is missing.
    """
    if missing := incomplete():
        raise ConfigError(missing)
    for table in (_hardware(), _rates(), _versions()):
        console.print(table)
        console.print()
    for line in (*_extras(), _hub(), _cache()):
        console.print(line)
    if model is not None:
        _print_fit(model, console)


def needs(model: str) -> tuple[int, int, dict[str, Need]]:
    """Parameters of the base, of the default adapter, and memory by dtype, from shapes alone.

    Activations are what autograd keeps of one forward pass on the meta device, per token, times the
    tokens. On a CPU that is the growth of resident memory to within 5 %, with recomputation some
    25 % more than it, as long as every tensor is given back to the system: glibc keeps freed blocks
    below 32 MB, which a small model pays with up to twice the activations. A model whose forward
    pass depends on values (routed experts) has 0 there, meaning unknown.
    """
    import torch

    from myna.lora.inject import inject
    from myna.models.load import meta_model

    lora = LoraConfig()
    found: dict[str, Need] = {}
    for dtype in ("float32", "bfloat16"):
        base = meta_model(model).to(getattr(torch, dtype))
        size = base.num_parameters()
        config = base.config.get_text_config()
        injected = inject(
            base,
            rank=lora.rank,
            alpha=lora.resolved_alpha,
            dropout=lora.dropout,
            target_modules=lora.target_modules,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            init=lora.init,
            seed=0,
        )
        width = getattr(torch, dtype).itemsize
        layers = _saved_bytes_per_token(injected.model)
        # Logits in the model's dtype; in float32 their copy, log-softmax and gradient.
        head = config.vocab_size * (width + 3 * 4)
        depth = config.num_hidden_layers
        inputs = depth * config.hidden_size * width
        found[dtype] = Need(
            base=size * width,
            adapter=injected.trainable * 4 * 4,
            activations=ROWS * TOKENS * (layers + head) if layers else 0,
            recomputed_activations=ROWS * TOKENS * (layers // depth + inputs + head)
            if layers
            else 0,
        )
    return size, injected.trainable, found


def _saved_bytes_per_token(model: "PeftModel") -> int:
    import torch

    # So short that attention scores, which grow with its square and which the kernels of CPU and
    # CUDA do not keep, do not count.
    tokens = 4
    parameters = {id(parameter) for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        owner = tensor if tensor._base is None else tensor._base
        if id(owner) not in parameters:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage  # held, so that the key stays its own
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.train()(input_ids=ids, attention_mask=mask, use_cache=False)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return 0  # no shape without values: the table says "unknown"
    return sum(storage.nbytes() for storage in kept.values()) // tokens


def _hardware() -> Table:
    import torch

    cpu = processor()
    table = Table(title="Hardware", box=None, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    physical = f"{cpu.physical_cores} cores, " if cpu.physical_cores else ""
    table.add_row("processor", f"{cpu.name}: {physical}{cpu.allowed_cores:g} usable")
    table.add_row("threads", f"{torch.get_num_threads()} of torch")
    table.add_row("memory", f"{_bytes(memory_total())}, {_bytes(memory_available())} available")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        place = f"cuda:{index}"
        major, minor = torch.cuda.get_device_capability(index)
        table.add_row(
            place,
            f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, "
            f"{_bytes(memory_total(place))}, {_bytes(memory_available(place))} free",
        )
    if not torch.cuda.is_available():
        table.add_row("CUDA", "no device")
    chosen = choose_compute()
    table.add_row("auto takes", f"{chosen.device}, {chosen.reason}")
    return table


def _rates() -> Table:
    import torch

    threads = torch.get_num_threads()
    table = Table(
        title="Matrix products, GFLOP/s",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("format")
    table.add_column("one core", justify="right")
    if threads > 1:
        table.add_column(f"{threads} threads", justify="right")
    other = choose_compute().device
    if other != "cpu":
        table.add_column(other, justify="right")
    for dtype in DTYPES:
        cells = [gemm_rate("cpu", dtype)]
        if threads > 1:
            cells.append(gemm_rate("cpu", dtype, threads=threads))
            if cells[1] < cells[0]:
                table.caption = "Threads slow each other down: other programs use the cores."
        if other != "cpu":
            cells.append(gemm_rate(other, dtype))
        table.add_row(dtype, *(f"{cell / _GIGA:,.0f}" for cell in cells))
    return table


def _versions() -> Table:
    import torch

    table = Table(title="Versions", box=None, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("myna", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.system()}")
    # torch itself says which build it is (+cpu, +cu130); its package does not always.
    table.add_row("torch", torch.__version__)
    for name in _PACKAGES:
        table.add_row(name, _version(name) or "not installed")
    return table


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extras() -> Iterator[str]:
    """One line for each extra of the package, `dev` apart."""
    try:
        requirements = importlib.metadata.requires("myna") or []
    except importlib.metadata.PackageNotFoundError:
        yield "[bold]extras[/]      unknown: myna runs from a folder, it is not installed"
        return
    extras: dict[str, list[str]] = defaultdict(list)
    for requirement in map(Requirement, requirements):
        for extra in importlib.metadata.metadata("myna").get_all("Provides-Extra") or []:
            without = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if not without and requirement.marker and requirement.marker.evaluate({"extra": extra}):
                extras[extra].append(requirement.name)
    for extra, packages in sorted(extras.items()):
        if extra == "dev":
            continue
        missing = [name for name in packages if _version(name) is None]
        if missing:
            mend = f'pip install "myna\\[{extra}]"'
            yield f"[bold]extra {extra}[/]: {', '.join(missing)} missing; {mend}"
        else:
            yield f"[bold]extra {extra}[/]: present"


def _hub() -> str:
    """One line: whether models can be fetched."""
    from huggingface_hub import constants

    address = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        return f"[bold]model hub[/]: {address} not asked, HF_HUB_OFFLINE is set; unset it to fetch"
    faults = ["no answer"]

    def ask() -> None:
        request = urllib.request.Request(address, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=_HUB_SECONDS):
                faults.clear()
        except urllib.error.HTTPError:
            faults.clear()  # it answered
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            faults[:] = [getattr(reason, "strerror", None) or str(reason)]

    # In a thread: looking up a name is not bounded by the timeout of the connection.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS + 0.5)
    if not faults:
        return f"[bold]model hub[/]: {address} answers"
    where = "HF_ENDPOINT" if "HF_ENDPOINT" in os.environ else "the default"
    return (
        f"[bold]model hub[/]: {address} ({where}) cannot be reached: {faults[0]}. Use a model "
        "folder, or set HF_ENDPOINT to a mirror or HTTPS_PROXY to a proxy"
    )


def _cache() -> str:
    """One line: where encoded rows are kept, and how many bytes of them."""
    from myna.data.cache import MAX_BYTES, cache_bytes, cache_folder

    return (
        f"[bold]cache[/]: {_bytes(cache_bytes())} of encoded rows in {cache_folder()} (at most "
        f"{_bytes(MAX_BYTES)}; MYNA_CACHE names another folder)"
    )


def _print_fit(model: str, console: Console) -> None:
    size, trainable, by_dtype = needs(model)
    chosen = choose_compute()
    available = memory_available(chosen.device)
    console.print(
        f"\n[bold]{model}[/]: {size:,} parameters, {trainable:,} in an adapter of rank "
        f"{LoraConfig().rank} on all linear layers"
    )
    table = Table(
        title=f"Memory to train {ROWS} rows of {TOKENS} tokens at once; "
        f"{_bytes(available)} available",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("format", no_wrap=True)
    table.add_column("check-\npointing", no_wrap=True)
    for name in ("base", "adapter", "activa-\ntions", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for dtype, need in by_dtype.items():
        for word, activations in (
            ("none", need.activations),
            ("all", need.recomputed_activations),
        ):
            total = need.base + need.adapter + activations
            if total > available:
                fits = f"{_bytes(total - available)} short"
            else:
                fits = "[green]yes[/]" if activations else "unknown"
            table.add_row(
                dtype,
                word,
                _bytes(need.base),
                _bytes(need.adapter),
                _bytes(activations) if activations else "unknown",
                _bytes(total) if activations else f"> {_bytes(total)}",
                fits,
            )
    console.print(table)
    console.print("Activations shrink in proportion with train.micro_batch_size and row length.")


def _bytes(count: int) -> str:
    number, unit = (count / _GIGA, "GB") if count >= _GIGA else (count / 1e6, "MB")
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.1f} {unit}"
