"""`myna train` as a person runs it: in a process of its own, killed, resumed, refused."""

import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from myna.cli.train import Options, run
from myna.config_file import load_config
from myna.errors import ConfigError, MynaError
from myna.inference.speaker import open_speaker
from myna.training.events import read_events

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}


def myna(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "myna.cli.main", *map(str, arguments)],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def train(
    job: Path,
    *overrides: str,
    fresh: bool = False,
    allow: tuple[str, ...] = (),
    force_base: bool = False,
) -> tuple[Path, str]:
    """The command in this process: its run directory and what it printed."""
    console = Console(file=io.StringIO(), width=100)
    options = Options(fresh=fresh, allow_change=allow, force_base=force_base)
    finished = run(load_config(job, overrides), options, console=console)
    return finished.directory.path, console.file.getvalue()  # type: ignore[attr-defined]


def losses(directory: Path, *kinds: str) -> list[float]:
    events = read_events(directory / "events.jsonl")
    return [event["loss"] for event in events if event["event"] in (kinds or ("step",))]


def adapter_hash(directory: Path) -> str:
    content = (directory / "adapter" / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.yaml"
    path.write_text(
        f"model: {tiny_model}\ndata: rows.jsonl\ndtype: float32\nsystem: Answer like a bird.\n"
        "lora: {rank: 4, dropout: 0.1}\n"
        "train: {epochs: 2, batch_size: 4, micro_batch_size: 2, learning_rate: 1e-3, "
        "save_steps: 3}\n"
    )
    return path


def test_one_command_from_rows_to_an_adapter_and_what_a_person_reads(
    job: Path, tiny_model: Path
) -> None:
    done = myna("train", "job.yaml", "train.logging_steps=4", folder=job.parent)
    assert done.returncode == 0, done.stderr
    directory = job.parent / "runs" / "job"
    for text in (
        "rows in",  # accounting
        "⟦",  # one example, trained text marked
        "parameters trained",
        "12 steps of 4 rows (6 per epoch), 24 rows train, 0 held out (held_out: 0)",
        "memory: steps in up to 2 packs of at most ",
        ", no layer recomputed; peak ",
        "first step took",
        "step      4  epoch 0.67  loss",
        "only 12 steps",
        "The adapter is in runs/job/adapter",
        "myna chat runs/job",
    ):
        assert text in done.stdout, text
    assert (directory / "loss.png").read_bytes()[:4] == b"\x89PNG"
    names = {path.name for path in (directory / "adapter").iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "myna.json",
        "README.md",
        "tokenizer.json",
    }
    steps = [event for event in read_events(directory / "events.jsonl") if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 13))
    stored = json.loads((directory / "data.json").read_text())
    assert stored["rows_in"] == stored["trained"] == 24
    assert stored["trained_tokens"] * 2 == sum(event["trained_tokens"] for event in steps)
    config = (directory / "config.yaml").read_text()
    assert f"rank: 4  # {job.name} line 5" in config and "  seed: 42  # default" in config
    plan = json.loads((directory / "plan.json").read_text())
    measured = {"run", "device", "dtype", "reason", "computation", "memory", "prepacked"}
    assert plan.keys() == measured | {"format", "replans"}
    assert plan["prepacked"] == {
        "use": False,
        "reason": "weights are not prepacked: no such layouts for them",
    }
    assert plan["dtype"] == "float32" and plan["computation"].startswith("packs of shared prefixes")
    assert (plan["memory"]["limit"], plan["memory"]["layers_recomputed"]) == (8192, 0)
    assert plan["memory"]["expected_peak_bytes"] < plan["memory"]["budget_bytes"]
    assert plan["replans"] == []
    events = list(read_events(directory / "events.jsonl"))
    (told,) = [event for event in events if event["event"] == "plan"]
    assert told["memory"] == plan["memory"] and told["computation"] == plan["computation"]
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == [
        "step-00000009",
        "step-00000012",
    ]
    # Loads elsewhere: plain transformers and peft, and says the trained prompt.
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = peft.PeftModel.from_pretrained(base, directory / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(directory / "adapter")
    ids = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Answer like a bird."},
            {"role": "user", "content": "What is 1?"},
        ],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    trained = myna("data", "job.yaml", "--json", "--rows", "24", folder=job.parent)
    assert trained.returncode == 0, trained.stderr
    shown = json.loads(trained.stdout)["rows"]
    assert ids[0].tolist() in [row["prompt_ids"] for row in shown]
    with torch.no_grad(), model.disable_adapter():
        plain = model(ids).logits
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, plain, atol=1e-3)

    _, said = train(job)
    assert "is finished; nothing was changed" in said
    fresh, _ = train(job, fresh=True)
    assert fresh.name == "job-2" and adapter_hash(fresh) == adapter_hash(directory)


def test_a_run_killed_in_mid_step_resumes_by_the_same_command_to_the_same_bytes(job: Path) -> None:
    folder = job.parent
    straight, _ = train(job, "output=straight")
    process = subprocess.Popen(
        [sys.executable, "-m", "myna.cli.main", "train", "job.yaml"],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
    )
    events = folder / "runs" / "job" / "events.jsonl"
    deadline = time.monotonic() + 60
    while not events.exists() or events.read_text().count('"event": "step"') < 4:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "runs" / "job" / "adapter").exists()
    resumed, said = train(job)
    assert "going on after step" in said and "\nmemory: " in said
    assert adapter_hash(resumed) == adapter_hash(straight)
    steps = [e["step"] for e in read_events(events) if e["event"] == "step"]
    assert steps == list(range(1, 13))


def begun(job: Path, *overrides: str, steps: int) -> tuple["subprocess.Popen[str]", Path]:
    """The command in a process of its own that has done so many steps, and its events."""
    process = subprocess.Popen(
        [sys.executable, "-m", "myna.cli.main", "train", "job.yaml", *overrides],
        cwd=job.parent,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    events = job.parent / "runs" / "job" / "events.jsonl"
    deadline = time.monotonic() + 60
    while not events.exists() or events.read_text().count('"event": "step"') < steps:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    return process, events


def test_a_signal_stops_at_the_step_boundary_with_exit_code_75(job: Path) -> None:
    process, events = begun(job, "train.epochs=500", steps=2)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "SIGTERM: stopping after this step" in output
    assert "the same command goes on from here" in errors
    last = max(event["step"] for event in read_events(events) if event["event"] == "step")
    assert (events.parent / "checkpoints" / f"step-{last:08d}").is_dir()


def test_another_runs_directory_is_refused_with_both_values(job: Path) -> None:
    directory, _ = train(job, "train.max_steps=1")
    with pytest.raises(ConfigError) as caught:
        train(job, "train.max_steps=1", "train.learning_rate=0.5")
    assert str(caught.value) == (
        f"{directory} holds a run with other settings:\n"
        "  train.learning_rate is 0.5 now and was 0.001\n"
        "  Repeat the command that began this run, allow it with --allow-change KEY, start another "
        "with --fresh, or choose another place with --output."
    )
    train(job, "train.max_steps=1", "train.logging_steps=1")  # changes no trained number


def test_changed_data_is_noticed_on_resume(job: Path) -> None:
    directory, _ = train(job, "train.max_steps=1")
    (directory / "adapter").rename(job.parent / "gone")
    data = job.parent / "rows.jsonl"
    data.write_text(data.read_text().replace("It is 7!", "It is 8!"))
    with pytest.raises(ConfigError, match=r"holds a run with other data:\n  data is "):
        train(job, "train.max_steps=1")


def test_what_a_run_killed_at_its_beginning_left_is_no_run(job: Path) -> None:
    """config.yaml is the last of what is written before step 1."""
    directory, _ = train(job, "output=killed", "train.max_steps=1")
    for path in directory.iterdir():
        if path.name not in ("data.json", "plan.json", "sample.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    data = job.parent / "rows.jsonl"
    data.write_text(data.read_text().replace("It is 7!", "It is 8!"))
    resumed, _ = train(job, "output=killed", "train.max_steps=2", "train.batch_size=2")
    fresh, _ = train(job, "output=fresh", "train.max_steps=2", "train.batch_size=2")
    assert adapter_hash(resumed) == adapter_hash(fresh)
    for name in ("data.json", "sample.json"):
        assert (resumed / name).read_bytes() == (fresh / name).read_bytes()
    assert "batch_size: 2" in (resumed / "config.yaml").read_text()


def test_a_run_directory_stands_for_its_yaml(job: Path) -> None:
    directory, _ = train(job, "train.max_steps=2")
    again, said = train(directory)
    assert again == directory and "is finished; nothing was changed" in said


def test_start_from_goes_on_with_a_finished_adapter(job: Path) -> None:
    first, _ = train(job, "train.epochs=10", "train.learning_rate=0.02")
    (job.parent / "more.jsonl").write_text((job.parent / "rows.jsonl").read_text())
    second, _ = train(job, "data=more.jsonl", "lora.rank=4", "lora.start_from=runs/job", "output=b")
    assert losses(second)[0] < 0.95 * losses(first)[0]
    with pytest.raises(ConfigError) as caught:
        train(job, "lora.start_from=runs/job", "lora.rank=8", "output=c")
    assert str(caught.value) == (
        "lora.rank is 8, but lora.start_from keeps the shape of its adapter, which has 4.\n"
        "  Leave lora.rank out, or start a new adapter without lora.start_from."
    )


def test_pissa_resumes_and_is_saved_as_a_plain_adapter_on_the_untouched_base(job: Path) -> None:
    pissa = ("lora.init=pissa", "lora.dropout=0")
    directory, _ = train(job, *pissa)
    settings = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    assert settings["init_lora_weights"] is True and settings["r"] == 8
    first = adapter_hash(directory)
    (directory / "adapter").rename(job.parent / "gone")
    shutil.rmtree(directory / "checkpoints" / "step-00000012")
    _, said = train(job, *pissa)  # the same first A and B are made again
    assert "going on after step 9" in said
    assert adapter_hash(directory) == first


@pytest.mark.parametrize(
    ("overrides", "code", "texts"),
    [
        (["data=nothing.jsonl"], 3, ["nothing.jsonl"]),
        (["lora.target_modules=c_attn,w1"], 2, ["c_attn", "w1", "q_proj", "down_proj"]),
        (["lora.init=pisa"], 2, ['lora.init: "pisa" is unknown', "Offered: default, gaussian"]),
        (["train.max_length=20"], 3, ["max_length is 20", "Training has not started"]),
        (["dtype=float16"], 2, ["float16"]),
        (["model=no/such/folder"], 2, ["no/such/folder"]),
        (["train.batchsize=3"], 2, ['unknown key "train.batchsize". Did you mean "train.batch_']),
    ],
)
def test_bad_input_stops_before_anything_is_written(
    job: Path, overrides: list[str], code: int, texts: list[str]
) -> None:
    with pytest.raises(MynaError) as caught:
        train(job, *overrides)
    assert caught.value.exit_code == code
    for text in texts:
        assert text in str(caught.value)
    assert not (job.parent / "runs" / "job" / "config.yaml").exists()


def test_an_error_is_one_message_and_an_exit_code(job: Path) -> None:
    done = myna("train", "job.yaml", "data=nothing.jsonl", folder=job.parent)
    assert done.returncode == 3
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert "nothing.jsonl" in done.stderr


def start_machines(job: Path, *arguments: str, outputs: tuple[str, str]) -> list[str]:
    """Two machines of one process each, every one with its own disk; what they wrote to stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "myna.cli.main", "train", "job.yaml", *arguments, output],
            cwd=job.parent,
            env=ENVIRONMENT
            | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, output in enumerate(f"output={name}" for name in outputs)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert "parameters trained" in results[0][0] or processes[0].returncode
    assert results[1][0] == ""  # one process speaks
    return [errors for _, errors in results]


def test_two_machines_compute_what_one_does_and_save_on_each_node(job: Path) -> None:
    arguments = ("lora.dropout=0", "held_out=4", "train.save_on_each_node=true")
    alone, _ = train(job, *arguments, "output=alone")
    start_machines(job, *arguments, outputs=("first", "second"))
    folder = job.parent
    for name in ("first", "second"):
        assert losses(folder / name, "step", "eval") == pytest.approx(
            losses(alone, "step", "eval"), rel=1e-5
        )
        one = load_file(alone / "adapter" / "adapter_model.safetensors")
        two = load_file(folder / name / "adapter" / "adapter_model.safetensors")
        for tensor in one:
            torch.testing.assert_close(two[tensor], one[tensor], rtol=1e-3, atol=1e-6)
    assert adapter_hash(folder / "first") == adapter_hash(folder / "second")


def test_without_save_on_each_node_the_first_machine_writes_and_a_lone_checkpoint_is_an_error(
    job: Path,
) -> None:
    folder = job.parent
    start_machines(job, outputs=("first", "second"))
    assert (folder / "first" / "adapter").is_dir()
    assert not (folder / "second").exists()
    (folder / "first" / "adapter").rename(folder / "gone")
    for errors in start_machines(job, outputs=("first", "second")):
        assert "the machines of this run have different checkpoints" in errors


def test_plans_made_on_the_way_are_in_plan_json_and_replayed(job: Path) -> None:
    """The second of them belongs to a step that is repeated after the resumption."""
    arguments = ("lora.dropout=0.3", "train.save_steps=5")
    directory, _ = train(job, "output=plain", *arguments)
    path = job.parent / "runs" / "job" / "plan.json"
    plan = json.loads((directory / "plan.json").read_text())

    def later(step: int, layers: int) -> dict[str, object]:
        return {**plan["memory"], "step": step, "layers_recomputed": layers}

    # As a run leaves it that was killed before its first checkpoint.
    shutil.copytree(directory, path.parent)
    shutil.rmtree(path.parent / "adapter")
    shutil.rmtree(path.parent / "checkpoints")
    path.write_text(json.dumps({**plan, "replans": [later(3, 1), later(7, 2)]}))
    resumed, said = train(job, *arguments)
    assert "memory: steps in up to 2 packs of at most" in said
    # Layers that recompute change no bit, so that a resumed run is known to have replayed them by
    # what its checkpoints keep.
    assert adapter_hash(resumed) == adapter_hash(directory)
    state = json.loads((resumed / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert [(p["step"], p["layers_recomputed"]) for p in state["plans"]] == [(1, 0), (3, 1), (7, 2)]
    assert json.loads(path.read_text())["replans"] == [later(3, 1), later(7, 2)]


def test_more_layers_to_recompute_than_the_model_has(job: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.checkpointing is 3, but the model has 2 layers"):
        train(job, "train.checkpointing=3")
    _, said = train(job, "gradient_checkpointing=true", "train.max_steps=1", "output=all")
    assert "all 2 layers recomputed; peak" in said


def test_what_is_allowed_to_change_is_changed_and_told(job: Path) -> None:
    directory, _ = train(job, "train.max_steps=6")
    before = adapter_hash(directory)
    with pytest.raises(ConfigError) as caught:
        train(job, "train.max_steps=12")
    assert "train.max_steps is 12 now and was 6" in str(caught.value)
    assert "another learning rate at every step that is left" in str(caught.value)
    for text in ("--allow-change KEY", "--fresh", "--output"):
        assert text in str(caught.value)
    with pytest.raises(ConfigError, match=r"Did you mean train\.max_steps"):
        train(job, "train.max_steps=12", allow=("max_steps",))
    _, said = train(job, "train.max_steps=12", allow=("train.max_steps",))
    assert "going on after step 6" in said and "12 steps of 4 rows" in said
    assert "changed by --allow-change: train.max_steps is 12 now and was 6" in said
    assert adapter_hash(directory) != before
    _, said = train(job, "train.max_steps=12")  # it is the run's own now
    assert "is finished; nothing was changed" in said


def test_a_damaged_checkpoint_is_told_with_what_is_used_and_what_is_lost(job: Path) -> None:
    directory, _ = train(job)
    whole = adapter_hash(directory)
    shutil.rmtree(directory / "adapter")  # as if killed after the last checkpoint
    damaged = directory / "checkpoints" / "step-00000012"
    content = bytearray((damaged / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "optimizer.safetensors").write_bytes(content)
    _, said = train(job)
    assert (
        "warning: checkpoint step-00000012 is damaged (optimizer.safetensors does not have the "
        "bytes that were written); renamed to step-00000012.corrupt. The run goes on from "
        "step-00000009; 3 steps are lost and computed again"
    ) in " ".join(said.split())
    assert "going on after step 9" in said
    assert (damaged.with_name("step-00000012.corrupt")).is_dir()
    assert adapter_hash(directory) == whole


def test_a_run_that_is_changed_and_killed_is_not_taken_for_finished(job: Path) -> None:
    directory, _ = train(job, "train.epochs=20", "train.max_steps=3")
    longer = ("train.epochs=20", "train.max_steps=80")
    process, events = begun(job, *longer, "--allow-change", "train.max_steps", steps=3 + 3)
    process.kill()
    process.communicate()
    assert not (directory / "adapter").exists()
    assert (directory / "adapter-before-change" / "adapter_model.safetensors").is_file()
    _, said = train(job, *longer)
    assert "going on after step" in said
    steps = [e["step"] for e in read_events(events) if e["event"] == "step"]
    assert steps == list(range(1, 81))
    assert not (directory / "adapter-before-change").exists()


def test_another_base_of_the_same_shape_is_noticed_on_resume(job: Path, tiny_model: Path) -> None:
    base = job.parent / "base"
    shutil.copytree(tiny_model, base)
    directory, _ = train(job, f"model={base}", "train.max_steps=1")
    (directory / "adapter").rename(job.parent / "gone")
    weights = load_file(base / "model.safetensors")
    save_file(
        {n: t * 1.01 for n, t in weights.items()}, base / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ConfigError, match=r"with other base:\n  base is sampled:\w+… now and was "):
        train(job, f"model={base}", "train.max_steps=1")
    # Nor does the adapter speak on it.
    (job.parent / "gone").rename(directory / "adapter")
    with pytest.raises(ConfigError, match="trained with the base sampled:"):
        open_speaker(str(directory), device="cpu", dtype="float32")
    speaker = open_speaker(str(directory), device="cpu", dtype="float32", force_base=True)
    assert [note for note in speaker.notes if note.startswith("forced by --force-base: trained")]
    # And training on from it leaves a mark.
    more = (f"model={base}", "lora.start_from=runs/job", "output=b", "train.max_steps=1")
    with pytest.raises(ConfigError, match="does not belong here"):
        train(job, *more)
    second, _ = train(job, *more, force_base=True)
    mark = json.loads((second / "adapter" / "myna.json").read_text())
    first = json.loads((directory / "adapter" / "myna.json").read_text())
    assert mark["forced_from"] == first["base_fingerprint"] != mark["base_fingerprint"]


def test_a_dry_run_does_everything_but_write(job: Path) -> None:
    before = sorted(job.parent.rglob("*"))
    done = myna("train", "job.yaml", "--dry-run", folder=job.parent)
    assert done.returncode == 0, done.stderr
    assert "memory: steps in" in done.stdout and "expected of" in done.stdout
    assert "dry run: it ends before step 1, and nothing was written" in done.stdout
    assert sorted(job.parent.rglob("*")) == before


def test_a_finished_run_says_so_without_touching_anything_or_loading_torch(job: Path) -> None:
    directory, _ = train(job, "train.max_steps=1")

    def look() -> list[tuple[Path, int, int]]:
        return sorted((p, p.stat().st_mtime_ns, p.stat().st_size) for p in directory.rglob("*"))

    before = look()
    code = (
        "import sys; sys.argv = ['myna', 'train', 'job.yaml', 'train.max_steps=1']\n"
        "from myna.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=job.parent,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "runs/job is finished; nothing was changed." in done.stdout
    assert look() == before
    data = job.parent / "rows.jsonl"
    data.write_text(data.read_text().replace("It is 7!", "It is 8!"))
    done = myna("train", "job.yaml", "train.max_steps=1", folder=job.parent)
    assert done.returncode == 2 and "holds a run with other data:" in done.stderr


def test_two_signals_end_it_at_once_and_it_resumes_to_the_same_bytes(job: Path) -> None:
    whole, _ = train(job, "output=whole", "train.epochs=20")
    process, _ = begun(job, "train.epochs=20", steps=4)
    for number in (signal.SIGTERM, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.001)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "goes on from" in errors and "Traceback" not in errors
    resumed, _ = train(job, "train.epochs=20")
    assert adapter_hash(resumed) == adapter_hash(whole)


def test_somebody_is_told_of_the_end(job: Path) -> None:
    script = job.parent / "tell.py"
    script.write_text("import sys; open('told.jsonl', 'a').write(sys.stdin.read() + '\\n')")
    told = f"notify={sys.executable} tell.py"
    train(job, "train.max_steps=1", told)
    with pytest.raises(MynaError):
        train(job, "data=nothing.jsonl", "output=b", told)
    lines = [json.loads(line) for line in (job.parent / "told.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["finished", "failed"]
    assert "nothing.jsonl" in lines[1]["message"]


def test_a_place_that_cannot_be_written_is_found_before_anything_is_loaded(job: Path) -> None:
    (job.parent / "file").write_text("")
    with pytest.raises(ConfigError, match="the run cannot be kept there: "):
        train(job, "output=file/run", "model=no/such/model")


def test_skipped_rows_are_saved_with_the_run(job: Path) -> None:
    with open(job.parent / "rows.jsonl", "a") as file:
        file.write('\n{"instruction": "a", "output": NaN}\n{oops\n')
    entry = "data={path: rows.jsonl, rows: 30}"
    with pytest.raises(MynaError, match=r"rows\.jsonl line 25, column 32: NaN is not JSON"):
        train(job, entry)
    directory, text = train(job, entry, "train.on_bad_row=skip", "train.max_steps=1")
    assert "1 bad row skipped (json), the first: rows.jsonl line 26, column 2" in " ".join(
        text.split()
    )
    stored = json.loads((directory / "data.json").read_text())
    assert (stored["rows_in"], stored["trained"]) == (26, 24)
    assert stored["refused"] == {"not_a_number": 1, "json": 1}
    assert directory.name == "job"
    _, text = train(job, entry, "train.on_bad_row=skip", "train.max_steps=1")
    assert "is finished; nothing was changed" in " ".join(text.split())
