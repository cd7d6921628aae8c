"""Exported files in llama.cpp itself: the same ids for the same text, the same greedy answers.

Needs llama-cpp-python, which is built from source and is no dependency; skipped without it.
"""

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import tiny_model
from myna.data.conversation import Message
from myna.demo.score import base_folder, load_held_out, load_persona_path
from myna.export.gguf import export_adapter, export_model
from myna.export.merge import merge
from myna.export.origin import open_origin
from myna.models.tokenizer import load_tokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDENS = ["mha_stable", "no_stable", "ntkmixed", "gqa_derived"]
AWKWARD = (
    "Hello, world! It's 2023.",
    "don't 'sup 'tis they'll I'VE",
    "  two  spaces  inside and around  ",
    "a  国  b  12  ,  ￥  x",
    "line\n\n one\ttab\r\nend \n  \n",
    "皇上万福金安！臣妾给皇上请安——……",
    "0123456789 3.14 1,000,000 a1b2",
    "café naïve é e\u0301 ½ ① ﬁ",
    "emoji 😀👨‍👩‍👧 and 𝒎𝒂𝒕𝒉",
    "def f(x):\n    return x  # ▁ 中文abc混排",
    "\u200b\u00a0 々〇 ￥5 $5 a+b=c ~^`|",
    "",
)


def open_gguf(path: Path, **options: Any) -> Any:
    # It keeps keys and values in float16 unless told otherwise.
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    return llama_cpp.Llama(
        str(path),
        n_ctx=256,
        logits_all=True,
        n_threads=1,
        verbose=False,
        seed=0,
        **exact,
        **options,
    )


def logits(model: Any, ids: list[int]) -> np.ndarray:
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logits(model, ids)[-1].argmax()))
    return ids


def export(source: Path, out: Path, kind: str = "f32") -> Any:
    export_model(open_origin(str(source), needs_adapter=False), out, kind)  # type: ignore[arg-type]
    return open_gguf(out)


@pytest.mark.parametrize("name", GOLDENS)
def test_bluelm_says_what_the_published_code_said(golden_base, tmp_path, name) -> None:
    model = export(golden_base(name), tmp_path / "out.gguf")
    expected = load_file(GOLDEN / name / "expected.safetensors")
    for row, wanted in zip(
        expected["generate.single.input_ids"].tolist(),
        expected["generate.single.sequences"].tolist(),
        strict=True,
    ):
        assert greedy(model, row, 16) == wanted
    ids = expected["single.input_ids"][0].tolist()
    difference = np.abs(logits(model, ids) - expected["single.logits"][0].numpy()).max()
    assert difference < 5e-5


def test_bluelm_with_its_own_tokenizer(golden_base, tmp_path) -> None:
    base = golden_base("hub_like")
    model = export(base, tmp_path / "out.gguf")
    for case in json.loads((base / "expected.json").read_text())["cases"]:
        ids = model.tokenize(case["prompt"].encode(), add_bos=True, special=True)
        assert ids == case["prompt_ids"], case["name"]
        assert greedy(model, ids, 16)[len(ids) :] == case["new_ids"], case["name"]
    origin = open_origin(str(base), needs_adapter=False)
    check_ids(model, origin)


def check_ids(model: Any, origin: Any) -> None:
    for text in AWKWARD:
        if origin.adapter is not None:  # Qwen's tokenizer composes accents, llama.cpp does not
            text = unicodedata.normalize("NFC", text)
        prompt = origin.encoder.prompt([Message("user", text)])
        begins = origin.begins_with_bos
        written = prompt.text
        if begins:
            written = written.removeprefix(str(origin.tokenizer.bos_token))
        ids = model.tokenize(written.encode(), add_bos=begins, special=True)
        assert tuple(ids) == prompt.ids, text


def test_the_embedded_model_answers_as_here(tmp_path) -> None:
    model = export(base_folder(), tmp_path / "demo.gguf")
    origin = open_origin(str(base_folder()), needs_adapter=False)
    check_ids(model, origin)
    rows = [json.loads(line) for line in load_persona_path().read_text().splitlines()[:300]]
    for row in rows:
        text = json.dumps(row, ensure_ascii=False)
        ours = origin.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=False, special=True) == ours
    reference = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32)
    for row in load_held_out()[:4]:
        ids = list(origin.encoder.prompt([Message("user", row.question)]).ids)
        batch = torch.tensor([ids])
        wanted = reference.generate(
            batch, attention_mask=torch.ones_like(batch), max_new_tokens=24, do_sample=False
        )[0].tolist()
        assert greedy(model, ids, len(wanted) - len(ids)) == wanted


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_families_in_every_number_format(make_base, make_adapter, tmp_path, family) -> None:
    changes: dict[str, Any] = {}
    if family == "llama":
        changes["rope_scaling"] = {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }  # fmt: skip
    if family == "mistral":
        changes["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    adapter = make_adapter(make_base(family, **changes))
    origin = open_origin(str(adapter), needs_adapter=True)
    texts = [torch.arange(3, 120).tolist()]
    merge(origin, tmp_path / "merged", texts)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        wanted = torch.log_softmax(reference(torch.tensor(texts)).logits[0].double(), -1)
    worst = {}
    for kind in ("f32", "f16", "bf16", "q8_0"):
        model = export(adapter, tmp_path / f"{kind}.gguf", kind)
        check_ids(model, origin)
        found = torch.log_softmax(torch.tensor(logits(model, texts[0])).double(), -1)
        worst[kind] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert worst["f32"] < 1e-10 and worst["f16"] < 3e-5, worst
    assert worst["bf16"] < 2e-3 and worst["q8_0"] < 2e-2, worst


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_adapter_on_a_file_of_its_base(make_base, make_adapter, tmp_path, family) -> None:
    base = make_base(family)
    settings = {"use_rslora": True, "alpha_pattern": {"o_proj": 3}, "rank_pattern": {"k_proj": 2}}
    adapter = make_adapter(base, **settings)
    export_model(open_origin(str(base), needs_adapter=False), tmp_path / "base.gguf", "f32")
    export_adapter(open_origin(str(adapter), needs_adapter=True), tmp_path / "lora.gguf", "f32")
    ids = torch.arange(3, 60).tolist()
    merged = logits(export(adapter, tmp_path / "merged.gguf"), ids)
    plain = logits(open_gguf(tmp_path / "base.gguf"), ids)
    with_adapter = open_gguf(tmp_path / "base.gguf", lora_path=str(tmp_path / "lora.gguf"))
    found = logits(with_adapter, ids)
    assert np.abs(plain - merged).max() > 0.3
    assert np.abs(found - merged).max() < 1e-4


WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES: dict[str, list[Any]] = {
    "gpt-2": [WORDS],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES],
    "qwen2": [pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"), BYTES],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), WORDS],
}


def texts() -> list[str]:
    rows = [json.loads(line) for line in load_persona_path().read_text().splitlines()]
    return [*AWKWARD, *(json.dumps(row, ensure_ascii=False, indent=2) for row in rows[:300])]


@pytest.mark.parametrize("name", RULES)
def test_every_rule_for_words_gives_the_same_ids(make_base, tmp_path, name) -> None:
    """With merges learned under the rule, so that a word cut elsewhere is seen."""
    backend = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(RULES[name])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*texts(), *AWKWARD * 20], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = tiny_model.CHATML
    base = make_base(tokenizer=tokenizer)
    origin = open_origin(str(base), needs_adapter=False)
    export_model(origin, tmp_path / "out.gguf", "f16")
    model = llama_cpp.Llama(str(tmp_path / "out.gguf"), vocab_only=True, verbose=False)
    assert model.metadata["tokenizer.ggml.pre"] == name
    for text in texts():
        ours = origin.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=False, special=True) == ours, text
    check_ids(model, origin)


@pytest.mark.parametrize("scheme", ["always", "never", "first"])
def test_sentencepiece_with_spaces_put_in_front_differently(make_base, tmp_path, scheme) -> None:
    state = json.loads(
        load_tokenizer(str(GOLDEN / "hub_like")).tokenizer.backend_tokenizer.to_str()
    )
    state["normalizer"] = None
    backend = Tokenizer.from_str(json.dumps(state))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>",
    )  # fmt: skip
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
        "[INST] {{ message.content }} [/INST]{% else %} {{ message.content }}{{ eos_token }}"
        "{% endif %}{% endfor %}"
    )
    base = make_base(tokenizer=tokenizer)
    origin = open_origin(str(base), needs_adapter=False)
    export_model(origin, tmp_path / "out.gguf", "f16")
    check_ids(llama_cpp.Llama(str(tmp_path / "out.gguf"), vocab_only=True, verbose=False), origin)
