import http.server
import io
import json
import socket
import threading

import huggingface_hub.constants
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from myna.cli import doctor
from myna.errors import ConfigError
from myna.lora.inject import inject

BLUELM_7B = {
    "architectures": ["BlueLMForCausalLM"], "model_type": "BlueLM", "vocab_size": 100008,
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "use_stable_embedding": True,
    "tie_word_embeddings": False, "pad_token_id": 3,
}  # fmt: skip
SMALL = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_local_experts": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No test asks the real hub: the address is a port where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield address


@pytest.fixture
def folder(tmp_path):
    def make(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return make


def report(model=None, width=80):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    doctor.run(model, console)
    return console.file.getvalue()


def test_the_report_names_hardware_rates_and_versions():
    text = report()
    for word in ("processor", "memory", "auto takes", "float32", "bfloat16", "float16"):
        assert word in text
    assert torch.__version__ in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_hub_that_does_not_answer_is_a_line_with_the_mend(no_hub):
    assert doctor._hub() == (
        f"[bold]model hub[/]: {no_hub} (the default) cannot be reached: Connection refused. Use a "
        "model folder, or set HF_ENDPOINT to a mirror or HTTPS_PROXY to a proxy"
    )


@pytest.mark.parametrize("status", [200, 404])
def test_a_hub_that_answers(monkeypatch, status):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        assert doctor._hub() == f"[bold]model hub[/]: {address} answers"


def test_offline_mode_asks_nobody(monkeypatch, no_hub):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert doctor._hub() == (
        f"[bold]model hub[/]: {no_hub} not asked, HF_HUB_OFFLINE is set; unset it to fetch"
    )


def test_a_missing_extra_is_answered_with_its_command(monkeypatch):
    found = doctor._version
    if found("myna") is None:
        pytest.skip("myna is not installed as a package")
    monkeypatch.setattr(doctor, "_version", lambda n: None if n == "tiktoken" else found(n))
    assert (
        '[bold]extra tiktoken[/]: tiktoken missing; pip install "myna\\[tiktoken]"'
        in doctor._extras()
    )


def test_needs_of_the_7b_shape(folder):
    """By hand: 7,295,545,344 parameters; rank 16 is twice the 19,988,480 of the tutorial's 8."""
    size, trainable, by_dtype = doctor.needs(folder(BLUELM_7B))
    assert (size, trainable) == (7_295_545_344, 2 * 19_988_480)
    assert by_dtype["float32"].base == 4 * size
    assert by_dtype["bfloat16"].base == 2 * size == 14_591_090_688  # the published file size
    assert by_dtype["bfloat16"].adapter == 16 * trainable
    for need in by_dtype.values():
        assert 0 < need.recomputed_activations < need.activations / 3


def test_activations_are_those_autograd_keeps_on_a_cpu(folder):
    model = inject(
        LlamaForCausalLM(LlamaConfig(**SMALL)), rank=16, alpha=32.0, dropout=0.0,
        target_modules="all-linear", use_rslora=False, use_dora=False, init="default", seed=0,
    ).model.train()  # fmt: skip
    parameters = {id(parameter) for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        if id(tensor if tensor._base is None else tensor._base) not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros(8, 512, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, use_cache=False)
    head = 8 * 512 * 100 * 16
    estimated = doctor.needs(folder(SMALL))[2]["float32"].activations - head
    assert estimated == pytest.approx(sum(s.nbytes() for s in kept.values()), rel=0.1)


def test_what_fits_and_what_does_not(folder, monkeypatch):
    text = report(folder(BLUELM_7B))
    assert "7,295,545,344 parameters, 39,976,960 in an adapter of rank 16" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    monkeypatch.setattr(doctor, "memory_available", lambda device="cpu": 20_000_000_000)
    text = report(folder(BLUELM_7B))
    rows = [line.split() for line in text.splitlines() if line.split()[:1] == ["float32"]]
    assert [row[2:6] for row in rows[-2:]] == [["29.2", "GB", "640", "MB"]] * 2
    assert [row[-1] for row in rows[-2:]] == ["short", "short"]
    assert "…" not in text
    monkeypatch.setattr(doctor, "memory_available", lambda device="cpu": 200_000_000_000)
    assert report(folder(BLUELM_7B)).count(" yes") == 4


def test_a_model_whose_activations_cannot_be_known(folder, monkeypatch):
    monkeypatch.setattr(doctor, "_saved_bytes_per_token", lambda model: 0)
    text = report(folder(MIXTRAL))
    assert text.count("unknown") >= 8
    assert " yes" not in text


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError):
        report(str(tmp_path / "nowhere"))


def test_the_cache_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("MYNA_CACHE", str(tmp_path))
    mend = "(at most 20.0 GB; MYNA_CACHE names another folder)"
    assert doctor._cache() == f"[bold]cache[/]: 0.0 MB of encoded rows in {tmp_path} {mend}"
    (tmp_path / "encoded" / "key").mkdir(parents=True)
    (tmp_path / "encoded" / "key" / "ids").write_bytes(bytes(1_500_000))
    assert doctor._cache() == f"[bold]cache[/]: 1.5 MB of encoded rows in {tmp_path} {mend}"
