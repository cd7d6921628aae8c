"""The times a new user meets: help, encoding, the demo, and with --clone the two README commands.

    python benchmarks/basics.py [--clone] [--data huanhuan.json --model FOLDER]

Each figure is the median of several runs in one call; `results/basics.json` keeps them with
versions, hardware and command. `--clone` makes a fresh clone of this repository in a temporary
folder and runs `make demo` and `make test` there (some minutes; the package index is used).
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


def measure_clone() -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "myna"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        commands = {"make_demo": ["make", "demo"], "make_test": ["make", "test"]}
        return {name: round(seconds(command, clone)[0], 1) for name, command in commands.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--data", help="huanhuan.json")
    parser.add_argument("--model", help="folder with a BlueLM tokenizer")
    parser.add_argument("--clone", action="store_true")
    options = parser.parse_args()
    results: dict[str, object] = {
        "command": "python benchmarks/basics.py " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor().name,
        "cores": os.cpu_count(),
        "versions": {
            name: version(name) for name in ("myna", "torch", "transformers", "peft", "tokenizers")
        },
        "help_seconds": measure_help(options.runs),
    }
    if options.data and options.model:
        results["encoding"] = measure_encoding(options.model, options.data, options.runs)
    results["demo"] = measure_demo(min(options.runs, 3))
    if options.clone:
        results["clean_clone_seconds"] = measure_clone()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(results, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
