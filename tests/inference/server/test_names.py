"""What clients call a run, and that runs which are served together share their base."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from myna.errors import ConfigError
from myna.inference.server.names import MODEL_NAME, find_runs
from tiny_model import save_tiny_run


def test_a_run_is_called_as_its_directory(two_runs: list[Path], chatml: Path) -> None:
    huan, plain = two_runs
    runs = find_runs([str(huan), str(plain / "adapter")])
    assert runs.adapters == {"huan": huan / "adapter", "plain.v2": plain / "adapter"}
    assert runs.base == str(chatml)
    assert find_runs([str(chatml)]).adapters == {}


def test_names_that_cannot_be(two_runs: list[Path], tmp_path: Path) -> None:
    def refusal(*names: str) -> str:
        folders = []
        for number, name in enumerate(names):
            folder = tmp_path / str(number) / name
            shutil.copytree(two_runs[0], folder, dirs_exist_ok=True)
            folders.append(str(folder))
        with pytest.raises(ConfigError) as refused:
            find_runs(folders)
        return str(refused.value)

    assert '"a b" cannot be a model name; expected 1 to 64 letters' in refusal("a b")
    assert '"base" is the name of the base model without an adapter' in refusal("base")
    assert 'two runs are called "x": ' in refusal("x", "x")


@pytest.mark.parametrize(
    "name", ["..", ".a", "", "a/b", "a%2fb", "a" * 65, "ä", "a\0", "a\n", "-a"]
)
def test_the_pattern_of_names(name: str) -> None:
    assert MODEL_NAME.fullmatch(name) is None


def test_runs_of_two_bases_are_refused_with_both(
    two_runs: list[Path], chatml: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(chatml, tmp_path / "other"))
    run = save_tiny_run(other, tmp_path / "of_other")
    # The same weights under another name are the same base.
    assert find_runs([str(two_runs[0]), str(run)]).adapters.keys() == {"huan", "of_other"}
    weights = load_file(other / "model.safetensors")
    save_file(
        {name: tensor * 2 for name, tensor in weights.items()},
        other / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ConfigError) as refused:
        find_runs([str(two_runs[0]), str(run)])
    text = str(refused.value)
    assert text.startswith("one server has one base in memory, and these have several:\n")
    assert text.count("sampled:") == 2
    assert text.endswith("\n  Start one server for each base.")
