"""Merging and exporting, verified: how far results are from base and adapter.

    python benchmarks/exporting.py

trains the demo, gives each golden checkpoint of BlueLM an adapter of random numbers, merges and
exports them, and writes `results/exporting.json`: the KL divergence of each merged folder, and of
each GGUF as llama.cpp computes it, with the share of greedy tokens that are the same. The latter
needs llama-cpp-python (`pip install llama-cpp-python` builds it); without it, it is left out.
"""

import argparse
import io
import json
import shutil
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import tiny_model
from myna.cli.demo import demo_config
from myna.cli.train import run as train
from myna.data.conversation import Message
from myna.demo.score import load_held_out
from myna.device import processor
from myna.export.gguf import export_model
from myna.export.merge import merge
from myna.export.origin import Origin, built_in_prompts, open_origin
from myna.lora.adapter_file import AdapterMetadata, save_adapter
from myna.lora.inject import inject
from myna.models.load import fingerprint_of, load_model
from myna.models.tokenizer import load_tokenizer

RESULTS = Path(__file__).parent / "results" / "exporting.json"
GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
GOLDENS = ("mha_stable", "no_stable", "ntkmixed", "gqa_derived", "hub_like")
KINDS = ("f32", "f16", "bf16", "q8_0")
NEW_TOKENS = 24


def golden_run(name: str, folder: Path) -> Path:
    """An adapter of random numbers, as large as an update that changes every answer."""
    base = folder / name
    shutil.copytree(GOLDEN / name, base)
    if not (base / "tokenizer.model").is_file():
        tiny_model.byte_level_tokenizer().save_pretrained(base)
    model = load_model(str(base), dtype=torch.float32, device=torch.device("cpu")).model
    injected = inject(
        model, rank=8, alpha=16, dropout=0.0, target_modules="all-linear", use_rslora=False,
        use_dora=False, init="default", seed=1,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    for parameter in injected.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.05, generator=generator)
    metadata = AdapterMetadata(
        base_model=str(base),
        base_fingerprint=fingerprint_of(str(base)),
        stop_ids=load_tokenizer(str(base)).special.stop_ids,
    )
    save_adapter(injected.model, folder / f"{name}-adapter", metadata=metadata)
    return folder / f"{name}-adapter"


def merged(origin: Origin, texts: list[tuple[int, ...]], folder: Path) -> dict[str, Any]:
    """Both ways of storing, with their distance from base and adapter."""
    found = {}
    for name, dtype in (("as the base stores it", None), ("float32", torch.float32)):
        agreement = merge(origin, folder / name, texts, dtype=dtype)
        found[name] = asdict(agreement) | {"compared_in": str(agreement.compared_in)}
    return found


def in_llama_cpp(origin: Origin, texts: list[tuple[int, ...]], folder: Path) -> dict[str, Any]:
    """Each number format against the merged model in float32, on the same ids."""
    import llama_cpp

    reference = AutoModelForCausalLM.from_pretrained(folder / "float32", dtype=torch.float32)
    found = {}
    for kind in KINDS:
        file = folder / f"{kind}.gguf"
        export_model(origin, file, kind)
        model = llama_cpp.Llama(str(file), n_ctx=256, logits_all=True, n_threads=1, verbose=False)
        divergences, same, total = [], 0, 0
        for ids in texts:
            model.reset()
            model.eval(list(ids))
            theirs = torch.log_softmax(
                torch.tensor(np.array(model.scores[: len(ids)])).double(), -1
            )
            with torch.no_grad():
                ours = torch.log_softmax(reference(torch.tensor([ids])).logits[0].double(), -1)
            divergences.append((ours.exp() * (ours - theirs)).sum(-1))
            batch = torch.tensor([ids])
            answer = reference.generate(
                batch, attention_mask=torch.ones_like(batch), max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )[0, len(ids) :].tolist()  # fmt: skip
            model.reset()
            model.eval(list(ids))
            for token in answer:
                if int(np.argmax(model.scores[model.n_tokens - 1])) != token:
                    break
                same += 1
                model.eval([token])
            total += len(answer)
        divergence = torch.cat(divergences)
        found[kind] = {
            "bytes": file.stat().st_size,
            "mean_kl": float(divergence.mean()),
            "largest_kl": float(divergence.max()),
            "greedy_tokens": total,
            "same_greedy_tokens_until_the_first_other": same,
        }
    return found


def main() -> None:
    """Everything, into one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    torch.set_num_threads(1)
    try:
        llama = version("llama-cpp-python")
    except ModuleNotFoundError:
        llama = None
    results: dict[str, Any] = {
        "processor": processor().name,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "gguf")}
        | {"llama-cpp-python": llama},
        "models": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        run = train(demo_config(place / "demo-run"), console=Console(file=io.StringIO()))
        sources = {"demo": run.directory.path}
        sources |= {name: golden_run(name, place) for name in GOLDENS}
        for name, source in sources.items():
            origin = open_origin(str(source), needs_adapter=True)
            texts = built_in_prompts(origin.encoder)
            if name == "demo":
                questions = [row.question for row in load_held_out()[:8]]
                texts = [origin.encoder.prompt([Message("user", text)]).ids for text in questions]
            folder = place / f"{name}-results"
            found: dict[str, Any] = {"merged": merged(origin, texts, folder)}
            if llama is not None:
                found["llama.cpp"] = in_llama_cpp(origin, texts, folder)
            results["models"][name] = found
            print(name, json.dumps(found, indent=1))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
