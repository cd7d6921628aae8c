"""What a finished run leaves: the adapter folder, whole.

Owns what lies in `adapter/` beside the adapter itself: tokenizer, chat template and model card, so
that any engine that loads the folder sends the model the text it was trained on.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from torch import Tensor

from myna import __version__
from myna.cli.preparation import Prepared
from myna.config import Config
from myna.errors import StorageError
from myna.lora.adapter_file import AdapterMetadata, save_adapter
from myna.models.tokenizer import save_tokenizer
from myna.run_dir import RunDir, sync_folder, written_aside


def write_adapter(
    directory: RunDir,
    config: Config,
    prepared: Prepared,
    model: PeftModel,
    initial: Mapping[str, Tensor],
    base_fingerprint: str,
    forced_from: str | None,
) -> None:
    """Write `adapter/` aside and rename it; one that was set aside goes."""
    template = prepared.dataset.template
    metadata = AdapterMetadata(
        base_model=config.model,
        base_fingerprint=base_fingerprint,
        forced_from=forced_from,
        tokenizer_fingerprint=prepared.loaded.fingerprint,
        template_sha256=template.fingerprint,
        system=prepared.encoder.system,
        template_origin=template.origin,
        template_options=dict(template.options),
        stop_ids=prepared.encoder.stop_ids,
        pad_id=prepared.loaded.special.pad_id,
        init=config.lora.init,
    )
    with written_aside(directory.adapter) as folder:
        save_adapter(model, folder, metadata=metadata, initial=initial or None)
        tokenizer = prepared.loaded.tokenizer
        tokenizer.chat_template = template.saved_source
        save_tokenizer(tokenizer, folder)
        (folder / "README.md").write_text(_model_card(config, prepared), encoding="utf-8")
    shutil.rmtree(_adapter_before(directory), ignore_errors=True)


def set_adapter_aside(directory: RunDir) -> None:
    """Move the adapter of a finished run that goes on with something changed.

    While it goes on the run must not look finished. Raises StorageError.
    """
    before = _adapter_before(directory)
    try:
        if directory.adapter.is_dir():
            if before.is_dir():
                shutil.rmtree(before)
            os.rename(directory.adapter, before)
            sync_folder(directory.path)
    except OSError as error:
        raise StorageError(f"{directory.adapter}: could not be set aside: {error}.") from error


def _adapter_before(directory: RunDir) -> Path:
    return directory.path / "adapter-before-change"


def _model_card(config: Config, prepared: Prepared) -> str:
    accounting = prepared.dataset.accounting
    lora, train = config.lora, config.train
    persona = (
        f"\nIt was trained with this system text:\n\n> {config.system}\n" if config.system else ""
    )
    return f"""---
base_model: {config.model}
library_name: peft
tags: [lora, myna]
---

# LoRA adapter for {config.model}

Trained with myna {__version__} on {accounting.rows_in:,} rows; their answers have
{accounting.trained_tokens:,} tokens.
{persona}
| setting | value |
| --- | --- |
| rank, alpha, dropout | {lora.rank}, {lora.resolved_alpha:g}, {lora.dropout:g} |
| epochs, rows per step | {train.epochs:g}, {train.batch_size} |
| learning rate, schedule | {train.learning_rate:g}, {train.schedule} |
| chat template | {prepared.dataset.template.origin} |

The chat template and tokenizer in this folder are those of the training. Load it with

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{config.model}")
model = PeftModel.from_pretrained(base, "this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

or talk to it with `myna chat FOLDER`.
"""
