"""The model card: what hubs read of it, its numbers against the run's files, and its own code."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from myna.cli.train import run as train
from myna.config_file import load_config
from myna.data.conversation import Message
from myna.demo.score import base_folder, load_persona_path
from myna.errors import ConfigError
from myna.inference.generate import Sampling
from myna.inference.speaker import open_speaker
from myna.report.card import BEGIN, END, Base, known_base, model_card, with_own_words, write_card
from myna.run_dir import RunDir
from myna.training.events import read_events
from tiny_model import save_tiny_model

PERSONA = 'Answer like a bird.\nSay "tweet" | ```nothing``` else.'


def trained(folder: Path, **settings: Any) -> RunDir:
    path = folder / "job.yaml"
    path.write_text(
        yaml.safe_dump({"dtype": "float32", "output": str(folder / "bird"), **settings})
    )
    return train(load_config(path), console=Console(file=io.StringIO())).directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run on a tiny model: two of 24 rows are too long, six answers are held out."""
    folder = tmp_path_factory.mktemp("somebody")
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n * 7 % 10}!"} for n in range(24)]
    rows[3]["prompt"] = rows[7]["prompt"] = "long " * 60
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return trained(
        folder,
        model=str(save_tiny_model(folder / "tiny")),
        data="rows.jsonl",
        system=PERSONA,
        held_out=6,
        lora={"rank": 4, "dropout": 0.1},
        train={"epochs": 2, "batch_size": 4, "over_length": "drop", "learning_rate": 1e-3},
    )


@pytest.fixture
def run(made: RunDir, tmp_path: Path) -> RunDir:
    return RunDir(shutil.copytree(made.path, tmp_path / "bird"))


def card_of(run: RunDir) -> str:
    return (run.adapter / "README.md").read_text(encoding="utf-8")


def front(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_the_front_matter_is_what_hubs_read(run: RunDir) -> None:
    assert front(card_of(run)) == {
        "base_model": "tiny",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "myna"],
    }


def test_the_numbers_are_those_of_the_run(run: RunDir) -> None:
    cells = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", card_of(run), re.MULTILINE))
    events = list(read_events(run.events))
    steps = [event for event in events if event["event"] == "step"]
    held_out = [event["loss"] for event in events if event["event"] == "eval"]
    assert (cells["rows in"], cells["trained"], cells["truncated"]) == ("24", "22", "0")
    assert cells["refused"] == "2" and cells["answers held out"] == "6"
    (reason,) = [name for name in cells if name.startswith("refused: ")]
    assert cells[reason] == "2"
    stored = json.loads(run.data.read_text())
    assert cells["tokens"] == f"{stored['tokens']:,}"
    assert cells["trained tokens (of answers)"] == f"{stored['trained_tokens']:,}"
    assert cells["steps"] == "8 of 4 rows, 2.00 epochs"
    labelled = sum(step["trained_tokens"] for step in steps)
    mean = sum(step["loss"] * step["trained_tokens"] for step in steps) / labelled
    assert cells["loss of the last 8 steps"] == f"{mean:.4f}"
    assert cells["held-out loss at the end"] == f"{held_out[-1]:.4f}"
    assert cells["rank, alpha, dropout"] == "4, 8, 0.1"
    assert cells["learning rate, schedule"] == "0.001, cosine"
    assert cells["computed on"] == "cpu in float32"


def test_it_says_what_the_adapter_expects(run: RunDir) -> None:
    card = card_of(run)
    assert (
        "`chat_template.jinja`: the tokenizer's own. It" in card
        and "Answers end with `<|im_end|>`." in card
    )
    assert '> Answer like a bird.\n> Say "tweet" | ```nothing``` else.' in card
    assert "Licence: none was found with the base." in card


def test_no_path_of_this_machine_stands_in_it(run: RunDir, made: RunDir) -> None:
    card = card_of(run)
    for text in (str(made.path.parent), str(made.path.parent.parent), str(Path.home()) + "/"):
        assert text not in card
    assert "on `rows.jsonl`." in card and "a folder on the machine of the training" in card


@pytest.mark.parametrize("kind", ["llama", "BlueLM"])
def test_its_python_code_answers_as_myna_does(
    kind: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if kind == "llama":
        made: RunDir = request.getfixturevalue("made")
        base = made.path.parent / "tiny"
    else:
        base = base_folder()
        made = trained(
            tmp_path,
            model=str(base),
            data=str(load_persona_path()),
            system="Answer at court.",
            dtype="bfloat16",  # as its weights are stored, which the code takes
            train={"max_steps": 6, "batch_size": 8, "learning_rate": 2e-3},
        )
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / base.name).symlink_to(base)
    (place / "bird").symlink_to(made.adapter)
    monkeypatch.chdir(place)
    (code,) = re.findall(r"```python\n(.*?)^```", card_of(made), re.DOTALL | re.MULTILINE)
    assert ("register()" in code) == (kind == "BlueLM")
    capsys.readouterr()
    exec(compile(code, "card", "exec"), {})
    answer = capsys.readouterr().out
    speaker = open_speaker(
        str(made.path), device="cpu", dtype=json.loads(made.plan.read_text())["dtype"]
    )
    prompt = speaker.encoder.prompt([Message("user", "Hello!")]).ids
    greedy = Sampling(max_new_tokens=40, temperature=0)  # the tiny model's context is short
    ((_, expected),) = speaker.answer_all([prompt], greedy, batch_size=1)
    said = expected.text.strip().rstrip("\ufffd")
    assert said and answer.strip().startswith(said)


def test_what_eval_found_is_added(run: RunDir) -> None:
    assert "## Evaluation" not in card_of(run)
    run.evaluation.write_text(
        json.dumps(
            {
                "data": "held-out rows of the run",
                "rows_judged": 6,
                "loss": {"base": 5.5555, "adapter": 1.25},
                "perplexity": {"base": 258.6, "adapter": 3.49},
                "trained_tokens": 60,
                "metrics": {
                    "exact": {"base": 0.0, "adapter": 0.5},
                    "bleu": {"base": 1.5, "adapter": None},
                },
                "scale": {"exact": 1, "bleu": 100},
                "forgetting": {
                    "text": "/home/me/neutral.txt",
                    "tokens": 9,
                    "base": 2.0,
                    "adapter": 2.5,
                },
                "tasks": {"arc": {"acc": {"base": 0.25, "adapter": 0.5}}},
                "rows": [{"place": "rows.jsonl line 4", "question": "secret", "base": "no"}],
            }
        )
    )
    write_card(run)
    card = card_of(run)
    for line in (
        "`myna eval` on 6 rows.",
        "| loss | 5.556 | 1.25 |",
        "| exact (of 1) | 0 | 0.5 |",
        "| bleu (of 100) | 1.5 |  |",
        "| loss on neutral.txt | 2 | 2.5 |",
        "| arc: acc | 0.25 | 0.5 |",
    ):
        assert line in card, card
    assert "secret" not in card  # rows of the data are nobody else's
    found = json.loads(run.evaluation.read_text())
    nothing = {"loss": None, "perplexity": None, "metrics": {}, "forgetting": None, "tasks": {}}
    run.evaluation.write_text(json.dumps(found | nothing))
    write_card(run)
    assert "## Evaluation" not in card_of(run)


def test_what_a_person_wrote_stays(run: RunDir) -> None:
    first = card_of(run)
    path = run.adapter / "README.md"
    mine = first.replace("tags:\n", "license: mit\nlanguage: [en]\ntags:\n")
    mine = mine.replace(BEGIN, f"About birds.\n\n{BEGIN}") + "\nThanks to all birds.\n"
    path.write_text(mine.replace("## Settings", "## Einstellungen"))
    write_card(run)
    card = card_of(run)
    assert front(card) == {**front(first), "license": "mit", "language": ["en"]}
    assert card.count("About birds.") == card.count("Thanks to all birds.") == 1
    assert card.index("About birds.") < card.index(BEGIN) < card.index(END)
    assert card.index(END) < card.index("Thanks to all birds.")
    assert "Licence: mit." in card
    assert "## Settings" in card and "Einstellungen" not in card
    write_card(run)
    assert card_of(run) == card
    # Without the two lines the text is theirs; what hubs read still follows the run.
    path.write_text("---\nbase_model: other\n---\n# My bird\n")
    write_card(run)
    assert card_of(run).endswith("---\n# My bird\n") and front(card_of(run))["base_model"] == "tiny"


def test_front_matter_that_cannot_be_read_is_named(run: RunDir) -> None:
    for text, finding in (("a: [", "are no YAML"), ("- a", "are no `key: value` lines")):
        (run.adapter / "README.md").write_text(f"---\n{text}\n---\nbody\n")
        with pytest.raises(ConfigError, match="of the adapter: the lines between ---") as told:
            write_card(run)
        assert finding in str(told.value) and "Mend them, or delete the file" in str(told.value)


def test_a_card_of_no_run_is_refused(run: RunDir) -> None:
    (run.adapter / "myna.json").unlink()
    with pytest.raises(ConfigError, match=r"has no myna\.json, in which a run"):
        model_card(run, run.adapter, Base("tiny", False))


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "some-base"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    yield folder


def test_the_licence_is_the_bases_own_word(base: Path, run: RunDir) -> None:
    assert known_base(str(base)) == Base("some-base", False, "llama")
    (base / "config.json").write_text('{"model_type": "llama", "license": "mit"}')
    assert known_base(str(base)).licence == {"license": "mit"}
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: birds\nlicense_link: LICENSE\ntags: [x]\n---\n# Base\n"
    )
    licence = {"license": "other", "license_name": "birds", "license_link": "LICENSE"}
    assert known_base(str(base)).licence == licence
    card = model_card(run, run.adapter, known_base(str(base)))
    assert front(card).items() >= licence.items() and "Licence: birds." in card
    (base / "README.md").write_text("---\nlicense: [\n---\n")  # somebody else's mistake
    assert known_base(str(base)).licence == {"license": "mit"}


def test_a_hub_id_is_the_base_and_asks_nobody(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    base = known_base("owner/no-such-model-here")
    assert (base.name, base.is_hub_id, base.licence) == ("owner/no-such-model-here", True, {})
    card = model_card(run, run.adapter, base, repo="me/bird")
    assert front(card)["base_model"] == "owner/no-such-model-here"
    assert "hf download me/bird --local-dir bird\n" in card
    assert "vllm serve owner/no-such-model-here --enable-lora --max-lora-rank 8" in card
    assert "folder on the machine" not in card


def test_data_of_the_hub_are_named(run: RunDir) -> None:
    config = run.config.read_text()
    line = next(line for line in config.splitlines() if line.startswith("data:"))
    entries = ["owner/rows@v1", "/home/me/x/dataset_info.json:law", {"path": "/home/me/more.csv"}]
    run.config.write_text(config.replace(line, f"data: {json.dumps(entries)}"))
    card = model_card(run, run.adapter, Base("tiny", False))
    assert front(card)["datasets"] == ["owner/rows"]
    assert "on `owner/rows@v1`, `law`, `more.csv`." in card and "/home/me" not in card


def test_bluelm_and_dora_go_to_vllm_merged(run: RunDir) -> None:
    card = model_card(run, run.adapter, Base("owner/blue", True, "BlueLM"))
    assert "myna merge bird bird-merged\nvllm serve bird-merged" in card
    assert "register()" in card


def test_own_words_of_an_empty_card_are_none() -> None:
    assert with_own_words("---\na: 1\n---\nnew\n", "") == "---\na: 1\n---\nnew\n"
