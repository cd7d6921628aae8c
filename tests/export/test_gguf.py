"""The files read back with the gguf package, tensor by tensor, against peft's own merge."""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from myna.errors import ConfigError, NonFiniteError, StorageError
from myna.export.gguf import check_gguf, encode, export_adapter, export_model
from myna.export.origin import open_origin
from myna.models.load import load_model

GOLDENS = ["mha_stable", "no_stable", "ntkmixed", "gqa_derived"]
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}
"""Written down from llama.cpp's files, not taken from the table that the export uses."""


def their_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: transformers' row j of a head is 2j, its row j + half is 2j + 1."""
    size = weight.shape[0] // heads
    out = np.empty_like(weight)
    for head in range(heads):
        for j in range(size // 2):
            out[head * size + 2 * j] = weight[head * size + j]
            out[head * size + 2 * j + 1] = weight[head * size + size // 2 + j]
    return out


def peft_merged(source: Path) -> dict[str, torch.Tensor]:
    base = json.loads((source / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = load_model(base, dtype=torch.float64, device=torch.device("cpu")).model
    return PeftModel.from_pretrained(model, str(source)).double().merge_and_unload().state_dict()


def export(source: Path, out: Path, kind: str = "f32") -> gguf.GGUFReader:
    export_model(open_origin(str(source), needs_adapter=False), out, kind)  # type: ignore[arg-type]
    return gguf.GGUFReader(out)


def values(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors
    }


def field(reader: gguf.GGUFReader, name: str) -> object:
    found = reader.get_field(name)
    return None if found is None else found.contents()


def expected(wanted: dict[str, torch.Tensor], heads: tuple[int, int] | None) -> dict:
    found = {}
    for name, tensor in wanted.items():
        array = tensor.numpy()
        if heads is not None and ".q_proj." in name:
            array = interleaved(array, heads[0])
        if heads is not None and ".k_proj." in name:
            array = interleaved(array, heads[1])
        found[their_name(name)] = array
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_tensor_is_the_merged_one(make_base, make_adapter, tmp_path, family) -> None:
    changes = {"attention_bias": True} if family == "llama" else {}
    adapter = make_adapter(make_base(family, **changes))
    reader = export(adapter, tmp_path / "out.gguf")
    architecture = family if family.startswith("qwen") else "llama"
    assert field(reader, "general.architecture") == architecture
    wanted = expected(peft_merged(adapter), (4, 2) if architecture == "llama" else None)
    found = values(reader)
    assert found.keys() == wanted.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, wanted[name], atol=2e-6, rtol=2e-6, err_msg=name)
    about = {
        "context_length": 256, "embedding_length": 64, "block_count": 2, "vocab_size": 264,
        "feed_forward_length": 96, "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.key_length": 32 if family == "qwen3" else 16, "rope.freq_base": 10000.0,
    }  # fmt: skip
    for name, value in about.items():
        assert field(reader, f"{architecture}.{name}") == value, name
    assert field(reader, "general.file_type") == 0


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_number_formats_keep_to_their_error(make_base, make_adapter, tmp_path, kind) -> None:
    adapter = make_adapter(make_base())
    reader = export(adapter, tmp_path / "out.gguf", kind)
    wanted = expected(peft_merged(adapter), (4, 2))
    for tensor in reader.tensors:
        name = tensor.name
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        stored = "f32" if len(tensor.shape) == 1 else kind
        assert tensor.tensor_type.name == stored.upper(), name
        error = np.abs(found - wanted[name])
        if stored == "q8_0":
            blocks = wanted[name].reshape(-1, 32)
            # Half a step of the block's scale, which is itself rounded to float16.
            bound = np.abs(blocks).max(axis=1, keepdims=True) / 127 * (0.5 + 127 * 2**-11)
            assert (error.reshape(-1, 32) <= bound + 1e-6).all(), name
        else:
            digits = {"f32": 2**-22, "f16": 2**-11, "bf16": 2**-8}[stored]
            assert (error <= np.abs(wanted[name]) * digits + 2e-6).all(), name
    number = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[kind]  # llama.cpp's own
    assert field(reader, "general.file_type") == number


@pytest.mark.parametrize("name", GOLDENS)
def test_bluelm_with_its_norm_folded(golden_base, tmp_path, name) -> None:
    base = golden_base(name)
    reader = export(base, tmp_path / "out.gguf")
    model = load_model(str(base), dtype=torch.float64, device=torch.device("cpu")).model
    state = model.state_dict()
    table = model.model.embed_ids(torch.arange(328)[None])[0].detach()
    state = {key: value for key, value in state.items() if "embed_layer_norm" not in key}
    state["model.embed_tokens.weight"] = table
    heads = (model.config.num_attention_heads, model.config.num_key_value_heads)
    wanted = expected(state, heads)
    found = values(reader)
    assert field(reader, "general.architecture") == "llama"
    divisors = found.pop("rope_freqs.weight", None)
    assert found.keys() == wanted.keys()
    for key, array in found.items():
        np.testing.assert_allclose(array, wanted[key], atol=2e-5, rtol=2e-5, err_msg=key)
    if name == "ntkmixed":
        published = load_file(base / "expected.safetensors")
        angles = 10000.0 ** (-np.arange(0, 32, 2) / 32) / divisors
        for position in (1, 1023):
            for name, function in (("cos", np.cos), ("sin", np.sin)):
                wanted_table = published[f"rope.{name}_{position}"].numpy().flatten()
                np.testing.assert_allclose(function(position * angles), wanted_table, atol=2e-4)
        assert field(reader, "llama.context_length") == 64 * 16
    else:
        assert divisors is None


def test_rope_of_llama_3(make_base, tmp_path) -> None:
    base = make_base(rope_scaling=LLAMA3_SCALING)
    found = values(export(base, tmp_path / "out.gguf"))["rope_freqs.weight"]
    config = load_model(str(base), dtype=torch.float32, device=torch.device("cpu")).model.config
    scaled = LlamaRotaryEmbedding(config).inv_freq.numpy()
    plain = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / found, scaled, rtol=1e-6)
    assert found[0] == pytest.approx(1.0) and found[-1] == pytest.approx(8.0)


def test_rope_stretched_evenly(make_base, tmp_path) -> None:
    base = make_base(rope_scaling={"rope_type": "linear", "factor": 4.0})
    reader = export(base, tmp_path / "out.gguf")
    assert field(reader, "llama.rope.scaling.type") == "linear"
    assert field(reader, "llama.rope.scaling.factor") == 4.0
    base = make_base(rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    with pytest.raises(ConfigError) as caught:
        export(base, tmp_path / "other.gguf")
    assert str(caught.value) == (
        "This model cannot be written as GGUF: its rope scaling is 'dynamic'; default, linear and "
        "llama3 can be written.\n  `myna merge` writes a folder that transformers and vLLM load."
    )


def test_a_sliding_window_ends_the_context(make_base, tmp_path) -> None:
    said: list[str] = []
    base = make_base("mistral", sliding_window=100)
    origin = open_origin(str(base), needs_adapter=False)
    export_model(origin, tmp_path / "out.gguf", "f16", say=said.append)
    assert field(gguf.GGUFReader(tmp_path / "out.gguf"), "llama.context_length") == 100
    assert said[0] == (
        "the context is 100 tokens, not 256: beyond it this model sees a sliding window, which "
        "llama.cpp does not compute for it"
    )


def test_special_tokens_template_and_tied_heads(make_base, tmp_path) -> None:
    base = make_base(tie_word_embeddings=True)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    reader = export(base, tmp_path / "out.gguf")
    assert "output.weight" not in values(reader)
    ids = {"eos": 2, "eot": 1, "padding": 0, "bos": None}
    for name, number in ids.items():
        assert field(reader, f"tokenizer.ggml.{name}_token_id") == number, name
    assert field(reader, "tokenizer.ggml.add_bos_token") is False
    assert field(reader, "tokenizer.ggml.add_eos_token") is False
    assert field(reader, "tokenizer.chat_template").startswith("{% for message in messages %}")  # type: ignore[union-attr]
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1, 9, 10]}))
    with pytest.raises(ConfigError, match=r"4 tokens end its answers .* has places for three"):
        export(base, tmp_path / "other.gguf")
    assert not (tmp_path / "other.gguf").exists()


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_an_adapter_alone(make_base, make_adapter, tmp_path, kind) -> None:
    """What llama.cpp adds, by its rule `alpha / rank * B A`, is the permuted update of peft."""
    base = make_base()
    settings = {"use_rslora": True, "r": 32, "rank_pattern": {"v_proj": 16}}
    settings["alpha_pattern"] = {"o_proj": 5}
    adapter = make_adapter(
        base, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], **settings
    )
    said: list[str] = []
    origin = open_origin(str(adapter), needs_adapter=True)
    export_adapter(origin, tmp_path / "lora.gguf", kind, say=said.append)
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    assert field(reader, "general.type") == "adapter"
    assert field(reader, "general.architecture") == "llama"
    assert field(reader, "adapter.type") == "lora"
    alpha = field(reader, "adapter.lora.alpha")
    found = values(reader)
    merged = peft_merged(adapter)
    plain = load_file(base / "model.safetensors")
    names = [name for name in plain if "_proj" in name and "self_attn" in name]
    assert len(found) == 2 * len(names)
    for name in names:
        update = expected({name: merged[name] - plain[name]}, (4, 2))[their_name(name)]
        A, B = (found[f"{their_name(name)}.lora_{part}"] for part in "ab")
        tolerance = 1e-5 if kind == "f32" else 0.02 * np.abs(update).max()
        np.testing.assert_allclose(alpha / A.shape[0] * B @ A, update, atol=tolerance)  # type: ignore[operator]
    short = [note for note in said if "no multiple of 32" in note]
    assert len(short) == (kind == "q8_0")


ALONE = {
    "it is DoRA, which llama.cpp does not compute": {"use_dora": True},
    "it adapts the token embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "it holds whole tensors, such as base_model.model.lm_head.weight": {
        "modules_to_save": ["lm_head"]
    },
}


@pytest.mark.filterwarnings("ignore:Setting .save_embedding")
@pytest.mark.parametrize("reason", ALONE)
def test_adapters_that_cannot_stand_alone(make_base, make_adapter, tmp_path, reason) -> None:
    adapter = make_adapter(make_base(), **ALONE[reason])
    with pytest.raises(ConfigError) as caught:
        export_adapter(open_origin(str(adapter), needs_adapter=True), tmp_path / "lora.gguf", "f16")
    assert str(caught.value) == (
        f"{adapter}: this adapter cannot be written alone: {reason}.\n"
        "  Leave --adapter-only out: the merged model can hold it."
    )


def test_what_llama_cpp_would_compute_otherwise(make_base, tmp_path) -> None:
    def told(base: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            export(base, tmp_path / "out.gguf")
        assert not list(tmp_path.iterdir())
        return str(caught.value)

    assert told(make_base("gpt2")) == (
        "This model cannot be written as GGUF: its model_type is 'gpt2'; llama, mistral, qwen2, "
        "qwen3 and BlueLM can be written.\n  `myna merge` writes a folder that transformers and "
        "vLLM load, and that llama.cpp's own converter reads."
    )
    assert "its hidden_act is 'gelu', and llama.cpp computes silu" in told(
        make_base(hidden_act="gelu")
    )


def test_numbers_too_large_for_float16() -> None:
    with pytest.raises(NonFiniteError) as caught:
        encode(np.array([[1.0, 7e4]], np.float32), "f16")
    assert str(caught.value) == (
        "A weight is 7e+04, more than float16 can hold (65,504); nothing was written.\n"
        "  Use --type bf16 or --type f32."
    )
    assert encode(np.array([[1.0, 7e4]], np.float32), "bf16").tolist() == [[128, 63, 137, 71]]


def test_a_damaged_file_gets_no_name(make_base, tmp_path, monkeypatch) -> None:
    """A disk that loses what was written: the file is cut before it is read back."""
    base = make_base()
    close = gguf.GGUFWriter.close

    def cut(self: gguf.GGUFWriter) -> None:
        close(self)
        if self.path is not None:
            with open(self.path, "r+b") as file:
                file.truncate(self.path.stat().st_size // 2)

    monkeypatch.setattr(gguf.GGUFWriter, "close", cut)
    with pytest.raises(StorageError, match=r"out\.gguf: .*it was removed"):
        export(base, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_without_the_package(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # as Python does for what is not there
    with pytest.raises(ConfigError) as caught:
        check_gguf()
    assert str(caught.value) == (
        "Writing GGUF needs the gguf package.\n  pip install 'myna[export]'"
    )


def test_a_stale_copy_of_a_tied_head_is_left_out(make_base, tmp_path) -> None:
    """Some files hold one; transformers does not read it, and llama.cpp would."""
    base = make_base(tie_word_embeddings=True)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros(264, 64)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert "output.weight" not in values(export(base, tmp_path / "out.gguf"))
