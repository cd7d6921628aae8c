"""`myna merge` as a person runs it, on a run that was trained just before."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from myna.cli import train
from myna.cli.merge import run, texts_to_compare
from myna.config_file import load_config
from myna.data.conversation import Message
from myna.errors import ConfigError
from myna.export.origin import open_origin
from myna.inference.generate import Sampling
from myna.inference.speaker import open_speaker


@pytest.fixture(scope="module")
def bird(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run with four rows held out; what a test changes is a copy."""
    folder = tmp_path_factory.mktemp("bird")
    rows = [{"instruction": f"What is {n}?", "output": f"It is {n * 7 % 10}!"} for n in range(24)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = folder / "job.yaml"
    job.write_text(
        f"model: {tiny_model}\ndata: {folder / 'rows.jsonl'}\ndtype: float32\nheld_out: 4\n"
        f"system: Answer like a bird.\nlora: {{rank: 4}}\noutput: {folder / 'runs' / 'bird'}\n"
        "train: {epochs: 2, batch_size: 4, learning_rate: 2e-2}\n"
    )
    train.run(load_config(job), console=Console(file=io.StringIO()))
    return folder / "runs" / "bird"


def merge(source: Path, out: Path, **options: object) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    settings: dict = {"dtype": None, "force_base": False} | options
    run(str(source), out, console=console, **settings)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_from_a_run_to_a_model_that_plain_transformers_answers_with(
    tmp_path: Path, tiny_model: Path, bird: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = merge(bird, Path("merged"))
    assert lines[0] == "to compare on: 4 held-out rows of the run"
    assert re.fullmatch(
        r"the same but for rounding: \d+ positions of 4 texts in float32: KL divergence "
        r"\d\.\de-\d\d in the mean, \d\.\de-\d\d at most; logits differ by \d\.\de-\d\d at most",
        lines[-2],
    )
    assert lines[-1] == "The merged model is in merged"

    speaker = open_speaker(str(bird), device="cpu", dtype="float32")
    prompt = speaker.encoder.prompt([Message("user", "What is 5?")])
    ((_, answer),) = speaker.answer_all(
        [prompt.ids], Sampling(max_new_tokens=12, temperature=0), batch_size=1
    )
    model = AutoModelForCausalLM.from_pretrained("merged", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained("merged")
    messages = [{"role": "system", "content": "Answer like a bird."}]
    messages.append({"role": "user", "content": "What is 5?"})
    batch = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert batch["input_ids"][0].tolist() == list(prompt.ids)
    out = model.generate(**batch, max_new_tokens=12, do_sample=False)
    ids = out[0, len(prompt.ids) :].tolist()
    assert tuple(ids[: len(answer.ids)]) == answer.ids
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        moved = (plain(batch["input_ids"]).logits - model(batch["input_ids"]).logits).abs().max()
    assert moved > 0.05, "the adapter is in it"
    assert "Answer like a bird." in Path("merged/README.md").read_text()


def test_without_held_out_rows_and_without_data(tmp_path: Path, bird: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(bird, directory)
    config = directory / "config.yaml"
    settings = config.read_text()

    def compared_on(source: Path) -> str:
        origin = open_origin(str(source), needs_adapter=True)
        texts, where_from = texts_to_compare(str(source), origin)
        assert len(texts) == 8
        return where_from

    start = "built-in questions, not held-out rows "
    assert compared_on(directory / "adapter") == f"{start}(it is no run directory)"
    config.write_text(settings.replace("rows.jsonl", "gone.jsonl"))
    assert compared_on(directory).startswith(f"{start}(the run's own cannot be read any more: ")
    config.write_text(re.sub(r"held_out: .*", "held_out: 0", settings))
    assert compared_on(directory) == f"{start}(the run held none out)"


def test_another_base_than_the_adapter_was_trained_on(
    tmp_path: Path, tiny_model: Path, bird: Path
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_model, base)
    shutil.copytree(bird / "adapter", adapter)
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    other.save_pretrained(base)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError) as caught:
        merge(adapter, tmp_path / "out")
    assert re.search(r"trained with the base sampled:\w+; here is sampled:\w+", str(caught.value))
    assert not (tmp_path / "out").exists()
    lines = merge(adapter, tmp_path / "out", force_base=True, dtype="float32")
    assert lines[1].startswith("forced by --force-base: trained with the base")
    assert "forced by --force-base" in (tmp_path / "out" / "README.md").read_text()


def test_a_quantised_base_is_told_before_training(
    tmp_path: Path, tiny_model: Path, rows: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    settings = json.loads((base / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(settings))
    job = tmp_path / "job.yaml"
    job.write_text(f"model: {base}\ndata: {rows}\noutput: {tmp_path / 'run'}\ndtype: float32\n")
    console = Console(file=io.StringIO(), width=400)
    with pytest.raises(ConfigError):  # transformers' reader of that format is not installed
        train.run(load_config(job), console=console)
    assert (
        "note: the base is quantised (gptq): an adapter trained on it can be used on it, but never "
        "merged into it or exported with it; for that, train on the model it was made from"
    ) in console.file.getvalue()  # type: ignore[attr-defined]
