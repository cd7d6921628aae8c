"""Workloads: the rows, the model and the first adapter that every contender is given.

Owns what identical work means: token ids, the rows of each step (myna's `rows_of_steps`), random
weights that are bfloat16-exact, and one saved adapter whose B is not zero, so that gradients of A
are not zero either. All of it is a pure function of a seed and lies in one folder, which the
contenders read. Who computes it is `contenders.py`'s.

    A  huanhuan.json in the tutorial's prompt: short rows, a shared persona
    B  lengths log-normal around 250 tokens, half of each trained, nothing shared
    C  rows of 4,000 to 8,000 tokens, all trained
    D  a system prompt of 1,500 tokens before 40 to 120 tokens, 30 of them trained
    L  a laptop's job: the shape of Qwen3-0.6B on 1,000 rows of huanhuan.json
"""

import hashlib
import json
import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from limit import Sizes
from myna.data.conversation import Place
from myna.data.dataset import encode_dataset
from myna.data.encode import Encoder
from myna.data.formats import read_conversations
from myna.data.loader import rows_of_steps
from myna.data.store import Example
from myna.data.templates import choose_template

SEED = 42
RANK, ALPHA = 8, 32  # the tutorial's
STD = 0.02
"""Of the random weights, of A and of B."""
PERSONA = "现在你要扮演皇帝身边的女人--甄嬛"
BOS, EOS, PAD = 1, 2, 3
PIECES = 8000
FIRST_ID = 4  # below it: <unk>, <s>, </s>, <pad>

Row = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt ids and completion ids."""


@dataclass(frozen=True)
class Shape:
    """A model to make with random weights."""

    model_type: str
    sizes: Sizes
    tied: bool = False
    """Whether the head is the embedding table."""


BLUELM_SMALL = Shape("BlueLM", Sizes(1024, 12, 16, 16, 64, 2752, 100_008, RANK))
LLAMA_7B = Shape("llama", Sizes(4096, 32, 32, 32, 128, 11_008, 100_008, RANK))
"""BlueLM-7B without the LayerNorm after its embedding: Liger and Unsloth know plain Llama only."""
QWEN3_06B = Shape("qwen3", Sizes(1024, 28, 16, 8, 128, 3072, 151_936, RANK), tied=True)
TINY = {
    "BlueLM": Shape("BlueLM", Sizes(64, 2, 4, 4, 16, 176, 8016, RANK)),
    "llama": Shape("llama", Sizes(64, 2, 4, 4, 16, 176, 8016, RANK)),
    "qwen3": Shape("qwen3", Sizes(64, 2, 4, 2, 32, 176, 8016, RANK), tied=True),
}
"""Stand-ins for tests of the benchmark itself."""


@dataclass(frozen=True)
class Workload:
    """Rows and shape of one league table."""

    name: str
    title: str
    num_rows: int
    batch_size: int
    shape: Shape
    layouts: tuple[str, ...]
    """What transformers and trl may choose from: rows a micro-batch x accumulation, `sorted` by
    length within the step or not."""
    contenders: tuple[str, ...] = ("tutorial", "peft", "trl", "myna")
    """Those that run unless others are named."""
    rounds: int = 3
    """Unless asked for otherwise."""

    @property
    def num_steps(self) -> int:
        """One epoch."""
        return math.ceil(self.num_rows / self.batch_size)

    def on_cuda(self) -> "Workload":
        """The full 7B shape, which a card has room for; A has all rows of the reference job."""
        return replace(
            self,
            num_rows=3729 if self.name == "A" else self.num_rows,
            shape=self.shape if self.name == "L" else LLAMA_7B,
            contenders=("tutorial", "peft", "trl", "liger", "unsloth", "myna", "myna_compiled"),
        )

    def tiny(self) -> "Workload":
        """The same kind of rows under a tiny model, for tests of the benchmark."""
        return replace(
            self,
            num_rows=min(self.num_rows, 4 * self.batch_size),
            shape=TINY[self.shape.model_type],
        )


PEERS = ("peft", "trl", "myna")
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "A",
            "huanhuan.json, about 54 tokens a row, shared persona",
            128,
            16,
            BLUELM_SMALL,
            ("8x2", "8x2 sorted", "16x1"),
        ),
        Workload(
            "B",
            "50 to 2,000 tokens a row, half trained, nothing shared",
            128,
            16,
            BLUELM_SMALL,
            ("1x16", "2x8 sorted", "4x4 sorted"),  # 8 rows of 2,000: logits of 13 GB in float32
            PEERS,
        ),
        Workload(
            "C",
            "4,000 to 8,000 tokens a row, all trained",
            8,
            2,
            BLUELM_SMALL,
            ("1x2",),  # 2 rows of 8,000: logits of 6 GB in float32, three times over
            PEERS,
        ),
        Workload(
            "D",
            "a system prompt of 1,500 tokens before 40 to 120, 30 trained",
            64,
            16,
            BLUELM_SMALL,
            ("2x8",),  # rows of nearly one length: how they are cut changes little
            PEERS,
        ),
        Workload(
            "L",
            "Qwen3-0.6B's shape, one epoch of 1,000 rows of huanhuan.json",
            1000,
            16,
            QWEN3_06B,
            ("8x2", "8x2 sorted", "16x1"),
            ("myna",),
            rounds=1,
        ),
    )
}


def rows_of(workload: Workload, data: Path) -> list[Row]:
    """The rows of a workload; `data` is huanhuan.json, read for A and L only."""
    if workload.name in ("A", "L"):
        return huanhuan_rows(data)[: workload.num_rows]
    vocabulary = min(workload.shape.sizes.vocabulary, 100_000)
    return GENERATORS[workload.name](workload.num_rows, vocabulary)


def mixed_rows(number: int, vocabulary: int, seed: int = SEED) -> list[Row]:
    """Workload B: log-normal lengths, median 250, cut to 50 to 2,000; the second half is trained.

    The first tokens differ, so no two rows share a prefix.
    """
    draw = random.Random(f"B:{seed}")
    rows = []
    for first in draw.sample(range(FIRST_ID, vocabulary), number):
        length = min(2000, max(50, round(draw.lognormvariate(math.log(250), 0.8))))
        ids = (first, *_ids(draw, length - 1, vocabulary))
        rows.append((ids[: length // 2], ids[length // 2 :]))
    return rows


def long_rows(number: int, vocabulary: int, seed: int = SEED) -> list[Row]:
    """Workload C: BOS, then 4,000 to 8,000 tokens that are all trained."""
    draw = random.Random(f"C:{seed}")
    return [((BOS,), _ids(draw, draw.randint(4000, 8000) - 1, vocabulary)) for _ in range(number)]


def system_rows(number: int, vocabulary: int, seed: int = SEED) -> list[Row]:
    """Workload D: the same 1,500 tokens, then 40 to 120 of the row's own, the last 30 trained."""
    draw = random.Random(f"D:{seed}")
    system = (BOS, *_ids(draw, 1499, vocabulary))
    return [
        ((*system, *_ids(draw, draw.randint(40, 120) - 30, vocabulary)), _ids(draw, 30, vocabulary))
        for _ in range(number)
    ]


GENERATORS = {"B": mixed_rows, "C": long_rows, "D": system_rows}


def _ids(draw: random.Random, number: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(draw.choices(range(FIRST_ID, vocabulary), k=number))


def huanhuan_rows(data: Path) -> list[Row]:
    """All rows of huanhuan.json under the tutorial's persona, by the project's own encoder."""
    tokenizer = huanhuan_tokenizer(data)
    template = choose_template(tokenizer, "BlueLM")
    encoder = Encoder(tokenizer, template, stop_ids=[EOS], system=PERSONA)
    examples = encode_dataset(encoder, read_conversations([data])).examples
    return [(example.prompt_ids, example.completion_ids) for example in examples]


def huanhuan_tokenizer(data: Path) -> Any:
    """A byte-level BPE of 8,000 pieces trained on the texts of `data`, the same every time.

    BlueLM's ids for <unk>, <s>, </s> and <pad>; its two markers are one token each, as they are in
    BlueLM's own tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    records = json.loads(data.read_text(encoding="utf-8"))
    texts = [record[key] for record in records for key in ("instruction", "output")]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(["[|Human|]:", "[|AI|]:"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["[|Human|]:", "[|AI|]:"],
    )


def examples_of(rows: Sequence[Row]) -> list[Example]:
    """The rows as `fit` takes them."""
    return [
        Example("", "", prompt, completion, Place(Path("rows.json"), number, number), 1)
        for number, (prompt, completion) in enumerate(rows, start=1)
    ]


def steps_of(num_rows: int, batch_size: int, num_steps: int) -> list[list[int]]:
    """Row indices of the first steps, in myna's order."""
    steps = rows_of_steps(num_rows, batch_size, seed=SEED, first_step=1, last_step=num_steps)
    return [rows for _, _, rows in steps]


def sha256_of(rows: Sequence[Row]) -> str:
    """Identifies the work: results with another sum are of other rows."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def write_rows(folder: Path, rows: Sequence[Row]) -> None:
    """`rows.json`, which `read_rows` reads."""
    (folder / "rows.json").write_text(json.dumps(rows))


def read_rows(folder: Path) -> list[Row]:
    """What `write_rows` wrote."""
    content = json.loads((folder / "rows.json").read_text())
    return [(tuple(prompt), tuple(completion)) for prompt, completion in content]


def write_model(folder: Path, shape: Shape) -> None:
    """A model folder of transformers with random weights, bfloat16, one file per layer.

    Matrices are normal with standard deviation 0.02, norms are one, biases zero; the values depend
    on the tensor's name alone. Nothing is written where the folder is complete.
    """
    import torch
    from safetensors.torch import save_file

    index = folder / "model.safetensors.index.json"
    if index.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    model = _empty_model(shape)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(folder)
    files: dict[str, dict[str, Any]] = {}
    for name, tensor in model.state_dict().items():
        if shape.tied and name == "lm_head.weight":
            continue
        layer = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = tensor.shape
    for file, shapes in files.items():
        values = {name: _random(name, size) for name, size in shapes.items()}
        save_file(values, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, shapes in files.items() for name in shapes}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _random(name: str, size: Sequence[int]) -> Any:
    import torch

    if "norm" in name:
        return torch.full(size, float(name.endswith("weight")), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(random.Random(f"{SEED}:{name}").getrandbits(63))
    return torch.empty(size).normal_(0.0, STD, generator=generator).bfloat16()


def _empty_model(shape: Shape) -> Any:
    """The model on the meta device: names and sizes without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from myna.models.bluelm import register

    register()
    sizes = shape.sizes
    config = AutoConfig.for_model(
        shape.model_type,
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=8192,  # workload C; positions are rotary, no table depends on it
        tie_word_embeddings=shape.tied,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **({"use_stable_embedding": True} if shape.model_type == "BlueLM" else {}),
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def write_adapter(folder: Path, shape: Shape, dropout: float) -> None:
    """A peft adapter on all seven linear layers, A and B normal with standard deviation 0.02."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        target_modules=list(shape.sizes.linears),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft reads a name that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(_empty_model(shape), config)
    folder.mkdir(parents=True, exist_ok=True)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    generator = torch.Generator().manual_seed(SEED)
    values = {
        name: torch.empty(state[name].shape).normal_(0.0, STD, generator=generator)
        for name in sorted(state)
    }
    save_file(values, folder / "adapter_model.safetensors", metadata={"format": "pt"})
