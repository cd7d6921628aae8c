"""Packed forwards: a model computes a token tree by `ops.attention`, and is checked to do it right.

Owns the attention function that transformers calls for packs, switching a model to it and back, and
the check at the start of a run, whose answer is the reason why a model cannot be packed. What to do
then (row by row, aloud) is the caller's; how rows become trees is `data`'s.
"""

# mypy: allow-untyped-calls
# (transformers annotates its arguments but few of its return types.)

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from myna.models.load import quiet_transformers
from myna.ops.attention import TreeLayout, tree_attention, tree_layout

NAME = "myna"
"""What transformers knows the attention of packs as. AttentionMaskInterface has no such entry: for
a name it does not know, transformers builds no mask and does not look for sequences in the
position ids."""

_LAYER_TYPES = {"full_attention", "sliding_attention"}

_WITHOUT_EFFECT = {
    "position_ids",
    "cache_position",
    "position_embeddings",
    "use_cache",
    "predicting",  # for the last layer, see last_layer.py
}
"""Keywords that models hand on to attention functions which do not read them."""

_LONGEST_CHECKED = 512
"""Windows above this are checked on a scaled-down copy only."""

# Segments of the check's tree: two roots, three levels, a segment of one token. The row of segments
# 0 and 2 is made longer than every window.
_PARENTS = (-1, 0, 0, 1, 1, -1)
_LENGTHS = (7, 5, 30, 3, 1, 4)
_LONGEST = 2
_SMALL_WINDOW = 6


class CannotPackError(Exception):
    """A packed forward met something that `tree_attention` does not do; the text is the reason."""


@contextlib.contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Inside the block `model(..., tree=layout)` computes packs; afterwards all is as it was.

    A packed forward takes `input_ids` and `position_ids` (1, T), `use_cache=False`, no
    `attention_mask`, and `tree=` the pack's TreeLayout. The backward belongs inside the block too:
    recomputed activations come from a forward. `model` may be wrapped by peft. Its modules get
    copies of their configs for the time of the block: transformers shares config objects between
    models, and the others must not switch with this one.
    """
    # Never traced: a compiled layer calls it as it is.
    AttentionInterface.register(NAME, torch.compiler.disable(_attend))
    # Not getattr: peft's wrappers answer for the modules inside them.
    given = [
        (module, module.__dict__["config"])
        for module in model.modules()
        if isinstance(module.__dict__.get("config"), PreTrainedConfig)
    ]
    copies: dict[int, Any] = {}  # one memo for all, so that configs inside configs stay the same
    for module, config in given:
        switched = copy.deepcopy(config, copies)
        switched._attn_implementation = NAME
        module.config = switched
        module.__dict__["_own_config"] = config
    try:
        yield
    finally:
        for module, config in given:
            module.config = config
            module.__dict__.pop("_own_config", None)


@contextlib.contextmanager
def own_attention(model: nn.Module) -> Iterator[None]:
    """Inside the block, within `packed_attention`, `model` computes under its own attention.

    For padded forwards and for generation; compiled layers run uncompiled. Elsewhere it changes
    nothing.
    """
    switched: list[tuple[Any, Any]] = [
        (module, module.__dict__["config"])
        for module in model.modules()
        if "_own_config" in module.__dict__
    ]
    for module, _ in switched:
        module.config = module._own_config
    try:
        # Generation has other sizes at every token: each would be compiled anew.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, config in switched:
            module.config = config


def check_packing(model: PreTrainedModel | nn.Module) -> str | None:
    """None if packs give what the model's own attention gives row by row, else the reason why not.

    Compares logits on random rows with shared prefixes, one of them longer than every window: on a
    scaled-down copy in float32 with small windows, then on `model` itself, in its number format and
    on its device. `model` (a causal language model, may be wrapped by peft) and the random number
    generators are left as they were.
    """
    inner = inner_model(model)
    config = inner.config.get_text_config()
    if reason := _known_obstacle(inner, config):
        return reason
    window = max(_windows(config).values(), default=0)
    devices = [inner.device] if inner.device.type == "cuda" else []
    with torch.random.fork_rng(devices), quiet_transformers():
        torch.manual_seed(0)
        small = _scaled_down(inner)
        if small is not None:
            if reason := _difference(small, _SMALL_WINDOW, tolerance=1e-3):
                return reason
        elif window > _LONGEST_CHECKED:
            return f"a window of {window} tokens that could not be checked on a smaller copy"
        reached = window if window <= _LONGEST_CHECKED else 0
        # Half precision rounds each layer differently for other shapes; what is looked for here is
        # a kernel gone wrong, the arithmetic was checked above.
        exact = next(inner.parameters()).dtype in (torch.float32, torch.float64)
        return _difference(model, reached, tolerance=1e-3 if exact else 0.1)


def longrope_boundary(model: PreTrainedModel | nn.Module) -> int | None:
    """Length in tokens at which rotary frequencies change for a whole forward, if they do.

    Rows of at most this many tokens and longer ones never share a pack (Phi-3's longrope).
    """
    for parameters in _rope_parameters(inner_model(model).config.get_text_config()):
        if parameters.get("rope_type") == "longrope":
            return int(parameters["original_max_position_embeddings"])
    return None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tree: TreeLayout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (1, H, T, D), key and value (1, K, T, D).

    Returns (1, T, H, D) and None. Raises CannotPackError for what it does not do.
    """
    if tree is None:
        raise RuntimeError(
            "the attention of packs was called without a tree (a padded batch or a generation "
            "inside packed_attention, or a model that drops the keyword)"
        )
    if attention_mask is not None:
        raise CannotPackError("the model builds an attention mask of its own")
    if dropout:
        raise CannotPackError(f"attention dropout {dropout}")
    if not others.pop("is_causal", True) or not getattr(module, "is_causal", True):
        raise CannotPackError("attention that is not causal")
    for name, given in others.items():
        if name not in _WITHOUT_EFFECT and given is not None and given is not False:
            raise CannotPackError(f"attention keyword {name!r}")
    out = tree_attention(
        query[0],
        key[0],
        value[0],
        tree,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        window=sliding_window,
    )
    return out.transpose(0, 1)[None], None


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside peft's wrappers."""
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    assert inner is not None, "not a transformers model"
    return inner


def _known_obstacle(model: PreTrainedModel, config: PreTrainedConfig) -> str | None:
    """What the config itself says against packs."""
    if getattr(model, "_is_stateful", False):
        return "state-space layers, which carry a state from token to token"
    if strange := sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES):
        return f"layers of type {', '.join(strange)}"
    if getattr(config, "attention_chunk_size", None):
        return "attention in chunks"
    if any("dynamic" in str(p.get("rope_type")) for p in _rope_parameters(config)):
        return "dynamic rotary scaling, which depends on the longest row of a forward"
    return None


def _rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """One entry, or one per layer type."""
    found = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in found.values() if isinstance(p, dict)]
    return nested if nested and "rope_type" not in found else [found]


def _windows(config: PreTrainedConfig) -> dict[str, int]:
    """Settings of the config that are window lengths."""
    return {
        name: length
        for name, length in vars(config).items()
        if name.endswith(("window", "window_size"))
        and isinstance(length, int)
        and not isinstance(length, bool)
        and length > 0
    }


def _scaled_down(model: PreTrainedModel) -> PreTrainedModel | None:
    """A small float32 model of the same class on the CPU, its windows small too, or None."""
    text = model.config.get_text_config()
    types = list(dict.fromkeys(getattr(text, "layer_types", None) or ()))
    layers = max(2, len(types))
    changes: dict[str, Any] = dict.fromkeys(_windows(text), _SMALL_WINDOW)
    changes |= {"num_hidden_layers": layers, "intermediate_size": 64, "vocab_size": 64}
    changes |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    if types:
        changes["layer_types"] = [types[i % len(types)] for i in range(layers)]
    heads = getattr(text, "num_attention_heads", 1)
    groups = heads // (getattr(text, "num_key_value_heads", None) or heads)
    fewer_heads = {"num_attention_heads": 2 * groups, "num_key_value_heads": 2, "head_dim": 16}
    # Heads as they are, where their size is not made of hidden_size; else fewer of them.
    for shape in ({"hidden_size": 64}, {"hidden_size": 32 * groups, **fewer_heads}):
        config = copy.deepcopy(model.config)
        try:
            for name, value in {**changes, **shape}.items():
                if hasattr(config.get_text_config(), name):
                    setattr(config.get_text_config(), name, value)
            small: PreTrainedModel = type(model)._from_config(
                config, dtype=torch.float32, attn_implementation="eager"
            )
            _widen(small.eval())
            small(input_ids=torch.arange(4)[None], use_cache=False)
        # All models, remote code included: what does not fit together shows in any way.
        except Exception:
            continue
        return small
    return None


@torch.no_grad()
def _widen(model: nn.Module) -> None:
    """Larger weights than models begin with: else attention is nearly uniform and hides faults."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)


@torch.no_grad()
def _difference(model: nn.Module, window: int, *, tolerance: float) -> str | None:
    """Why packed logits are not those of the rows, one of which is longer than `window`."""
    lengths = list(_LENGTHS)
    lengths[_LONGEST] = max(lengths[_LONGEST], window + 8 - lengths[0])
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    device = inner_model(model).device
    table = inner_model(model).get_input_embeddings().weight
    assert isinstance(table, Tensor)
    input_ids = torch.randint(len(table), (1, int(offsets[-1]))).to(device)
    layout = tree_layout(offsets, torch.tensor(_PARENTS), device=device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        rows = []
        for segment in sorted(set(range(len(lengths))) - set(_PARENTS)):
            path = []
            above = segment
            while above >= 0:
                path.append(torch.arange(int(offsets[above]), int(offsets[above + 1])))
                above = _PARENTS[above]
            tokens = torch.cat(path[::-1]).to(device)
            rows.append((tokens, model(input_ids=input_ids[:, tokens], use_cache=False).logits[0]))
        packed = _packed_logits(model, input_ids, layout)
    finally:
        for module, mode in modes:
            module.training = mode
    if isinstance(packed, str):
        return packed
    errors = [(packed[tokens] - own).norm() / own.norm() for tokens, own in rows]
    error = torch.stack(errors).max().item()
    return None if error <= tolerance else f"packed logits differ from its own by {error:.2g}"


def _packed_logits(model: nn.Module, input_ids: Tensor, layout: TreeLayout) -> Tensor | str:
    """Logits (T, V) of a pack in evaluation mode, or why there are none."""
    given = {"position_ids": layout.depth[None], "use_cache": False, "tree": layout}
    try:
        with packed_attention(model):
            model.train()  # attention dropout shows here only
            model(input_ids=input_ids, **given)
            model.eval()
            logits: Tensor = model(input_ids=input_ids, **given).logits[0]
            return logits
    except CannotPackError as reason:
        return str(reason)
    except torch.OutOfMemoryError:
        raise
    # The rows went well, so the tree is what this model's code does not bear; it shows in any way.
    except Exception as error:
        return f"a packed forward fails: {(str(error) or repr(error)).splitlines()[0]}"
