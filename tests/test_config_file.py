"""Settings from YAML, overrides and flags: aliases, provenance, and the text of every error."""

from pathlib import Path
from typing import Any

import pytest

from myna.config import Config, DataEntry, flatten, is_free, leaves
from myna.config_file import ALIASES, load_config, stored_settings
from myna.errors import ConfigError


def write(folder: Path, text: str, name: str = "job.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write(tmp_path, "model: some/model\ndata: rows.json\n")


def error(path: Path | None, *overrides: str, **flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, flags)
    return str(caught.value)


def test_later_sources_win_and_each_value_says_where_it_came_from(tmp_path: Path) -> None:
    path = write(
        tmp_path, "model: m\ndata: d.json\ntrain:\n  seed: 1\n  epochs: 2\nheld_out: 0.1\n"
    )
    resolved = load_config(path, ["train.seed=0", "held_out=0"], {"model": "other", "data": None})
    assert resolved.config.train.seed == 0  # 0 is a value, not "unset"
    assert resolved.config.held_out == 0
    assert resolved.config.model == "other"
    assert resolved.config.train.epochs == 2
    assert resolved.sources["train.seed"] == "command line"
    assert resolved.sources["train.epochs"] == f"{path} line 5"
    assert resolved.sources["model"] == "command line (--model)"
    assert "train.batch_size" not in resolved.sources


def test_resolved_settings_are_yaml_that_reads_back_the_same(tmp_path: Path) -> None:
    path = write(
        tmp_path, 'model: m\ndata: [a.json, b.json]\nsystem: "甄嬛\\n\\n # 一"\nlr: 1e-5\n'
    )
    resolved = load_config(path)
    text = resolved.to_yaml()
    assert f"learning_rate: 1e-05  # {path} line 4 (lr)" in text
    assert "epochs: 3.0  # default" in text
    again = load_config(write(tmp_path, text, "config.yaml"))
    assert again.config == resolved.config
    assert load_config(tmp_path).config == resolved.config  # a run directory stands for its YAML


def test_exponent_without_a_point_is_a_number(job: Path) -> None:
    assert load_config(job, ["train.learning_rate=1e-4"]).config.train.learning_rate == 0.0001
    flat = write(job.parent, "model: m\ndata: d\nlearning_rate: 1e-4\n", "flat.yaml")
    assert load_config(flat).config.train.learning_rate == 0.0001


def test_the_tutorials_training_arguments_mean_what_they_mean_there(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
model_name_or_path: vivo-ai/BlueLM-7B-Chat
dataset: huanhuan.json
output_dir: output/BlueLM
per_device_train_batch_size: 8
gradient_accumulation_steps: 2
logging_steps: 10
num_train_epochs: 3
gradient_checkpointing: true
save_steps: 100
learning_rate: 1e-4
save_on_each_node: true
lora:
  r: 8
  lora_alpha: 32
  lora_dropout: 0.1
  target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
""",
    )
    config = load_config(path).config
    assert (config.train.batch_size, config.train.micro_batch_size) == (16, 8)
    assert config.train.checkpointing == "all"
    assert config.output == "output/BlueLM"
    assert (config.train.logging_steps, config.train.save_steps) == (10, 100)
    assert (config.train.epochs, config.train.learning_rate) == (3, 1e-4)
    assert config.train.save_on_each_node
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 32, 0.1)
    assert len(config.lora.target_modules) == 7


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_every_alias_leads_to_a_setting(alias: str) -> None:
    assert ALIASES[alias] in leaves()


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("lora_target=all", "lora.target_modules", "all-linear"),
        ("lora_target=q_proj,v_proj", "lora.target_modules", ["q_proj", "v_proj"]),
        ("lora.target_modules=.*\\.(q|v)_proj", "lora.target_modules", ".*\\.(q|v)_proj"),
        ("init_lora_weights=true", "lora.init", "default"),
        ("init_lora_weights=pissa_niter_16", "lora.init", "pissa_niter_16"),
        ("lr_scheduler_type=constant_with_warmup", "train.schedule", "constant"),
        ("bf16=true", "dtype", "bfloat16"),
        ("bf16=false", "dtype", "auto"),
        ("rank=4", "lora.rank", 4),
        ("val_size=0.1", "held_out", 0.1),
    ],
)
def test_other_tools_words(job: Path, override: str, name: str, value: object) -> None:
    assert flatten(load_config(job, [override]).config)[name] == value


def test_the_command_line_goes_with_the_accumulation_of_the_file(tmp_path: Path) -> None:
    text = "model: m\ndata: d\nper_device_train_batch_size: 8\ngradient_accumulation_steps: 2\n"
    path = write(tmp_path, text)

    def sizes(*overrides: str) -> tuple[int, int | None]:
        train = load_config(path, overrides).config.train
        return train.batch_size, train.micro_batch_size

    assert sizes() == (16, 8)
    assert sizes("per_device_train_batch_size=4") == (8, 4)
    assert sizes("gradient_accumulation_steps=3") == (24, 8)
    assert sizes("batch_size=5") == (5, 8)
    assert "batch_size contradicts gradient_accumulation_steps" in error(
        path, "batch_size=5", "gradient_accumulation_steps=1"
    )


def test_the_command_line_wins_over_another_word_for_the_same_thing_in_the_file(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, "model: m\ndata: d\ngradient_checkpointing: true\nbf16: true\n")
    config = load_config(path, ["train.checkpointing=none", "dtype=float32"]).config
    assert (config.train.checkpointing, config.dtype) == ("none", "float32")
    assert load_config(path, ["gradient_checkpointing=false"]).config.train.checkpointing == "none"


def test_every_setting_has_its_help() -> None:
    for name, field in leaves().items():
        assert field.description, name
    assert {name for name, field in leaves().items() if is_free(field)} == {
        "train.logging_steps",
        "train.save_steps",
        "train.keep_checkpoints",
        "train.save_on_each_node",
        "notify",
        "report_to",
    }


def test_relative_paths_are_found_beside_the_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write(tmp_path, "model: vivo-ai/BlueLM-7B-Chat\ndata: rows.json\n")
    (tmp_path / "rows.json").write_text("[]")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(job).config
    assert config.data == [str(tmp_path / "rows.json")]
    assert config.model == "vivo-ai/BlueLM-7B-Chat"


def test_unknown_keys_name_file_line_and_nearest_key(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\ndata: d\nlora:\n  rnak: 8\n")
    assert error(path) == (
        f'{path} line 4: unknown key "lora.rnak". Did you mean "lora.rank"?\n'
        "  Known keys: lora.rank, lora.alpha, lora.dropout, lora.target_modules, "
        "lora.use_rslora, lora.use_dora, lora.init, lora.start_from."
    )
    text = error(tmp_path / "job.yaml", "learnin_rate=1")  # the YAML's own fault comes first
    assert "lora.rnak" in text
    clean = write(tmp_path, "model: m\ndata: d\n", "clean.yaml")
    assert 'unknown key "learnin_rate". Did you mean "train.learning_rate"?' in error(
        clean, "learnin_rate=1"
    )
    assert 'unknown key "gradient_acumulation_steps". Did you mean "gradient_accumulation' in error(
        clean, "gradient_acumulation_steps=1"
    )
    assert 'unknown key "train.rank". Did you mean' in error(clean, "train.rank=8")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.learning_rate=-1", "train.learning_rate is -1; expected to be greater than 0."),
        ("train.epochs=zero", "train.epochs is 'zero'; expected to be a valid number"),
        ("lora.dropout=1", "lora.dropout is 1; expected to be less than 1."),
        ("train.schedule=linaer", "expected to be 'linear', 'cosine' or 'constant'."),
        ("held_out=1.5", "held_out is 1.5; expected a share below 1 or a whole number of rows"),
        ("keep_best=true", "train.keep_best needs held-out rows and held_out is 0; set held_out"),
        ("metrics=json", "train.metrics needs held-out rows and held_out is 0; set held_out"),
        (
            "best_by=chrf",
            "train.best_by is 'chrf'; expected loss or one of train.metrics (none is set)",
        ),
        ("gradient_accumulation_steps=2", "batch_size is the number of rows per optimizer step."),
        ("per_device_train_batch_size=x", "is 'x'; expected a whole number from 1."),
        ("gradient_checkpointing=3", "gradient_checkpointing is 3; expected true or false."),
        (
            "train.checkpointing=true",
            "train.checkpointing is True; expected to be auto, none, all or a number of layers "
            "from 1.",
        ),
        ("train.seed", "expected key=value, for example train.learning_rate=1e-4."),
    ],
)
def test_impossible_values(job: Path, override: str, text: str) -> None:
    assert text in error(job, override)


def test_files_of_metrics_are_beside_the_yaml(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("")
    path = tmp_path / "job.yaml"
    path.write_text(
        "model: m\ndata: d.jsonl\nheld_out: 0.1\n"
        "train: {metrics: [json, judge.py:score, 'regex:a.py:b'], best_by: judge.py:score}\n"
    )
    train = load_config(path).config.train
    judge = f"{tmp_path / 'judge.py'}:score"
    assert train.metrics == ["json", judge, "regex:a.py:b"] and train.best_by == judge
    assert load_config(path, ["metrics=json", "best_by=json"]).config.train.metrics == ["json"]


def test_faults_of_the_file_itself(tmp_path: Path) -> None:
    assert "not YAML" in error(write(tmp_path, "model: [m\n")) and "line 2" in error(
        tmp_path / "job.yaml"
    )
    twice = write(tmp_path, "model: m\ndata: d\nmodel: n\n")
    assert error(twice) == f'{twice} line 3: "model" is set a second time (first: {twice} line 1).'
    alias = write(tmp_path, "model: m\ndata: d\nseed: 1\ntrain: {seed: 2}\n")
    assert "sets train.seed a second time" in error(alias)
    assert "found a list, expected `key: value` lines" in error(write(tmp_path, "- a\n"))
    assert f'{write(tmp_path, "data: d")}: "model" is not set.' in error(tmp_path / "job.yaml")
    assert 'command line: "data" is not set' in error(None, model="m")
    missing = error(tmp_path / "jbo.yaml")
    assert "no such file" in missing and f'Did you mean "{tmp_path / "job.yaml"}"?' in missing
    (tmp_path / "empty").mkdir()
    assert "is a folder without config.yaml, so it is not a run of myna" in error(
        tmp_path / "empty"
    )


def test_settings_cannot_be_changed() -> None:
    config = Config(model="m", data=["d"])
    with pytest.raises(ValueError, match="frozen"):
        config.model = "n"  # type: ignore[misc]


def test_micro_batch_size_is_ours_alone_and_axolotls_with_accumulation(job: Path) -> None:
    ours = load_config(job, ["micro_batch_size=4", "batch_size=32"]).config.train
    assert (ours.micro_batch_size, ours.batch_size) == (4, 32)
    axolotl = load_config(job, ["micro_batch_size=4", "gradient_accumulation_steps=3"]).config.train
    assert (axolotl.micro_batch_size, axolotl.batch_size) == (4, 12)
    assert "batch_size contradicts per_device_train_batch_size" in error(
        job, "batch_size=8", "per_device_train_batch_size=4"
    )


def test_data_entries_may_be_mappings(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / name).write_text("x")
    path = write(
        tmp_path,
        "model: m\ndata:\n  - a.jsonl\n  - path: b.csv\n    weight: 2\n    columns: {prompt: q}\n",
    )
    resolved = load_config(path)
    assert resolved.config.data == [
        str(tmp_path / "a.jsonl"),
        DataEntry(path=str(tmp_path / "b.csv"), weight=2, columns={"prompt": "q"}),
    ]
    (tmp_path / "again.yaml").write_text(resolved.to_yaml())
    assert load_config(tmp_path / "again.yaml").config == resolved.config
    assert flatten(resolved.config)["data"][1] == {
        "path": str(tmp_path / "b.csv"),
        "weight": 2.0,
        "columns": {"prompt": "q"},
    }
    single = load_config(write(tmp_path, "model: m\ndata: {path: a.jsonl, rows: 5}\n")).config.data
    assert single == [DataEntry(path=str(tmp_path / "a.jsonl"), rows=5)]


@pytest.mark.parametrize(
    ("entry", "line", "expected"),
    [
        (
            "{path: a,\n     weigth: 2}",
            4,
            'unknown key "data[1].weigth". Did you mean "weight"?\n'
            "  Known keys: path, weight, columns, split, subset, rows.",
        ),
        ("{weight: 2}", 3, '"data[1].path" is not set.'),
        ("{path: a,\n     weight: 0}", 4, "data[1].weight is 0; expected to be greater than 0."),
        ("{path: a, weight: .inf}", 3, "data[1].weight is inf; expected to be a finite number."),
        ("{path: a, rows: all}", 3, "data[1].rows is 'all'; expected to be a valid integer"),
        ("{path: a,\n     path: b}", 4, '"path" is set a second time (first: '),
        ("7", 3, "data[1] is 7; expected a path, or a mapping with `path`."),
    ],
)
def test_faults_of_a_data_entry_name_its_line(
    tmp_path: Path, entry: str, line: int, expected: str
) -> None:
    path = write(tmp_path, f"data:\n  - a\n  - {entry}\nmodel: m\n")
    assert error(path).startswith(f"{path} line {line}: {expected}")


def test_patterns_and_registered_names_are_found_beside_the_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("x")
    (tmp_path / "data").mkdir()
    registry = tmp_path / "data" / "dataset_info.json"
    registry.write_text('{"identity": {}, "alpaca": {}}')
    path = write(tmp_path, "model: m\ndata: []\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    def data(text: str) -> list[Any]:
        path.write_text(f"model: m\ndataset: {text}\n")
        return load_config(path).config.data

    assert data("'*.jsonl'") == [f"{tmp_path}/*.jsonl"]
    assert data("'*.csv'") == ["*.csv"]
    assert data("identity") == [f"{registry}:identity"]
    assert data("identity, alpaca") == [f"{registry}:identity", f"{registry}:alpaca"]
    assert data("identity,unknown") == ["identity,unknown"]
    assert data("data/dataset_info.json:alpaca") == [f"{registry}:alpaca"]
    assert data("owner/name@main") == ["owner/name@main"]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("mask_history=true", "last"),
        ("mask_history=false", "assistant"),
        ("train_on_last=true", "last"),
        ("last_response_only=true", "last"),
        ("loss_scale=last_round", "last"),
        ("loss_scale=default", "assistant"),
        ("train_on=last", "last"),
        ("train_on_inputs=false", "assistant"),
        ("mask_prompt=true", "assistant"),
    ],
)
def test_other_tools_words_for_the_answers_that_are_trained(
    job: Path, override: str, value: str
) -> None:
    assert load_config(job, [override]).config.train.train_on == value


@pytest.mark.parametrize(
    "override",
    ["train_on_prompt=true", "train_on_inputs=true", "mask_prompt=false", "loss_scale=all"],
)
def test_training_on_prompts_is_refused_with_what_to_use_instead(job: Path, override: str) -> None:
    name, _, value = override.partition("=")
    assert error(job, override) == (
        f"command line: {name}: {value} would train the prompts too, and myna trains answers only."
        "\n  Leave it out. Rows to be trained whole can stand in a column `text`: plain text has "
        "no prompt."
    )


def test_faults_of_masking(job: Path) -> None:
    assert "mask_history is 'yes'; expected true or false." in error(job, "mask_history='yes'")
    assert "loss_scale is 'react'; expected default or last_round." in error(
        job, "loss_scale=react"
    )
    text = error(job, "mask_history=true", "loss_scale=default")
    assert text == (
        "command line: loss_scale contradicts train_on (command line (mask_history)). "
        "Keep one of them."
    )
    path = write(job.parent, "model: m\ndata: d\nmask_history: true\n", "last.yaml")
    assert load_config(path, ["train_on=assistant"]).config.train.train_on == "assistant"


def test_columns_of_the_data(tmp_path: Path) -> None:
    text = "model: m\ndata: d\ncolumns:\n  instruction: frage\n  response: antwort\n  role: wer\n"
    resolved = load_config(write(tmp_path, text))
    assert resolved.config.columns == {"prompt": "frage", "completion": "antwort", "role": "wer"}
    again = load_config(write(tmp_path, resolved.to_yaml(), "config.yaml"))
    assert again.config == resolved.config
    assert Config(model="m", data=["d"]).columns == {}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("{promt: frage}", "expected keys among prompt, input, completion, "),
        ("{promt: frage}", "found promt (did you mean prompt?)"),
        (
            "{frage: prompt}",
            "write it the other way round: what myna reads first, then the column, {prompt: frage}",
        ),
        ("{prompt: a, question: b}", "prompt and question mean the same; keep one"),
        ("{prompt: a, completion: a}", "the column a is named twice"),
        ("{prompt: 3}", "expected to be a valid string"),
        ("frage", "expected to be a valid dictionary"),
    ],
)
def test_faults_of_columns(tmp_path: Path, columns: str, expected: str) -> None:
    path = write(tmp_path, f"model: m\ndata: d\ncolumns: {columns}\n")
    found = error(path)
    assert found.startswith(f"{path} line 3: columns is ")
    assert expected in found


def test_a_template_is_a_name_or_a_path(tmp_path: Path) -> None:
    """A built-in template's name is left alone, even where a file is called so."""
    for name in ("chatml", "mine.jinja"):
        (tmp_path / name).write_text("x")
    for given, expected in (
        ("chatml", "chatml"),
        ("mine.jinja", str(tmp_path / "mine.jinja")),
        ("./chatml", str(tmp_path / "chatml")),
        ("none.jinja", "none.jinja"),
    ):
        path = write(tmp_path, f"model: m\ndata: d.json\ntemplate: {given}\n")
        assert load_config(path, [], {}).config.template == expected


def test_stored_settings_are_the_values_and_where_each_came_from(tmp_path: Path) -> None:
    path = write(tmp_path, 'model: m\ndata: d.json\nsystem: "a  # b\\n: 甄嬛"\nlora_r: 4\n')
    resolved = load_config(path, ["held_out=0.25"])
    found = stored_settings(write(tmp_path, resolved.to_yaml(), "config.yaml"))
    assert {setting.name: setting.value for setting in found} == flatten(resolved.config)
    sources = {setting.name: setting.source for setting in found}
    assert sources["system"] == f"{path} line 3"
    assert sources["lora.rank"] == f"{path} line 4 (lora_r)"
    assert sources["held_out"] == "command line" and sources["train.seed"] == "default"


def test_a_stored_setting_that_myna_did_not_write_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m  # default\n", "config.yaml")
    with pytest.raises(ConfigError) as caught:
        stored_settings(path)
    assert str(caught.value) == (
        f"{path} line 1: found 'model: m  # default'; expected a name, a JSON value and where it "
        "came from, as myna wrote them."
    )


@pytest.mark.parametrize(
    ("text", "trackers"),
    [
        ("tensorboard", ["tensorboard"]),
        ("[tensorboard]", ["tensorboard"]),
        ("none", []),
        ("null", []),
        ("[]", []),
    ],
)
def test_trackers_are_named_as_in_trainer(tmp_path: Path, text: str, trackers: list[str]) -> None:
    path = write(tmp_path, f"model: m\ndata: d\nreport_to: {text}\n")
    assert load_config(path).config.report_to == trackers


def test_a_tracker_that_there_is_not_is_refused(job: Path) -> None:
    assert error(job, "report_to=comet_ml") == (
        "command line: report_to is 'comet_ml'; expected to be 'tensorboard', 'wandb' or 'mlflow'."
    )
