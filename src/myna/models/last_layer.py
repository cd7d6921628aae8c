"""The last decoder layer of a packed forward, its MLP at predicting positions only.

Owns which models that is and the layer's forward: above the last attention nothing looks at other
positions again, and what is computed there for positions without a target reaches no loss. A layer
is taken over only if it is built as Llama's and gives the same hidden states on random tokens.
"""

# mypy: allow-untyped-calls
# (transformers annotates its arguments but few of its return types.)

from typing import Any

import torch
from torch import Tensor, nn

from myna.models.packed import inner_model, packed_attention
from myna.ops.attention import tree_layout

_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_TOLERANCE = 2e-2
"""Half precision rounds products of fewer rows differently; another residual shows far above."""


def shorten_last_layer(model: nn.Module) -> bool:
    """Let packed forwards with `predicting=` positions end in those positions only.

    `predicting` (P,) int64, positions of the pack, each once; the decoder's last hidden state then
    has shape (1, P, D), in their order. Forwards without it are as before. False, and nothing is
    changed, where the last layer is not built as Llama's (Touvron et al. 2023, section 2.2) or does
    not give the same. `model` (a causal language model that can be packed, may be wrapped by peft)
    keeps its objects, parameters and state. Calling it twice changes nothing.
    """
    layers = getattr(inner_model(model).get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return False
    layer = layers[-1]
    if hasattr(layer, "_is_shortened"):
        return True
    others = set(dict(layer.named_children())) - _PARTS
    if not hasattr(layer, "mlp") or not all(_is_idle(getattr(layer, name)) for name in others):
        return False
    before = type(layer)
    layer.__class__ = type(
        before.__name__,
        (before,),
        {"forward": _forward_of(before), "_is_shortened": True},
    )
    if not _gives_the_same(model):
        layer.__class__ = before
        return False
    return True


def _is_idle(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.p == 0


def _forward_of(whole: type) -> Any:
    """Of a class built on `whole`."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        *args: Any,
        predicting: Tensor | None = None,
        **others: Any,
    ) -> Any:
        if predicting is None:
            return whole.forward(self, hidden_states, *args, **others)  # type: ignore[attr-defined]
        assert not args, "transformers hands these on by name"
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **others)[0]
        hidden = (hidden_states + attended).index_select(1, predicting)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    return forward


@torch.no_grad()
def _gives_the_same(model: nn.Module) -> bool:
    """Whether hidden states at some positions of a small tree are those of the whole layer."""
    inner = inner_model(model)
    device = inner.device
    table = inner.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    draw = torch.Generator().manual_seed(0)
    layout = tree_layout(torch.tensor([0, 5, 9, 12]), torch.tensor([-1, 0, 0]), device=device)
    given: dict[str, Any] = {
        "input_ids": torch.randint(len(table), (1, 12), generator=draw).to(device),
        "position_ids": layout.depth[None],
        "use_cache": False,
        "tree": layout,
    }
    predicting = torch.tensor([3, 8, 10, 11], device=device)
    decoder: Any = inner.get_decoder()
    was_training = model.training
    model.eval()
    try:
        with packed_attention(model):
            whole = decoder(**given).last_hidden_state[:, predicting].float()
            short = decoder(**given, predicting=predicting).last_hidden_state.float()
    # Architectures differ without end: whatever a forward raises, the layer is not taken over.
    except Exception:
        return False
    finally:
        model.train(was_training)
    return short.shape == whole.shape and bool((short - whole).norm() <= _TOLERANCE * whole.norm())
