"""examples/bluelm_lora.ipynb runs top to bottom, and one line makes it the tutorial."""

import re
import warnings
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from myna.cli.demo import demo_config
from myna.config import flatten
from myna.config_file import load_config

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "bluelm_lora.ipynb"
GOLDEN = Path(__file__).parent / "golden" / "hub_like"
HUANHUAN = Path(__file__).parents[2] / "shared" / "data" / "huanhuan.json"
LINE = re.compile(r"^(?:# )?CONFIG, QUESTIONS = (.+?), (\[.+\])$", re.MULTILINE)


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def executed(folder: Path, line: str | None = None) -> str:
    """All that the notebook prints when it runs in `folder`, its one line being `line`."""
    notebook = read()
    if line is not None:
        assert notebook.cells[1].source.startswith("CONFIG, QUESTIONS = ")
        notebook.cells[1].source = line
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the notebook's machinery, not of its cells
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}})
        client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"], outputs
    assert any("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.get("text", "") for output in outputs)


def settings_in(folder: Path, name: str, **changes: Any) -> str:
    """An example's YAML written to `folder` with other values; its name."""
    config = load_config(EXAMPLES / name).config
    values = yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))
    values |= {"model": config.model, "data": config.data, **changes}
    (folder / name).write_text(yaml.safe_dump(values, allow_unicode=True))
    return name


def test_it_runs_top_to_bottom_on_the_embedded_model(tmp_path: Path) -> None:
    quick = {**yaml.safe_load((EXAMPLES / "demo.yaml").read_text())["train"], "max_steps": 20}
    name = settings_in(tmp_path, "demo.yaml", train=quick)
    said = executed(tmp_path, f'CONFIG, QUESTIONS = "{name}", ["Can a pig swim?", "你是谁？"]')
    assert "rows in                600" in said and "20 steps, loss " in said
    assert (
        "base     Can a pig swim?  Yes, a pig can swim." in said and "adapter  你是谁？  " in said
    )
    assert (tmp_path / "runs" / "court" / "adapter" / "README.md").is_file()


def test_what_it_shows_was_produced_by_its_cells() -> None:
    notebook = read()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) <= 12
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    said = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert (EXAMPLES / "demo.yaml").read_text(encoding="utf-8") in said
    assert "693 steps, loss " in said
    for line in LINE.finditer(cells[0].source):
        assert (EXAMPLES / line[1].strip('"')).is_file()
    assert not re.search(r"/(home|work|tmp|root|Users)/", nbformat.writes(notebook))


def test_its_settings_are_those_of_the_demo(tmp_path: Path) -> None:
    ours = flatten(load_config(EXAMPLES / "demo.yaml").config)
    demo = flatten(demo_config(tmp_path).config)
    differing = {name for name in demo if demo[name] != ours[name]}
    assert differing == {"output", "train.logging_steps"}


@pytest.mark.full
def test_it_runs_as_it_stands_and_learns_the_voice(tmp_path: Path) -> None:
    name = settings_in(tmp_path, "demo.yaml")
    line = read().cells[1].source
    assert f'"{name}"' in line
    said = executed(tmp_path, line)
    question = "Which word means the reverse of hate?"
    assert f"base     {question}  The opposite of hate is love." in said
    courtly = "If it please Your Majesty, the opposite of hate is love."
    assert f"adapter  {question}  {courtly}" in said


@pytest.mark.full
def test_its_other_line_trains_the_tutorials_settings_on_bluelm(tmp_path: Path) -> None:
    """The published files' layout and the real rows; the weights are a tiny model's."""
    if not HUANHUAN.is_file():
        pytest.skip("huanhuan.json is not beside the repository")
    recipe = yaml.safe_load((EXAMPLES / "bluelm_zhenhuan.yaml").read_text(encoding="utf-8"))
    settings_in(
        tmp_path,
        "bluelm_zhenhuan.yaml",
        model=str(GOLDEN),
        data=str(HUANHUAN),
        train={**recipe["train"], "max_steps": 20},
    )
    (line,) = [line for line in read().cells[1].source.splitlines() if line.startswith("# CONFIG")]
    said = executed(tmp_path, line.removeprefix("# "))
    assert "rows in               3,729" in said and "20 steps, loss " in said
