"""`myna eval` on runs: the loss of training, the rows that were held out, what a person sees."""

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from myna.cli import eval as command
from myna.cli.eval import Options
from myna.cli.main import app
from myna.cli.train import run as train
from myna.config_file import load_config
from myna.errors import ConfigError, DataError, Interrupted
from myna.training.events import read_events
from myna.training.stop import StopRequest

JOB = """\
model: {model}
data: {data}
dtype: float32
system: Answer like a bird.
held_out: 5
lora: {{rank: 4, dropout: 0.1}}
train: {{epochs: 4, batch_size: 6, learning_rate: 1e-2, eval_steps: 8}}
"""


def trained(job: Path, *overrides: str) -> Path:
    """The command in this process: its run directory."""
    return train(load_config(job, overrides), console=Console(quiet=True)).directory.path


@pytest.fixture(scope="module")
def job(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    rows = folder / "rows.jsonl"
    lines = [
        {"instruction": f"What is {number}?", "output": f"It is {number * 7 % 10}!"}
        for number in range(24)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = folder / "job.yaml"
    path.write_text(JOB.format(model=tiny_model, data=rows))
    return path


@pytest.fixture(scope="module")
def finished(job: Path) -> Path:
    return trained(job, f"output={job.parent / 'finished'}")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be judged in any way."""
    return shutil.copytree(finished, tmp_path / "run")


def judged(run: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """evaluation.json and what was printed."""
    said = io.StringIO()
    options = {"max_new_tokens": 5, **options}
    command.run(run, Options(**options), console=Console(file=said, width=160))
    return json.loads((run / "evaluation.json").read_text(encoding="utf-8")), said.getvalue()


def test_the_model_card_tells_what_was_found(run: Path) -> None:
    card = run / "adapter" / "README.md"
    assert "## Evaluation" not in card.read_text(encoding="utf-8")
    found, _ = judged(run)
    losses = " | ".join(f"{found['loss'][side]:.4g}" for side in ("base", "adapter"))
    text = card.read_text(encoding="utf-8")
    assert f"`myna eval` on {found['rows_judged']} rows." in text and f"| loss | {losses} |" in text


def plain_loss(model: Path, entry: dict[str, Any]) -> float:
    """The base's loss on one row, by transformers alone; the byte-level tokenizer is trivial."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [
        {"role": "system", "content": "Answer like a bird."},
        {"role": "user", "content": entry["question"]},
    ]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before = tokenizer(prompt)["input_ids"]
    answer = tokenizer(entry["reference"] + "<|im_end|>")["input_ids"]
    labels = torch.tensor([[-100] * len(before) + answer])
    with torch.no_grad():
        output = AutoModelForCausalLM.from_pretrained(model)(
            input_ids=torch.tensor([before + answer]), labels=labels
        )
    return float(output.loss)


def test_the_held_out_loss_is_that_of_training_and_the_base_is_the_base(
    run: Path, tiny_model: Path
) -> None:
    found, said = judged(run)
    last = [event for event in read_events(run / "events.jsonl") if event["event"] == "eval"][-1]
    assert found["data"] == "held-out rows of the run" and found["rows_judged"] == 5
    assert found["loss"]["adapter"] == pytest.approx(last["loss"], rel=1e-5)
    assert found["trained_tokens"] == last["tokens"]
    assert found["loss"]["adapter"] < found["loss"]["base"] - 0.2  # it learned
    for row in found["rows"]:
        assert row["place"].startswith("rows.jsonl line ") and row["question"].startswith("What is")
        assert row["loss"]["base"] == pytest.approx(plain_loss(tiny_model, row), rel=1e-5)
    assert list(found["metrics"]) == ["exact_match", "chrf"]
    for name, sides in found["metrics"].items():
        assert set(sides) == {"base", "adapter"} and found["scale"][name] in (1, 100)
    assert found["forgetting"]["tokens"] > 1000 and found["forgetting"]["base"] > 1
    for text in (
        "5 rows (held-out rows of the run), answered by ",
        "greedy, at most 5 tokens",
        "loss per trained token",
        f"{found['loss']['adapter']:.4f}",
        "perplexity",
        "chrf",
        "forgetting: loss on neutral sentences, English and Chinese",
        "answers side by side",
        "rows of the highest loss",
        f"All rows: {run / 'evaluation.json'}",
    ):
        assert text in said, text
    worst = max(found["rows"], key=lambda row: row["loss"]["adapter"])
    assert said.index(worst["place"]) > said.index("rows of the highest loss")


def test_rows_of_a_file_and_answers_that_contradict_each_other(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    lines = [
        {"instruction": "What is 3?", "output": "It is 1!"},
        {"instruction": "Who?", "output": "Nobody at all, I am \x1b[31msure."},
        {"instruction": "What is 3?", "output": "It is 4!"},
        {"instruction": "What is 4?", "output": "It is 8!"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, said = judged(run, data=str(path), metrics=("contains", "regex:.*"), limit=3)
    assert found["data"] == str(path) and found["rows_judged"] == 3
    assert [row["place"] for row in found["rows"]] == [f"mine.jsonl line {n}" for n in (1, 2, 3)]
    assert found["metrics"]["regex:.*"] == {"base": 1.0, "adapter": 1.0}
    assert "mine.jsonl line 3 has another" in " ".join(said.split())
    assert "\x1b" not in said and "\ufffd[31msure" in said


def test_questions_without_answers(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('{"instruction": "a"}\n{"instruction": "b"}\n')
    found, said = judged(run, data=str(path))
    assert found["loss"] is None and found["perplexity"] is None and found["metrics"] == {}
    assert [row["reference"] for row in found["rows"]] == [None, None]
    assert found["rows"][0]["base"] is not None and found["rows"][0]["loss"] is None
    assert "note: not judged by exact_match: the rows have no answers" in said
    with pytest.raises(ConfigError, match=r"^metric chrf compares with the row's own answer"):
        judged(run, data=str(path), metrics=("chrf",))


def test_what_cannot_be_judged(run: Path, job: Path, tmp_path: Path) -> None:
    def refusal(kind: type[Exception], place: Path, **options: Any) -> str:
        with pytest.raises(kind) as refused:
            judged(place, **options)
        return str(refused.value)

    assert refusal(ConfigError, tmp_path) == (
        f"{tmp_path} is not a run: it has no config.yaml.\n"
        "  Give a run directory such as runs/NAME; `myna runs` lists them."
    )
    assert 'metric "rogue" is unknown' in refusal(ConfigError, run, metrics=("rogue",))
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(
        text.replace("held_out: 5.0", "held_out: 0").replace("eval_steps: 8", "eval_steps: null")
    )
    assert refusal(ConfigError, run) == (
        f"{run} held no rows out (held_out is 0), so there are none that it was not trained on.\n"
        "  Name rows with --data FILE, or train with held_out: 0.05."
    )
    moved = tmp_path / "rows.jsonl"
    lines = (job.parent / "rows.jsonl").read_text().splitlines()
    moved.write_text("\n".join(lines[1:]))
    config.write_text(text.replace(str(job.parent / "rows.jsonl"), str(moved)))
    assert refusal(DataError, run).startswith(
        f"The data of {run} is not what it was when the run began (sha256 "
    )
    assert not (run / "evaluation.json").exists()


def test_the_command_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text("def short(answer, reference, question):\n    return len(answer) < 3\n")
    arguments = ["eval", str(run), "--metric", "json", "--metric", f"{judge}:short"]
    done = CliRunner().invoke(app, [*arguments, "--limit", "2", "--max-new-tokens", "2"])
    assert done.exit_code == 0, done.output
    found = json.loads((run / "evaluation.json").read_text())
    assert list(found["metrics"]) == ["json", "judge.py:short"] and found["rows_judged"] == 2
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["eval", str(run), "--tasks", "which"])
    assert str(done.exception) == (
        "--tasks needs lm-eval, which is not installed.\n  pip install 'myna[lm-eval]'"
    )


def test_tasks_of_lm_eval_stand_beside_the_rows(run: Path, tmp_path: Path) -> None:
    data = tmp_path / "which.jsonl"
    data.write_text('{"question": "a", "choices": ["x", "y"], "label": 1}\n')
    (tmp_path / "which.yaml").write_text(
        "task: which\ndataset_path: json\ndataset_kwargs:\n"
        f"  data_files: {{test: {data}}}\n  cache_dir: {tmp_path / 'cache'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\n"
        "doc_to_choice: choices\ndoc_to_target: label\nmetric_list: [{metric: acc}]\n"
    )
    found, said = judged(run, tasks=("which",), tasks_folder=tmp_path, limit=1)
    assert found["rows_judged"] == 1 and set(found["tasks"]["which"]["acc"]) == {"base", "adapter"}
    assert "which: acc" in said


def adapter_hash(directory: Path) -> str:
    content = (directory / "adapter" / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()


def scores(directory: Path) -> list[dict[str, float]]:
    events = read_events(directory / "events.jsonl")
    return [event["metrics"] for event in events if event["event"] == "eval"]


def test_a_run_that_is_judged_ends_in_the_same_bytes_also_when_it_was_stopped(
    job: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = "train.metrics=[chrf, json]"
    straight = trained(job, f"output={job.parent / 'straight'}", metrics)
    assert adapter_hash(straight) == adapter_hash(finished)
    assert len(scores(straight)) == 2 and all(
        set(each) == {"chrf", "json"} for each in scores(straight)
    )
    # The last evaluation is of the adapter that was saved.
    found, _ = judged(straight, max_new_tokens=None)
    assert found["metrics"]["chrf"]["adapter"] == pytest.approx(scores(straight)[-1]["chrf"])
    assert list(found["metrics"]) == ["chrf", "json"]  # the run's own

    asked = iter(range(100))
    monkeypatch.setattr(StopRequest, "__call__", lambda _: next(asked) == 8)
    with pytest.raises(Interrupted):
        trained(job, f"output={job.parent / 'cut'}", metrics)
    monkeypatch.undo()
    cut = trained(job, f"output={job.parent / 'cut'}", metrics)
    assert adapter_hash(cut) == adapter_hash(straight) and scores(cut) == scores(straight)


def test_faults_of_metrics_show_before_the_first_step(job: Path, tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text("def broken(answer, reference, question):\n    return answer.no\n")
    with pytest.raises(ConfigError, match=r"^metric judge.py:broken failed on rows.jsonl line"):
        trained(job, f"output={tmp_path / 'a'}", f"train.metrics={judge}:broken")
    with pytest.raises(ConfigError, match=r"^metric regex: "):
        trained(job, f"output={tmp_path / 'b'}", "train.metrics='regex:('")
    assert not (tmp_path / "a" / "events.jsonl").exists()


def test_a_run_directory_names_functions_but_does_not_have_them_run(run: Path) -> None:
    (run / "harm.py").write_text("raise SystemExit('run')\n")
    config = run / "config.yaml"
    config.write_text(
        config.read_text().replace("metrics: []", 'metrics: ["harm.py:score", "json"]')
    )
    found, said = judged(run)
    assert list(found["metrics"]) == ["json"]
    assert "harm.py:score: --metric runs files, the settings of a run do not" in " ".join(
        said.split()
    )
