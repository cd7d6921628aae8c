"""The switch: several adapters on one base in memory, of which one computes at a time.

Owns loading them side by side and choosing among them. What an adapter folder is, and whether it
fits the base, is `adapter_file.py`'s. Switching changes flags in the layers and copies nothing; it
must not happen while the model computes, which is the caller's business.
"""

# mypy: untyped-calls-exclude="peft"
# (peft annotates its arguments but few of its return types.)

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from myna.lora.adapter_file import load_adapters


class AdapterSwitch:
    """The adapters in `folders`, by name, on `model`; at first the base computes alone.

    Raises ConfigError for an adapter that does not fit the model, before any is loaded, and for one
    that changes the base itself (trained biases), which others could not share.
    """

    def __init__(self, model: PreTrainedModel, folders: Mapping[str, Path]) -> None:
        # Names of adapters may hold points, those of modules may not.
        self._inner = {name: f"served-{number}" for number, name in enumerate(folders)}
        self._model: Any = None
        if folders:
            inner = {self._inner[name]: folder for name, folder in folders.items()}
            self._model = load_adapters(model, inner)
            self._model.base_model.disable_adapter_layers()
        self._active: str | None = None

    @property
    def active(self) -> str | None:
        """The adapter that computes; None: the base alone."""
        return self._active

    def use(self, name: str | None) -> None:
        """Let this adapter compute from now on, or with None the base alone."""
        if name == self._active:
            return
        assert self._model is not None and (name is None or name in self._inner), "unknown adapter"
        if name is None:
            self._model.base_model.disable_adapter_layers()
        else:
            self._model.base_model.enable_adapter_layers()
            self._model.set_adapter(self._inner[name], inference_mode=True)
        self._active = name
