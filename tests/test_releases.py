"""What every release wrote is read by this version: runs go on, adapters answer.

The folders are made by `tools/keep_release.py`. Numbers are compared with a tolerance, for other
versions of torch may round otherwise.
"""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from myna.cli.generate import run as generate
from myna.cli.train import Options, run
from myna.config_file import load_config
from myna.training.events import read_events

RELEASES = Path(__file__).parent / "golden" / "releases"
VERSIONS = ("torch", "transformers", "peft")


@pytest.fixture(params=sorted(path.parent.name for path in RELEASES.glob("*/expected.json")))
def release(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of what a release wrote, as if it had been written here."""
    folder = tmp_path / "release"
    shutil.copytree(RELEASES / request.param, folder)
    shutil.copytree(RELEASES / "base", folder / "base")
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            path.write_bytes(path.read_bytes().replace(b"@HERE@", str(folder).encode()))
    monkeypatch.chdir(folder)
    return folder


def test_the_first_release_is_kept() -> None:
    assert (RELEASES / "0.1.0" / "expected.json").is_file()
    size = sum(path.stat().st_size for path in RELEASES.rglob("*") if path.is_file())
    assert size < 500_000 * len(list(RELEASES.glob("*/expected.json")))


def test_a_run_that_was_stopped_goes_on_to_the_same_end(release: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    (checkpoint,) = (release / "runs" / "job" / "checkpoints").glob("step-*")
    at = int(checkpoint.name.removeprefix("step-"))
    expected = json.loads((release / "expected.json").read_text())["losses"]
    assert 0 < at < len(expected)
    run(load_config(Path("job.yaml")), Options(allow_change=VERSIONS), console=console)
    assert f"going on after step {at}" in console.file.getvalue()  # type: ignore[attr-defined]
    events = read_events(release / "runs" / "job" / "events.jsonl")
    found = [event["loss"] for event in events if event["event"] == "step"]
    assert found[:at] == expected[:at]  # which the release wrote
    assert found[at:] == pytest.approx(expected[at:], rel=1e-3, abs=1e-5)
    one, two = (
        load_file(release / "runs" / name / "adapter" / "adapter_model.safetensors")
        for name in ("job", "finished")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() < 1e-2 * two[name].abs().max(), name


def test_its_adapter_gives_the_same_answers(release: Path) -> None:
    sampling = {"max_new_tokens": 64, "temperature": 0.0}
    generate(
        "runs/finished", Path("questions.jsonl"), Path("answers.jsonl"), system=None,
        batch_size=8, sampling=sampling, force_base=False, trust_remote_code=False,
    )  # fmt: skip
    lines = (release / "answers.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert answers == json.loads((release / "expected.json").read_text())["answers"]
    assert len(answers) == 3 and all(answers)
