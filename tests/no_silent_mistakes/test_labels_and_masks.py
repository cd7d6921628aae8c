"""Defects of labels and masks: what has a label is the answer, and rows do not see each other."""

from pathlib import Path

import pytest
import torch
from chat_families import PLAIN
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from myna.cli.preparation import prepare_rows
from myna.config_file import load_config
from myna.data.conversation import Conversation, Message, Place
from myna.data.dataset import encode_dataset
from myna.data.encode import Encoder
from myna.data.formats import Rows as ReadRows
from myna.data.loader import Batch, padded_batches
from myna.data.store import Example
from myna.data.templates import choose_template
from myna.models.load import load_model
from myna.training.computation import Packed, Padded, choose_computation

from .conftest import SOME, Checkpoint, Rows, Terminal, adapted, ask

CPU = torch.device("cpu")
UNEVEN = [ask("Who?", "A bird."), ask("What is the capital of France?", "Paris, I think."), *SOME]


def examples_of(terminal: Terminal, model: Path, rows: Rows) -> list[Example]:
    config = load_config(Path(terminal.job(model, rows, system="Be brief."))).config
    return list(prepare_rows(config, trust_remote_code=False).dataset.examples)


def batch_of(examples: list[Example], pad_id: int = 0) -> Batch:
    (batch,) = padded_batches(
        examples, range(len(examples)), micro_batch_size=len(examples), pad_id=pad_id
    )
    return batch


def labels_of(batch: Batch, line: int) -> dict[int, int]:
    """Position in the row -> trained token, of one row of a batch."""
    width = batch.input_ids.shape[1]
    pairs = zip(batch.positions.tolist(), batch.targets.tolist(), strict=True)
    # Predicted at p - 1, the token stands at p.
    return {at % width + 1: target for at, target in pairs if at // width == line}


def test_assistant_header_supervised(terminal: Terminal, checkpoint: Checkpoint) -> None:
    for family, header in (
        ("qwen2_5", "<|im_start|>assistant\n"),
        ("deepseek_llm", "\n\nAssistant:"),
        ("phi3", "<|assistant|>\n"),
    ):
        (row,) = terminal.trained(checkpoint(family), [ask("Who?", "A bird.")])
        assert row["prompt_text"].endswith(header)
        assert "ssistant" not in row["completion_text"]


def test_no_attention_mask(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """Padded rows are given to the model with their mask, and lose as much as each does alone."""
    base = load_model(str(checkpoint("llama3")), dtype=torch.float32, device=CPU).model
    model = adapted(base)
    examples = examples_of(terminal, checkpoint("llama3"), UNEVEN)
    masks: list[torch.Tensor] = []
    base.register_forward_pre_hook(
        lambda _, args, given: masks.append(given["attention_mask"]), with_kwargs=True
    )

    def loss(rows: int) -> float:
        computation = Padded(rows, 0, CPU)
        with torch.no_grad(), computation.prepared(model):
            pieces = computation.pieces(examples, range(len(examples)))
            return sum(computation.summed_loss(model, piece).item() for piece in pieces)

    together = loss(len(examples))
    lengths = [len(example.prompt_ids) + len(example.completion_ids) for example in examples]
    assert masks.pop().sum(1).tolist() == lengths and min(lengths) < max(lengths)
    assert together == pytest.approx(loss(1), rel=1e-5)


def test_attention_mask_length_mismatch(terminal: Terminal, checkpoint: Checkpoint) -> None:
    examples = examples_of(terminal, checkpoint("gemma"), UNEVEN)
    batch = batch_of(examples)
    assert batch.attention_mask.shape == batch.input_ids.shape
    lengths = [len(example.prompt_ids) + len(example.completion_ids) for example in examples]
    assert batch.attention_mask.sum(1).tolist() == lengths
    for mask, length in zip(batch.attention_mask, lengths, strict=True):
        assert mask[:length].all() and not mask[length:].any()


def test_fixed_length_padding() -> None:
    """No row is padded beyond its batch, and an answer with the pad's id in it keeps that label."""
    words = {"<unk>": 0, "</s>": 1, "问": 2, "答": 3, "：": 4, "鸟": 5}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>", eos_token="</s>"
    )
    tokenizer.chat_template = PLAIN
    encoder = Encoder(tokenizer, choose_template(tokenizer, None), stop_ids=[1], max_length=512)
    conversations = tuple(
        Conversation(
            (Message("user", "鸟"), Message("assistant", answer)), Place(Path("rows"), line, line)
        )
        for line, answer in enumerate(("鸟", "鸟猫鸟"), start=1)
    )
    dataset = encode_dataset(encoder, ReadRows(conversations, (), "hash"))
    short, lossy = dataset.examples
    assert lossy.completion_ids == (5, 0, 5, 1)
    batch = batch_of([short, lossy], pad_id=tokenizer.pad_token_id)
    assert batch.input_ids.shape == (2, len(lossy.prompt_ids) + 4)
    assert list(labels_of(batch, 1).values()) == [5, 0, 5, 1]
    assert list(labels_of(batch, 0).values()) == [5, 1]
    assert any("characters the tokenizer lacks" in note for note in dataset.notes)


def test_packing_without_boundaries(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """Rows in one pack have the loss that each has alone, and their order does not matter."""
    examples = examples_of(terminal, checkpoint("llama3"), UNEVEN)
    base = load_model(str(checkpoint("llama3")), dtype=torch.float32, device=CPU).model
    model = adapted(base)
    computation, how = choose_computation(
        model, micro_batch_size=None, padded_rows=8, pad_id=0, device=CPU
    )
    assert isinstance(computation, Packed), how

    def loss(rows: list[int]) -> float:
        with torch.no_grad(), computation.prepared(model):
            pieces = computation.pieces(examples, rows)
            return sum(computation.summed_loss(model, piece).item() for piece in pieces)

    everything = list(range(len(examples)))
    (pack,) = computation.pieces(examples, everything)
    assert len(pack.rows) == len(examples)
    alone = sum(loss([row]) for row in everything)
    assert loss(everything) == pytest.approx(alone, rel=1e-5)
    assert loss(everything[::-1]) == pytest.approx(alone, rel=1e-5)


def test_bos_label_unmasked(terminal: Terminal, checkpoint: Checkpoint) -> None:
    for family in ("llama3", "gemma3", "deepseek_llm"):
        bos = AutoTokenizer.from_pretrained(checkpoint(family)).bos_token_id
        examples = examples_of(terminal, checkpoint(family), UNEVEN)
        batch = batch_of(examples)
        assert (batch.input_ids[:, 0] == bos).all()
        assert bos not in batch.targets


def test_last_prompt_token_supervised(terminal: Terminal, checkpoint: Checkpoint) -> None:
    """The first label is the answer's first token, predicted where the prompt ends."""
    examples = examples_of(terminal, checkpoint("qwen2_5"), UNEVEN)
    batch = batch_of(examples)
    for line, example in enumerate(examples):
        labels = labels_of(batch, line)
        start = len(example.prompt_ids)
        answer = dict(enumerate(example.completion_ids, start=start))
        assert labels == answer


def test_whole_sequence_supervised(terminal: Terminal, checkpoint: Checkpoint) -> None:
    shown = terminal.shown(terminal.job(checkpoint("qwen2_5"), UNEVEN))
    trained = sum(len(row["completion_ids"]) for row in shown["rows"])
    context = sum(len(row["prompt_ids"]) for row in shown["rows"])
    assert shown["trained_tokens"] == trained
    assert shown["tokens"] == trained + context
    said = terminal.run("data", "job.yaml")
    assert f"trained {trained:,} {trained / (trained + context):.1%} of the tokens" in said.text
