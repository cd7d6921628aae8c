"""What a finished run leaves: the adapter folder, whole.

Owns what lies in `adapter/` beside the adapter itself: tokenizer, chat template and model card, so
that any engine that loads the folder sends the model the text it was trained on. What the card says
is `report.card`'s.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from torch import Tensor

from myna.cli.preparation import Prepared
from myna.config import Config
from myna.errors import StorageError
from myna.lora.adapter_file import AdapterMetadata, save_adapter
from myna.models.tokenizer import save_tokenizer
from myna.report.card import NAME, known_base, model_card
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
    tokenizer = prepared.loaded.tokenizer
    stop_ids = prepared.encoder.stop_ids
    metadata = AdapterMetadata(
        base_model=config.model,
        base_fingerprint=base_fingerprint,
        forced_from=forced_from,
        tokenizer_fingerprint=prepared.loaded.fingerprint,
        template_sha256=template.fingerprint,
        system=prepared.encoder.system,
        template_origin=template.origin,
        template_options=dict(template.options),
        folds_system=template.folds_system,
        stop_ids=stop_ids,
        stop_tokens=tuple(map(str, tokenizer.convert_ids_to_tokens(list(stop_ids)))),
        pad_id=prepared.loaded.special.pad_id,
        init=config.lora.init,
    )
    with written_aside(directory.adapter) as folder:
        save_adapter(model, folder, metadata=metadata, initial=initial or None)
        tokenizer.chat_template = template.saved_source
        save_tokenizer(tokenizer, folder)
        card = model_card(directory, folder, known_base(config.model))
        (folder / NAME).write_text(card, encoding="utf-8")
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
