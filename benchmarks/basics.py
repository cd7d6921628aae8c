"""The times a new user meets: help, encoding, the demo, and with --clone the two README commands.

    python benchmarks/basics.py [--clone] [--data huanhuan.json --model FOLDER] [--first-token]

Each figure is the median of several runs in one call; `results/basics.json` keeps them with
versions, hardware and command. `--clone` makes a fresh clone of this repository in a temporary
folder and runs `make demo` and `make test` there (some minutes; the package index is used).
`--first-token` measures the start of `myna chat` alone, into `results/first_token.json`.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from myna.device import processor

ROOT = Path(__file__).parents[1]
MYNA = (sys.executable, "-m", "myna.cli.main")
IMPORTED = ("myna.inference.chat", "torch", "transformers", "transformers.models")
IMPORTED += ("torch.distributed.tensor", "torch._dynamo", "scipy.optimize", "peft")
"""The first is all that `myna chat` imports; the others are the largest of it."""
RESULTS = Path(__file__).parent / "results" / "basics.json"


def seconds(command: list[str], folder: Path = ROOT) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    taken = time.perf_counter() - started
    if done.returncode != 0:
        sys.exit(f"{command} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return taken, done.stdout


def summary(samples: list[float]) -> dict[str, object]:
    return {
        "median": round(statistics.median(samples), 4),
        "samples": [round(sample, 4) for sample in samples],
    }


def measure_help(runs: int) -> dict[str, object]:
    myna = str(Path(sys.executable).parent / "myna")
    return summary([seconds([myna, "--help"])[0] for _ in range(runs)])


def measure_encoding(model: str, data: str, runs: int) -> dict[str, object]:
    from myna.cli.preparation import prepare_rows
    from myna.config import Config

    config = Config(model=model, data=[data], system="现在你要扮演皇帝身边的女人--甄嬛")
    rates = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        dataset = prepare_rows(config, trust_remote_code=False).dataset
        rates.append(dataset.accounting.rows_in / (time.perf_counter() - started))
    return {
        "rows": dataset.accounting.rows_in,
        "tokens": dataset.accounting.tokens,
        "rows_per_second": summary(rates[1:]),  # the first run loads libraries
    }


def measure_demo(runs: int) -> dict[str, object]:
    myna = str(Path(sys.executable).parent / "myna")
    times, shares = [], []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            taken, output = seconds([myna, "demo", "--output", f"{folder}/demo"])
        times.append(taken)
        rows = re.findall(
            r"(in the persona's voice and right|right|in the persona's voice)\s*│"
            r"\s*([\d.]+) %\s*│\s*([\d.]+) %",
            output,
        )
        shares.append({label: [float(before), float(after)] for label, before, after in rows})
    return {"seconds": summary(times), "percent_before_and_after": shares}


def measure_first_token(runs: int) -> dict[str, object]:
    """`myna chat --prompt` on the demo's adapter, each time in a new process.

    Seconds to the first character of the answer; in turn with them those of a program that imports
    the model's class and peft and does nothing; and those (of one more run, which tracing slows) in
    which Python imports what takes most of them. The adapter is trained first, for a few steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = str(Path(folder) / "demo")
        example = str(ROOT / "examples" / "demo.yaml")
        seconds([*MYNA, "train", example, f"output={run}", "train.max_steps=20"])
        command = [*MYNA, "chat", run, "--prompt", "What is the capital of Italy?"]
        bare = [sys.executable, "-c", "from transformers import LlamaForCausalLM; import peft"]
        pairs = [(first_character(command), seconds(bare)[0]) for _ in range(runs + 1)]
        samples, imports = zip(*pairs[1:], strict=True)  # files are in memory
        traced = [sys.executable, "-X", "importtime", *command[1:]]
        trace = subprocess.run(traced, capture_output=True, text=True, check=True).stderr
    found = re.findall(r"^import time:\s*\d+ \|\s*(\d+) \|\s*([\w.]+)$", trace, re.MULTILINE)
    took = {name: int(microseconds) / 1e6 for microseconds, name in found}
    return {
        "first_token_seconds": summary(list(samples)),
        "importing_transformers_and_peft_seconds": summary(list(imports)),
        "import_seconds": {name: took[name] for name in IMPORTED if name in took},
    }


def first_character(command: list[str]) -> float:
    """Seconds from the start of a process to its first byte on standard output."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        taken = time.perf_counter() - started
        process.stdout.read()
    if process.returncode != 0 or not first:
        sys.exit(f"{command} failed")
    return taken


def measure_clone() -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "myna"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        commands = {"make_demo": ["make", "demo"], "make_test": ["make", "test"]}
        return {name: round(seconds(command, clone)[0], 1) for name, command in commands.items()}


def machine() -> dict[str, object]:
    """What every results file begins with."""
    return {
        "command": "python benchmarks/basics.py " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor().name,
        "cores": os.cpu_count(),
        "versions": {
            name: version(name) for name in ("myna", "torch", "transformers", "peft", "tokenizers")
        },
    }


def keep(results: dict[str, object], path: Path) -> None:
    text = json.dumps(results, indent=1, ensure_ascii=False)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--data", help="huanhuan.json")
    parser.add_argument("--model", help="folder with a BlueLM tokenizer")
    parser.add_argument("--clone", action="store_true")
    parser.add_argument("--first-token", action="store_true")
    options = parser.parse_args()
    if options.first_token:
        keep(machine() | measure_first_token(options.runs), RESULTS.with_name("first_token.json"))
        return
    results = machine() | {"help_seconds": measure_help(options.runs)}
    if options.data and options.model:
        results["encoding"] = measure_encoding(options.model, options.data, options.runs)
    results["demo"] = measure_demo(min(options.runs, 3))
    if options.clone:
        results["clean_clone_seconds"] = measure_clone()
    keep(results, RESULTS)


if __name__ == "__main__":
    main()
