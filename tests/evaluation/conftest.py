"""A tiny chat model with an adapter that changes it, as a folder on disk and opened, and rows."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from myna.cli.preparation import Prepared, prepare_rows, sources_of
from myna.config import Config
from myna.data.templates import choose_template
from myna.evaluation.rows import JudgedRow, rows_of_examples
from myna.inference.speaker import Speaker
from myna.lora.adapter_file import AdapterMetadata, save_adapter
from myna.lora.inject import inject
from myna.models.load import load_model
from myna.models.tokenizer import load_tokenizer, save_tokenizer
from tiny_model import save_tiny_model


@dataclass(frozen=True)
class Adapted:
    """A base and an adapter for it."""

    base: Path
    folder: Path


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    base = save_tiny_model(tmp_path_factory.mktemp("base"))
    loaded = load_tokenizer(str(base))
    model = load_model(str(base), dtype=torch.float32, device=torch.device("cpu")).model
    injected = inject(
        model,
        rank=4,
        alpha=8,
        dropout=0.1,
        target_modules="all-linear",
        use_rslora=False,
        use_dora=False,
        init="default",
        seed=1,
    )
    generator = torch.Generator().manual_seed(5)
    for parameter in injected.model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.8, generator=generator)
    template = choose_template(loaded.tokenizer, loaded.model_type)
    metadata = AdapterMetadata(
        base_model=str(base), stop_ids=loaded.special.stop_ids, pad_id=loaded.special.pad_id
    )
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(injected.model, folder, metadata=metadata)
    loaded.tokenizer.chat_template = template.saved_source
    save_tokenizer(loaded.tokenizer, folder)
    return Adapted(base, folder)


@dataclass(frozen=True)
class Judging:
    """Rows of a file, ready to be judged."""

    prepared: Prepared
    rows: list[JudgedRow]


@pytest.fixture
def rows_from(adapted: Adapted, tmp_path: Path) -> Callable[..., Judging]:
    """Encodes rows as a run on the tiny model does."""

    def make(rows: list[dict[str, Any]], **settings: Any) -> Judging:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        config = Config(model=str(adapted.base), data=[str(path)], **settings)
        prepared = prepare_rows(config, trust_remote_code=False)
        sources, _ = sources_of(config)
        examples = prepared.dataset.examples
        return Judging(prepared, rows_of_examples(examples, sources, prepared.encoder))

    return make


@pytest.fixture
def speaker(adapted: Adapted) -> Speaker:
    from myna.inference.speaker import open_speaker

    return open_speaker(str(adapted.folder), device="cpu", dtype="float32")
