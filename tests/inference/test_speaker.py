"""What `SOURCE` may be, and that an adapter speaks with all that it was trained with."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from myna.data.conversation import Message
from myna.errors import ConfigError
from myna.inference.generate import Sampling
from myna.inference.speaker import Speaker, open_speaker

from .conftest import HUB_LIKE, MakeRun

QUESTION = [Message("user", "你好")]


def speaker_of(source: Path | str | None, **options: str) -> Speaker:
    text = None if source is None else str(source)
    return open_speaker(text, device="cpu", dtype="float32", **options)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_run_answers_with_its_adapter_as_peft_computes_it(
    make_run: MakeRun, chatml: Path
) -> None:
    run = make_run(chatml)
    speaker = speaker_of(run)
    assert speaker.adapter == run / "adapter"
    ids = torch.tensor([speaker.encoder.prompt(QUESTION).ids])
    base = AutoModelForCausalLM.from_pretrained(chatml, dtype=torch.float32)
    with torch.no_grad():
        of_base = base(ids).logits
        expected = PeftModel.from_pretrained(base, str(run / "adapter"))(ids).logits
        found = speaker.model(ids).logits
    torch.testing.assert_close(found, expected)
    assert (found - of_base).abs().max() > 0.1


def test_the_adapter_folder_itself_is_a_source(make_run: MakeRun, chatml: Path) -> None:
    run = make_run(chatml)
    assert speaker_of(run / "adapter").adapter == run / "adapter"


def test_the_newest_finished_run_is_the_default(
    make_run: MakeRun, chatml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = make_run(chatml, "older"), make_run(chatml, "newer")
    (older.parent / "unfinished" / "checkpoints").mkdir(parents=True)
    os.utime(older / "adapter", (1, 1))
    monkeypatch.chdir(older.parents[1])
    speaker = speaker_of(None)
    assert speaker.adapter is not None
    assert speaker.adapter.resolve() == newer / "adapter"


def test_without_any_run_there_is_no_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no finished run here"):
        speaker_of(None)


def test_a_model_folder_speaks_without_adapter_and_persona(bluelm: Speaker) -> None:
    assert bluelm.adapter is None
    assert bluelm.encoder.system is None
    assert bluelm.description == f"{HUB_LIKE} (BlueLM, 0.3 M parameters, float32 on cpu)"
    assert bluelm.context == 2048


def test_the_persona_of_the_training_is_applied_unless_another_is_given(
    make_run: MakeRun, chatml: Path
) -> None:
    run = make_run(chatml, system="你是甄嬛")
    assert "你是甄嬛" in speaker_of(run).encoder.prompt(QUESTION).text
    assert "你是皇帝" in speaker_of(run, system="你是皇帝").encoder.prompt(QUESTION).text
    without = speaker_of(run, system="").encoder.prompt(QUESTION).text
    assert without == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"


def test_tokenizer_template_and_stop_ids_are_those_saved_with_the_adapter(
    make_run: MakeRun, chatml: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(chatml, tmp_path / "base"))
    run = make_run(base)
    # The base's publisher changes his template and end ids afterwards.
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    edit_json(base / "tokenizer_config.json", eos_token="<|stop|>")
    edit_json(run / "adapter" / "myna.json", stop_ids=[2, 40])
    speaker = speaker_of(run)
    prompt = speaker.encoder.prompt(QUESTION)
    assert prompt.text == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    assert speaker.settings(Sampling()).eos_token_id == [2, 3, 40]


def test_a_template_switch_is_served_as_trained(make_run: MakeRun, chatml: Path) -> None:
    run = make_run(chatml)
    template = run / "adapter" / "chat_template.jinja"
    template.write_text(
        template.read_text() + "{% if not enable_thinking %}<think></think>{% endif %}"
    )
    edit_json(run / "adapter" / "myna.json", template_options={"enable_thinking": True})
    assert "<think>" not in speaker_of(run).encoder.prompt(QUESTION).text
    edit_json(run / "adapter" / "myna.json", template_options={"enable_thinking": False})
    assert speaker_of(run).encoder.prompt(QUESTION).text.endswith("<think></think>")


def test_an_adapter_made_with_peft_alone(chatml: Path, tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(chatml)
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        made = get_peft_model(base, settings)
    made.save_pretrained(str(tmp_path / "elsewhere"))
    speaker = speaker_of(tmp_path / "elsewhere")
    prompt = speaker.encoder.prompt(QUESTION)
    assert prompt.text == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([prompt.ids])
    with torch.no_grad():
        torch.testing.assert_close(speaker.model(ids).logits, made.eval()(ids).logits)
    assert speaker.settings(Sampling()).eos_token_id == [2, 3]


def refusal(source: Path | str) -> str:
    with pytest.raises(ConfigError) as refused:
        speaker_of(source)
    return str(refused.value)


def test_an_unfinished_run_says_how_to_finish_it(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "half"
    (run / "checkpoints" / "step-00000100").mkdir(parents=True)
    (run / "checkpoints" / "step-00000200").mkdir()
    assert refusal(run) == (
        f"{run}: this run is not finished: it was left after step-00000200 and has no adapter to "
        f"talk to.\n  Finish it with `myna train {run}`."
    )
    shutil.rmtree(run / "checkpoints")
    (run / "config.yaml").touch()
    assert "it has no checkpoint yet" in refusal(run)


def test_a_base_that_is_gone_is_named_with_the_mend(
    make_run: MakeRun, chatml: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(chatml, tmp_path / "base"))
    run = make_run(base)
    base.rename(tmp_path / "moved")
    text = refusal(run)
    config = run / "adapter" / "adapter_config.json"
    assert text.startswith(
        f"{run / 'adapter'}: the base model of this adapter was not found.\n"
        f"  model: there is no folder {base}"
    )
    assert text.endswith(
        f"\n  Put it back, or write where it is now into base_model_name_or_path in {config}."
    )
    # The mend mends.
    edit_json(config, base_model_name_or_path=str(tmp_path / "moved"))
    assert speaker_of(run).description.startswith(str(tmp_path / "moved"))
    edit_json(config, base_model_name_or_path=None)
    assert refusal(run) == (
        f"{config} names no base model.\n"
        f"  Write the folder or hub id of the base into base_model_name_or_path in {config}."
    )


def test_a_folder_that_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert refusal(tmp_path) == (
        f"{tmp_path} is neither a run (no adapter/), nor an adapter (no adapter_config.json), nor "
        "a model (no config.json). It holds: notes.txt.\n"
        "  Give one of these folders, or a hub id."
    )
    assert refusal(tmp_path / "notes.txt") == (
        f"{tmp_path / 'notes.txt'} is a file; expected a run directory, an adapter folder, a model "
        "folder or a hub id."
    )


def test_a_misspelt_run_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "huanhuan").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert refusal("runs/huanhaun") == (
        "runs/huanhaun: there is no such folder.\n  Did you mean runs/huanhuan?"
    )
    assert refusal("huanhuan") == (
        "huanhuan: there is no such folder here.\n  Did you mean runs/huanhuan?"
    )
