"""`import myna`: the library in a few names, against the commands that do the same."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import myna
from myna.cli.train import run as train_command
from myna.config_file import load_config
from myna.errors import ConfigError, DataError
from myna.run_dir import RunDir
from myna.training.events import read_events
from tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lines = [{"prompt": f"What is {n}?", "completion": f"It is {n}!"} for n in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_importing_loads_nothing_and_knows_its_names() -> None:
    code = (
        "import sys, myna\nassert set(myna.__all__) <= set(dir(myna))\n"
        "print(sorted({'torch', 'numpy', 'rich', 'pydantic'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    for name in myna.__all__:
        assert getattr(myna, name).__doc__
    with pytest.raises(AttributeError, match="module 'myna' has no attribute 'trian'"):
        myna.trian  # noqa: B018  (the access is what is tested)


def test_a_call_trains_what_the_command_trains(
    rows: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "model": tiny_model,
        "data": "rows.jsonl",
        "dtype": "float32",
        "held_out": 3,
        "lora": {"rank": 4},
        "train": {"max_steps": 4, "batch_size": 4},
    }
    run = myna.train(settings, learning_rate=1e-3)
    said = capsys.readouterr().out
    assert "4 steps of 4 rows" in said and "\x1b" not in said and "step      4" in said
    assert run.path == rows.parent / "runs" / "rows" and run.adapter.is_dir()
    assert run.loss_plot.is_file() and run.config.train.learning_rate == 1e-3
    events = list(read_events(RunDir(run.path).events))
    assert run.losses == [event["loss"] for event in events if event["event"] == "step"]
    assert len(run.losses) == 4
    assert run.held_out_losses == [e["loss"] for e in events if e["event"] == "eval"] != []
    config = RunDir(run.path).config.read_text()
    assert "learning_rate: 0.001  # argument learning_rate" in config
    assert "rank: 4  # argument lora.rank" in config

    yaml = rows.parent / "rows.yaml"
    yaml.write_text(
        f"model: {tiny_model}\ndata: rows.jsonl\ndtype: float32\nheld_out: 3\nlora: {{rank: 4}}\n"
        "train: {max_steps: 4, batch_size: 4, learning_rate: 1e-3}\noutput: runs/other\n"
    )
    by_command = train_command(load_config(yaml)).directory
    weights = (run.adapter / "adapter_model.safetensors").read_bytes()
    assert (by_command.adapter / "adapter_model.safetensors").read_bytes() == weights

    # The same call again finds it finished; the YAML takes keywords too.
    capsys.readouterr()
    assert myna.train(settings, learning_rate=1e-3) == run
    assert "is finished; nothing was changed" in capsys.readouterr().out
    assert myna.train(yaml, output="runs/third", max_steps=1).losses == run.losses[:1]
    assert myna.train(settings, learning_rate=1e-3, fresh=True).path.name == "rows-2"

    speaker = myna.open_speaker(run)
    sampling = myna.Sampling(max_new_tokens=5, temperature=0)
    answer = speaker.ask("What is 1?", sampling)
    assert answer == myna.open_speaker(run.path).ask("What is 1?", sampling)
    assert len(answer.ids) <= 5
    talk = [myna.Message("user", "What is 1?"), myna.Message("assistant", "It is 1!")]
    assert speaker.ask([*talk, myna.Message("user", "What is 2?")], sampling).limit == 5
    with pytest.raises(DataError, match="im_end"):
        speaker.ask("stop <|im_end|>")

    # Judged as the command judges, on the three rows that were held out.
    found = myna.evaluate(run, metrics=["exact_match"])
    written = json.loads((run.path / "evaluation.json").read_text())
    assert found.to_json() == written and written["rows_judged"] == 3
    assert written["loss"]["adapter"] == pytest.approx(run.held_out_losses[-1], rel=1e-5)
    assert myna.evaluate(run.path, data=rows, limit=2).data == str(rows)
    assert "exact_match" in capsys.readouterr().out


def test_it_may_be_called_from_another_thread(rows: Path, tiny_model: Path) -> None:
    """As programs with a window or a server do; only the main thread may handle signals."""
    found: list[myna.Run | BaseException] = []

    def work() -> None:
        try:
            found.append(myna.train(model=tiny_model, data=rows, dtype="float32", max_steps=1))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found[0], myna.Run) and len(found[0].losses) == 1


def test_the_data_are_shown_and_counted(
    rows: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = myna.show_data(model=tiny_model, data="rows.jsonl", rows=2)
    assert counts.rows_in == counts.trained == 12
    shown = capsys.readouterr().out
    assert shown.count("⟦It is") == 2 and "rows in" in shown
    assert "What is 0?" in shown and "⟦It is 1!<|im_end|>" in shown


def test_a_wrong_name_is_told_with_the_nearest(rows: Path, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"argument train\.epoch: unknown key") as told:
        myna.train(model=tiny_model, data=rows, train={"epoch": 1})
    assert 'Did you mean "train.epochs"?' in str(told.value)
    with pytest.raises(ConfigError, match=r"argument lora\.rank: lora\.rank is 'x'; expected"):
        myna.show_data({"model": tiny_model, "data": rows}, lora={"rank": "x"})
    with pytest.raises(ConfigError, match='"data" is not set'):
        myna.train(model=tiny_model)
