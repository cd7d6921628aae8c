"""`--engine vllm`: what vLLM is told, and what is refused before it starts.

vLLM itself needs a GPU and is not run. What its template and end tokens do is tested through
transformers, by which vLLM renders and reads them.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from myna.data.conversation import Message
from myna.errors import ConfigError
from myna.inference.server.vllm import Launch, plan_vllm
from myna.inference.speaker import open_speaker

MakeRun = Callable[..., Path]
GOLDEN_BLUELM = Path(__file__).parents[2] / "golden" / "hub_like"
WITHOUT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name on the PATH, which writes down how it was started."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "seen = {'arguments': sys.argv[1:], 'environment': dict(os.environ), 'pid': os.getpid()}\n"
        "open(os.environ['SEEN'], 'w').write(json.dumps(seen))\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return program


def plan(base: Path, *runs: Path, **options: Any) -> Launch:
    adapters = {run.name: run / "adapter" for run in runs}
    wanted: dict[str, Any] = {"host": "127.0.0.1", "port": 8000, "api_key": None}
    return plan_vllm(str(base), adapters, **(wanted | options))


def option(launch: Launch, name: str) -> str:
    return launch.arguments[launch.arguments.index(name) + 1]


def edit_settings(run: Path, **changes: object) -> None:
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(base: Path, *runs: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(base, *runs)
    return str(caught.value)


def test_the_command_line_serves_base_and_adapters(
    vllm: Path, make_run: MakeRun, chatml: Path
) -> None:
    one, two = make_run(chatml, "one"), make_run(chatml, "two")
    launch = plan(chatml, one, two, host="127.0.0.1", port=8123)
    folder = Path(option(launch, "--generation-config"))
    assert list(launch.arguments) == [
        *(str(vllm), "serve", str(chatml), "--served-model-name", "base"),
        *("--host", "127.0.0.1", "--port", "8123"),
        *("--tokenizer", str(one / "adapter")),
        *("--chat-template", str(folder / "chat_template.jinja")),
        *("--chat-template-content-format", "string", "--generation-config", str(folder)),
        *("--allowed-origins", "[]", "--disable-fastapi-docs"),
        *("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-modules"),
        *(f"one={one / 'adapter'}", f"two={two / 'adapter'}"),
    ]
    assert launch.notes == ()


def test_a_base_alone_is_served_without_adapters(vllm: Path, chatml: Path) -> None:
    launch = plan(chatml)
    assert "--enable-lora" not in launch.arguments
    assert option(launch, "--tokenizer") == str(chatml)


def test_the_key_stands_in_the_environment_only(
    vllm: Path, chatml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setenv("MYNA_API_KEY", "s3cret")
    launch = plan(chatml, api_key="s3cret")
    assert "s3cret" not in " ".join(launch.arguments)
    assert launch.environment["VLLM_API_KEY"] == "s3cret"
    assert launch.environment["VLLM_NO_USAGE_STATS"] == "1"
    assert launch.environment["PATH"] == os.environ["PATH"]
    assert not {"VLLM_ALLOW_RUNTIME_LORA_UPDATING", "MYNA_API_KEY"} & launch.environment.keys()
    assert "under /v1 only" in launch.notes[-1]
    assert "VLLM_API_KEY" not in plan(chatml).environment


def test_vllm_takes_the_place_of_this_process(
    vllm: Path, make_run: MakeRun, chatml: Path, tmp_path: Path
) -> None:
    run = make_run(chatml)
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from myna.inference.server.vllm import plan_vllm\n"
        "plan_vllm(sys.argv[1], {'run': Path(sys.argv[2])}, host='127.0.0.1', port=8000, "
        "api_key='s3cret').run()"
    )
    seen = tmp_path / "seen.json"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(chatml), str(run / "adapter")],
        env=os.environ | {"SEEN": str(seen)},
    )
    assert process.wait(timeout=120) == 0
    started = json.loads(seen.read_text())
    assert started["pid"] == process.pid
    assert started["arguments"] == list(plan(chatml, run).arguments[1:])
    assert started["environment"]["VLLM_API_KEY"] == "s3cret"


CONVERSATIONS = [
    [("user", "你好")],
    [("system", "Be brief."), ("user", "Hello?")],
    [("user", "One"), ("assistant", "Two"), ("user", "Three")],
    [("system", "Be brief."), ("user", "One"), ("assistant", "Two"), ("user", "Three")],
]
PERSONAS = [None, 'A "bird" \\ in {% a %} {{ cage }} 笼\n中 🐦 ']


@pytest.mark.parametrize("template", [None, WITHOUT_SYSTEM], ids=["system role", "no system role"])
@pytest.mark.parametrize("persona", PERSONAS, ids=["no persona", "persona"])
def test_prompts_have_the_ids_of_training(
    vllm: Path,
    make_run: MakeRun,
    chatml: Path,
    tmp_path: Path,
    persona: str | None,
    template: str | None,
) -> None:
    base = shutil.copytree(chatml, tmp_path / "base")
    if template is not None:
        (base / "chat_template.jinja").write_text(template)
    run = make_run(base, system=persona)
    launch = plan(base, run)
    jinja = Path(option(launch, "--chat-template")).read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(option(launch, "--tokenizer"))
    encoder = open_speaker(str(run), device="cpu", dtype="float32").encoder
    for conversation in CONVERSATIONS:
        found = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in conversation],
            chat_template=jinja,
            add_generation_prompt=True,
            return_dict=False,
        )
        assert tuple(found) == encoder.prompt([Message(*turn) for turn in conversation]).ids
    assert ("persona of training" in "".join(launch.notes)) is (persona is not None)


def test_answers_end_where_training_ended_them(
    vllm: Path, make_run: MakeRun, chatml: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(chatml, tmp_path / "base")
    (base / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": 3}')
    launch = plan(base, make_run(base))
    settings = GenerationConfig.from_pretrained(option(launch, "--generation-config"))
    assert settings.eos_token_id == [2, 3]
    assert settings.temperature == 0.7


def test_the_rank_is_one_that_vllm_knows(vllm: Path, make_run: MakeRun, chatml: Path) -> None:
    run = make_run(chatml)
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = {
        name: torch.zeros(17, tensor.shape[1]) if "lora_A" in name else torch.zeros(len(tensor), 17)
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    edit_settings(run, r=17)
    assert option(plan(chatml, run), "--max-lora-rank") == "32"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "use_dora is true; vLLM knows no DoRA"),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save is ["lm_head"]; vLLM knows no modules'),
        ({"bias": "all"}, 'bias is "all"; vLLM knows no biases'),
        ({"rank_pattern": {"q_proj": 2}}, 'rank_pattern is {"q_proj": 2}; vLLM knows no layers'),
        ({"alpha_pattern": {"q_proj": 2}}, 'alpha_pattern is {"q_proj": 2}; vLLM knows no layers'),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is [3]; vLLM knows no rows"),
    ],
)
def test_what_vllm_does_not_know_is_refused(
    vllm: Path, make_run: MakeRun, chatml: Path, settings: dict[str, Any], reason: str
) -> None:
    run = make_run(chatml)
    edit_settings(run, **settings)
    text = refusal(chatml, run)
    assert text.startswith("--engine vllm: vLLM cannot serve this:\n  run (")
    assert reason in text
    assert "`myna merge RUN OUT`" in text


def test_all_reasons_of_all_adapters_are_listed(
    vllm: Path, make_run: MakeRun, chatml: Path
) -> None:
    head, wide = make_run(chatml, "head"), make_run(chatml, "wide")
    path = head / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path) | {
        "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32),
        "base_model.model.lm_head.lora_B.weight": torch.zeros(8, 4),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    path = wide / "adapter" / "adapter_model.safetensors"
    tensors = {
        name: torch.zeros(600, 32) if "lora_A" in name else torch.zeros(len(tensor), 600)
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    edit_settings(wide, r=600, use_dora=True)
    text = refusal(chatml, head, wide)
    assert "base_model.model.lm_head.lora_A.weight, base_model.model.lm_head.lora_B.weight" in text
    assert "not of the output head or the embedding" in text
    assert "rank 600; vLLM takes 512 at most" in text
    assert "wide (" in text
    assert "DoRA" in text


def test_a_path_that_vllm_would_cut_is_refused(
    vllm: Path, make_run: MakeRun, chatml: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "a=b,c"
    shutil.copytree(make_run(chatml) / "adapter", odd)
    with pytest.raises(ConfigError, match="takes no path with = or a comma"):
        plan_vllm(str(chatml), {"odd": odd}, host="127.0.0.1", port=8000, api_key=None)


def test_runs_of_two_personas_need_two_servers(vllm: Path, make_run: MakeRun, chatml: Path) -> None:
    one, two = make_run(chatml, "one", system="A lady."), make_run(chatml, "two", system="A bird.")
    assert refusal(chatml, one, two) == (
        "--engine vllm: one and two differ in their persona, and vLLM has one for all its models.\n"
        "  Start one vLLM for each, or leave --engine out."
    )


def test_an_adapter_of_another_base_is_refused(vllm: Path, make_run: MakeRun, chatml: Path) -> None:
    run = make_run(chatml)
    path = run / "adapter" / "myna.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_fingerprint": "other"}))
    assert "trained with the base other; here is " in refusal(chatml, run)
    launch = plan(chatml, run, force_base=True)
    assert launch.notes[0].startswith("forced by --force-base: trained with the base other")


def test_bluelm_has_to_be_merged_first(vllm: Path) -> None:
    text = refusal(GOLDEN_BLUELM)
    assert "vLLM has no BlueLM" in text
    assert "`myna merge RUN OUT`" in text


def test_a_missing_vllm_is_said_with_its_command(
    chatml: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    text = refusal(chatml)
    assert text.startswith("--engine vllm: vLLM is not installed here.")
    assert "`pip install vllm`" in text
