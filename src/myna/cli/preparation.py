"""From settings to encoded rows: what `myna data` shows and `myna train` trains.

Owns putting a tokenizer, a template and data files together. It needs no model weights. Encoding is
`data`'s, tokenizers are `models`'.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from myna.config import Config
from myna.data.encode import Dataset, Encoder, encode_dataset
from myna.data.formats import read_conversations
from myna.data.templates import choose_template
from myna.models.load import context_length, load_config
from myna.models.tokenizer import LoadedTokenizer, load_tokenizer


@dataclass(frozen=True)
class Prepared:
    """Encoded rows, and what they were encoded with."""

    dataset: Dataset
    loaded: LoadedTokenizer
    encoder: Encoder

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of what decides the token ids: a resumed run must find the same."""
        template = self.dataset.template
        return {
            "data": self.dataset.content_hash,
            "tokenizer": self.loaded.fingerprint,
            "template": hashlib.sha256(template.saved_source.encode()).hexdigest(),
        }


def prepare_rows(config: Config, *, trust_remote_code: bool) -> Prepared:
    """Read, map and encode the data of `config` with the tokenizer of its model.

    Raises DataError with every bad row before anything else is loaded.
    """
    rows = read_conversations([Path(name) for name in config.data], config.columns)
    loaded = load_tokenizer(config.model, trust_remote_code=trust_remote_code)
    template = choose_template(loaded.tokenizer, loaded.model_type, override=config.template)
    model_config = load_config(config.model, trust_remote_code=trust_remote_code)
    encoder = Encoder(
        loaded.tokenizer,
        template,
        stop_ids=loaded.special.stop_ids,
        system=config.system,
        max_length=config.train.max_length or context_length(model_config),
        over_length=config.train.over_length,
        control_tokens=config.train.control_tokens,
        train_on=config.train.train_on,
    )
    return Prepared(encode_dataset(encoder, rows), loaded, encoder)
