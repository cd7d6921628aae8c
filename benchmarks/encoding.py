"""The time and memory that encoding takes: rows of a file to token ids with labels.

    pip install -c constraints.txt '.[bench]'
    python benchmarks/encoding.py [--rows 1000000] [--rounds 3] [--small]
    python benchmarks/encoding.py --many 10000000

Seeded rows in the alpaca format, of 60 to 200 tokens with their system text, under ChatML and a
byte-level BPE of 8,000 pieces that is trained on some of them. Each contender runs in a process of
its own, one after the other, and again for every round:

    myna cold      `prepare_rows`, as `myna train` and `myna data` call it, with an empty cache
    myna warm      the same again
    tutorial       pandas to `datasets`, then `map` with the tutorial's function: one process
    tutorial x2    the same with num_proc=2
    trl            what SFTTrainer does with rows of prompt and completion before it trains

The clock runs from the path of the file to rows that can be trained on; importing libraries is not
counted, starting processes is. `cpu_seconds` are those of the whole process and its children, with
the imports. Memory is the peak of the process and its children together, sampled four times a
second: what belongs to each alone, and its share of what they have in common. Much of myna's is its
store on disk, which the system takes back at need; so what is of no file stands beside it. Ids of
myna are compared with `apply_chat_template` first. `results/encoding.json` keeps medians with
versions, hardware and command; `--small` takes 20,000 rows once and writes nothing. `--many`
compares the memory of a tenth of so many short rows with that of all, from the file to the packs of
an epoch's first steps (`results/encoding_memory.json`); it needs no quiet machine.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "encoding.json"
MEMORY_RESULTS = RESULTS.with_name("encoding_memory.json")
SYSTEM = "You are a helpful assistant that answers in full sentences."
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PIECES, WORDS, TAUGHT = 8_000, 30_000, 20_000
"""Of the tokenizer; different words; rows that the tokenizer is trained on."""
SAMPLED_SECONDS = 0.25
CHECKED_ROWS = 1_000


def words(draw: random.Random) -> list[str]:
    """Pronounceable, short ones first."""
    consonants = [*"bcdfghklmnprstvw", "st", "tr", "pl"]
    syllables = [first + vowel for first in consonants for vowel in "aeiou"]
    found = dict.fromkeys(
        "".join(draw.choices(syllables, k=draw.choice((1, 1, 2, 2, 3, 4)))) + draw.choice("  nrst")
        for _ in range(WORDS * 2)
    )
    return sorted((word.strip() for word in found), key=len)[:WORDS]


def write_rows(path: Path, number: int, seed: int = 0, *, short: bool = False) -> None:
    """Alpaca rows; words are as frequent as in a natural language (Zipf)."""
    draw = random.Random(seed)
    vocabulary = words(draw)
    total, cumulative = 0.0, []
    for rank in range(len(vocabulary)):
        total += 1 / (rank + 2)
        cumulative.append(total)

    def text(low: int, high: int) -> str:
        chosen = draw.choices(vocabulary, cum_weights=cumulative, k=draw.randint(low, high))
        ends = range(7, len(chosen), 9)
        for at in ends:
            chosen[at] += draw.choice((".", ".", ",", "?", ":\n"))
        return " ".join(chosen).capitalize() + "."

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(number):
            if short:
                row = {"instruction": text(2, 6), "input": "", "output": text(2, 8)}
            else:
                row = {"instruction": text(6, 30), "input": "", "output": text(10, 90)}
            if not short and draw.random() < 0.3:
                row["input"] = text(5, 25)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def make_model(folder: Path, rows: Path) -> None:
    """A folder that myna takes for a model: a tokenizer and the shape of one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = []
    with open(rows, encoding="utf-8") as file:
        for _, line in zip(range(TAUGHT), file, strict=False):
            texts += json.loads(line).values()
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    ).save_pretrained(folder)


def run_myna(folder: Path) -> dict[str, Any]:
    from myna.cli.preparation import prepare_rows
    from myna.config import Config

    config = Config(model=str(folder / "model"), data=[str(folder / "rows.jsonl")], system=SYSTEM)
    started = time.perf_counter()
    dataset = prepare_rows(config, trust_remote_code=False).dataset
    seconds = time.perf_counter() - started
    accounting = dataset.accounting
    return {
        "seconds": seconds,
        "rows": len(dataset.examples),
        "tokens": accounting.tokens,
        "trained_tokens": accounting.trained_tokens,
    }


def run_myna_epoch(folder: Path) -> dict[str, Any]:
    """Rows, held-out split, the order of an epoch, and the packs of its first steps."""
    from myna.cli.preparation import prepare_rows
    from myna.config import Config
    from myna.data.held_out import split_held_out
    from myna.data.loader import Draws, rows_of_steps
    from myna.data.packing import pack_step

    config = Config(model=str(folder / "model"), data=[str(folder / "rows.jsonl")], system=SYSTEM)
    started = time.perf_counter()
    dataset = prepare_rows(config, trust_remote_code=False).dataset
    seconds = time.perf_counter() - started
    trained, held_out = split_held_out(dataset.examples, 1000, 42)
    steps = rows_of_steps(Draws.of(trained), 16, seed=42, first_step=1, last_step=200)
    packs = [pack for _, _, rows in steps for pack in pack_step(trained, rows, token_budget=None)]
    return {
        "seconds": seconds,
        "rows": len(trained) + len(held_out),
        "tokens": dataset.accounting.tokens,
        "packs": len(packs),
    }


def run_tutorial(folder: Path, processes: int | None) -> dict[str, Any]:
    import pandas
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder / "model"))

    def process(row: dict[str, str]) -> dict[str, list[int]]:
        """As the tutorial's: prompt and answer by two calls, lists put together."""
        longest = 384
        prompt = tokenizer(
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
            f"{row['instruction'] + row['input']}<|im_end|>\n<|im_start|>assistant\n",
            add_special_tokens=False,
        )
        answer = tokenizer(f"{row['output']}", add_special_tokens=False)
        ids = [*prompt["input_ids"], *answer["input_ids"], tokenizer.eos_token_id]
        mask = [*prompt["attention_mask"], *answer["attention_mask"], 1]
        labels = [-100] * len(prompt["input_ids"])
        labels += [*answer["input_ids"], tokenizer.eos_token_id]
        return {
            "input_ids": ids[:longest],
            "attention_mask": mask[:longest],
            "labels": labels[:longest],
        }

    started = time.perf_counter()
    rows = Dataset.from_pandas(pandas.read_json(folder / "rows.jsonl", lines=True))
    encoded = rows.map(process, remove_columns=rows.column_names, num_proc=processes)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, **count(encoded)}


def run_trl(folder: Path) -> dict[str, Any]:
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(str(folder / "model"))
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(str(folder / "model")))
    arguments = SFTConfig(
        output_dir=str(folder / "unused"),
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    started = time.perf_counter()
    rows = load_dataset("json", data_files=str(folder / "turns.jsonl"), split="train")
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer
    )
    seconds = time.perf_counter() - started
    return {"seconds": seconds, **count(trainer.train_dataset)}


def count(encoded: Any) -> dict[str, Any]:
    """Rows and tokens of a table with `input_ids`."""
    import pyarrow.compute

    lengths = pyarrow.compute.list_value_length(encoded.data.column("input_ids"))
    return {"rows": len(encoded), "tokens": pyarrow.compute.sum(lengths).as_py()}


CONTENDERS = {
    "myna cold": run_myna,
    "myna warm": run_myna,
    "tutorial": lambda folder: run_tutorial(folder, None),
    "tutorial x2": lambda folder: run_tutorial(folder, 2),
    "trl": run_trl,
}
HIDDEN = {"myna epoch": run_myna_epoch}
"""Not part of the comparison."""


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Run one contender in a process of its own; the peak of what it and its children hold."""
    caches = folder / "caches"
    if name != "myna warm":
        shutil.rmtree(caches, ignore_errors=True)
    environment = os.environ | {
        "MYNA_CACHE": str(caches / "myna"),
        "HF_DATASETS_CACHE": str(caches / "datasets"),
        "HF_HUB_OFFLINE": "1",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, __file__, "--contender", name, "--folder", str(folder)]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    peaks = {"pss": 0, "anonymous": 0}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLED_SECONDS):
            for kind, found in memory_of_tree(process.pid).items():
                peaks[kind] = max(peaks[kind], found)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, errors = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{name} failed:\n{errors}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return {
        **found,
        "process_seconds": time.perf_counter() - started,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_pss_bytes": peaks["pss"],
        "peak_anonymous_bytes": peaks["anonymous"],
    }


def memory_of_tree(root: int) -> dict[str, int]:
    """Proportional set size of a process and all under it, and what of it is of no file."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    tree = {root}
    while grown := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= grown
    total = {"pss": 0, "anonymous": 0}
    for pid in tree:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            if line.startswith("Pss:"):
                total["pss"] += int(line.split()[1]) * 1024
            elif line.startswith("Pss_Anon:"):
                total["anonymous"] += int(line.split()[1]) * 1024
    return total


def check_ids(folder: Path) -> None:
    """myna's ids of the first rows are the chat template's."""
    from transformers import AutoTokenizer

    from myna.cli.preparation import prepare_rows
    from myna.config import Config

    first = folder / "first.jsonl"
    with open(folder / "rows.jsonl", encoding="utf-8") as file:
        lines = [line for _, line in zip(range(CHECKED_ROWS), file, strict=False)]
    first.write_text("".join(lines), encoding="utf-8")
    config = Config(model=str(folder / "model"), data=[str(first)], system=SYSTEM)
    examples = prepare_rows(config, trust_remote_code=False).dataset.examples
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "model"))
    for line, example in zip(lines, examples, strict=True):
        prompt, completion = turns_of(json.loads(line)).values()
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert list(example.prompt_ids) == ids, line
        text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        whole = tokenizer(text.removesuffix("\n"), add_special_tokens=False)["input_ids"]
        assert list(example.prompt_ids + example.completion_ids) == whole, line


def turns_of(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """The same row as trl takes it."""
    question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    system = {"role": "system", "content": SYSTEM}
    return {
        "prompt": [system, {"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


def write_turns(folder: Path) -> None:
    with (
        open(folder / "rows.jsonl", encoding="utf-8") as rows,
        open(folder / "turns.jsonl", "w", encoding="utf-8") as turns,
    ):
        for line in rows:
            turns.write(json.dumps(turns_of(json.loads(line)), ensure_ascii=False) + "\n")


def compare(rows: int, rounds: int, folder: Path) -> dict[str, Any]:
    write_rows(folder / "rows.jsonl", rows)
    write_turns(folder)
    make_model(folder / "model", folder / "rows.jsonl")
    check_ids(folder)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    for number in range(rounds):
        for name in CONTENDERS:
            found[name].append(measured(name, folder))
            seconds = found[name][-1]["seconds"]
            print(f"round {number + 1}: {name:12} {seconds:8.2f} s", file=sys.stderr, flush=True)
    results = {name: medians(runs) for name, runs in found.items()}
    base = results["tutorial"]["seconds"]
    return {
        "rows": rows,
        "file_bytes": (folder / "rows.jsonl").stat().st_size,
        "rounds": rounds,
        "contenders": results,
        "times_faster_than_the_tutorial": {
            name: round(base / each["seconds"], 2) for name, each in results.items()
        },
    }


def compare_memory(rows: int, folder: Path) -> dict[str, Any]:
    """Peaks of memory for `rows` short rows and for a tenth of them."""
    found = {}
    for number in (rows // 10, rows):
        write_rows(folder / "rows.jsonl", number, short=True)
        if not (folder / "model").exists():
            make_model(folder / "model", folder / "rows.jsonl")
        found[f"{number:,} rows"] = measured("myna epoch", folder)
        print(f"{number:,} rows: {found[f'{number:,} rows']}", file=sys.stderr, flush=True)
    return {"memory": found}


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in runs[0].items():
        values = [run[name] for run in runs]
        if name.endswith("seconds"):
            result[name] = round(statistics.median(values), 3)
            result[f"{name}_of_each"] = [round(each, 3) for each in values]
        elif name.endswith("bytes"):
            result[name] = max(values)
        else:
            assert set(values) == {value}, f"{name} differs between rounds: {values}"
            result[name] = value
    result["rows_per_second"] = round(result["rows"] / result["seconds"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="20,000 rows once, nothing written")
    parser.add_argument("--many", type=int, help="compare the memory of so many rows and a tenth")
    parser.add_argument("--contender", choices=[*CONTENDERS, *HIDDEN], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="for the rows and caches; else a temporary one")
    options = parser.parse_args()
    if options.contender:
        print(json.dumps({**CONTENDERS, **HIDDEN}[options.contender](options.folder)))
        return

    from myna.device import memory_total, processor

    rows, rounds = (20_000, 1) if options.small else (options.rows, options.rounds)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.many:
            compared = compare_memory(options.many, Path(folder))
        else:
            compared = compare(rows, rounds, Path(folder))
    names = ("torch", "transformers", "tokenizers", "datasets", "trl", "numpy", "pandas")
    results = {
        "command": " ".join(["python benchmarks/encoding.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor().name,
        "cores": processor().allowed_cores,
        "memory_bytes": memory_total(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {
            "python": sys.version.split()[0],
            **{name: version(name) for name in names},
        },
        **compared,
    }
    text = json.dumps(results, indent=1, ensure_ascii=False)
    if not options.small:
        target = MEMORY_RESULTS if options.many else RESULTS
        target.parent.mkdir(exist_ok=True)
        target.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
