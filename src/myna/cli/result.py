"""What a finished run leaves: the adapter folder, whole, and the picture of its loss.

Owns what lies in `adapter/` beside the adapter itself: tokenizer, chat template and model card, so
that any engine that loads the folder sends the model the text it was trained on. What the card says
is `report.card`'s.
"""

from collections.abc import Mapping

from peft import PeftModel
from torch import Tensor

from myna.cli.preparation import Prepared
from myna.config import Config
from myna.lora.adapter_file import AdapterMetadata, save_adapter
from myna.models.tokenizer import save_tokenizer
from myna.report.card import NAME, known_base, model_card
from myna.report.plots import plot_loss
from myna.run_dir import RunDir, written_aside
from myna.training.events import read_events


def write_adapter(
    directory: RunDir,
    config: Config,
    prepared: Prepared,
    model: PeftModel,
    initial: Mapping[str, Tensor],
    base_fingerprint: str,
    forced_from: str | None,
) -> None:
    """Write `adapter/` aside and rename it."""
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


def draw_loss(directory: RunDir) -> None:
    """Draw `loss.png` from the run's events."""
    plot_loss(read_events(directory.events), directory.loss_plot)
