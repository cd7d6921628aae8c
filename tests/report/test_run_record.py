"""What a run left: read back as it was written, or an error that names the file."""

import json
from pathlib import Path

import pytest
from made_run import EVALUATION, START, step, write_events

from myna.errors import ConfigError, MynaError, StorageError
from myna.report.run_record import read_run
from myna.run_dir import RunDir


def test_what_is_there_is_read(run: RunDir) -> None:
    run.evaluation.write_text(json.dumps(EVALUATION))
    record = read_run(run)
    assert record.name == "parrot" and record.adapter is not None and record.adapter.rank == 4
    assert [each.step for each in record.steps] == [1, 2, 3, 4, 5, 6]
    assert record.best_held_out is not None and record.best_held_out.step == 3
    assert record.accounting is not None and record.accounting.refused == {"over_length": 2}
    assert record.evaluation is not None and record.evaluation.rows[2].base == "base says 3"
    assert record.setting("lora.rank") == 4 and record.setting("nothing") is None


def test_steps_that_were_repeated_count_once(run: RunDir) -> None:
    write_events(
        run.events,
        START,
        *map(step, (1, 2, 3, 4)),
        START,
        {"event": "resume", "step": 2},
        *map(step, (3, 4, 5)),
    )
    record = read_run(run)
    assert record.cost.steps == 5 and record.cost.seconds == 10.0
    assert len(record.starts) == 2


def test_a_process_that_ended_before_its_first_checkpoint_counts_no_more(run: RunDir) -> None:
    write_events(run.events, START, *map(step, (1, 2, 3)), START, *map(step, (1, 2)))
    assert [each.step for each in read_run(run).steps] == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data.json", "{", "data.json: cannot be read as JSON"),
        ("data.json", '{"rows_in": 3}', "data.json: trained is "),
        ("data.json", "[]", "data.json: its content is []"),
        ("plan.json", '{"device": 5}', "plan.json: device is 5"),
        ("sample.json", "[1]", "sample.json: is no sample of trained rows"),
        ("sample.json", "[{}]", "sample.json: is no sample of trained rows"),
        ("evaluation.json", "{}", "evaluation.json: rows_judged is {}"),
        (
            "events.jsonl",
            '{"event": "step", "time": 1, "step": 1, "epoch": "<b>"}\n',
            "events.jsonl: epoch is '<b>'",
        ),
        ("events.jsonl", '{"event": "start", "time": 1e99}\n', "events.jsonl: time is 1e+99"),
        ("config.yaml", "model: [\n", "config.yaml line 1: found 'model: ['; expected a name"),
        ("adapter/adapter_config.json", '{"r": "x"}', "adapter: r is 'x'"),
    ],
)
def test_a_damaged_file_is_named(run: RunDir, name: str, content: str, said: str) -> None:
    (run.path / name).write_text(content)
    with pytest.raises(MynaError) as caught:
        read_run(run)
    assert said in str(caught.value)
    assert isinstance(caught.value, ConfigError if name == "config.yaml" else StorageError)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run is in this folder"):
        read_run(RunDir(tmp_path))
