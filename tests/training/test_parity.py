"""A step computed as packs against the textbook: padded rows in transformers and peft, in float64.

Everything that a step goes through is ours on one side (trees, packs, attention, fused layers, the
head without logits), and nothing of ours on the other but BlueLM's model code.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from myna.data.conversation import Place
from myna.data.packing import pack_step
from myna.data.store import Example
from myna.lora.fused import fuse
from myna.models.bluelm import BlueLMConfig, BlueLMForCausalLM
from myna.models.frozen import fuse_frozen
from myna.training.computation import Packed, Padded, choose_computation
from myna.training.events import EventLog
from myna.training.fit import FitSettings, fit

CPU = torch.device("cpu")
PLACE = Place(Path("rows.jsonl"), 1, 1)
VOCABULARY = 50

WINDOW = 6
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}
# Where a family has windowed and whole layers, one of each.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "Qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "Mistral": {"sliding_window": WINDOW},
    "Gemma2": {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "Gemma3": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi3": {"sliding_window": WINDOW},
    "Glm4": {"head_dim": 8},
    "BlueLM": {"use_stable_embedding": True, "num_key_value_heads": 4},
    "Phi3 longrope": {
        "max_position_embeddings": 80,
        "original_max_position_embeddings": 40,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [3.0] * 4,
            "original_max_position_embeddings": 40,
        },
    },
}
PLAIN = [family for family in FAMILIES if family != "Phi3 longrope"]


def row(prompt: Sequence[int], completion: Sequence[int]) -> Example:
    return Example("", "", tuple(prompt), tuple(completion), PLACE, 1)


def ids(number: int, seed: int) -> tuple[int, ...]:
    """`number` random ids; different seeds begin with different ids."""
    draw = torch.Generator().manual_seed(seed)
    rest = torch.randint(3, VOCABULARY, (number,), generator=draw).tolist()
    return (3 + seed % (VOCABULARY - 3), *rest)[:number]


def three_levels() -> list[Example]:
    """A system prompt, questions below it, answers and a second turn below those."""
    system = ids(9, 1)
    first, second = system + ids(6, 2), system + ids(3, 3)
    turn = first + ids(4, 4) + ids(5, 5)
    return [
        row(first, ids(4, 4)),
        row(first, ids(12, 6)),
        row(turn, ids(9, 7)),
        row(turn, ids(2, 8)),
        row(second, ids(7, 9)),
        row(second, (*ids(7, 9)[:5], 40, 41)),
        row(ids(5, 10), ids(8, 11)),
    ]


SHAPES: dict[str, list[Example]] = {
    "flat": [row(ids(a, 10 + a), ids(b, 30 + b)) for a, b in ((5, 8), (20, 20), (11, 3), (2, 17))],
    "shared prefix": [row(ids(14, 1) + ids(a, 5 + a), ids(b, b)) for a, b in
                      ((3, 9), (8, 18), (0, 4), (5, 5), (1, 21))],
    "three levels": three_levels(),
    "duplicates": [row(ids(12, 1), ids(6, 2))] * 3
    + [row(ids(8, 3), ids(9, 4))] * 2
    + [row(ids(12, 1), ids(10, 2)), row(ids(12, 1)[:7], ids(12, 1)[7:])],
    "one-token answers": [row(ids(a, 1)[:a], (b,)) for a, b in ((12, 5), (12, 6), (3, 7), (40, 2))]
    + [row(ids(9, 4), (2,))],
    "extreme lengths": [row((7,), (9,)), row(ids(1, 2), ids(39, 3)), row((7,), (8,)),
                        row(ids(39, 4), (2,)), row((11,), (2,))],
}  # fmt: skip


@cache
def adapted(family: str, dropout: float = 0.0, layers: int = 2) -> PeftModel:
    """A tiny model of `family` in float32 with peft's own layers; both factors of B A are random.

    At B = 0 every gradient of A is zero. The base's weights are so large that attention is far from
    uniform, and its biases and norms are not what they are in a new model (0 and 1).
    """
    shape = {**SHAPE, "num_hidden_layers": layers, **FAMILIES[family]}
    name = family.split()[0]
    if name == "BlueLM":
        config, kind = BlueLMConfig(**shape), BlueLMForCausalLM
    else:
        config_name = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
        config = getattr(transformers, config_name)(**shape)
        kind = getattr(transformers, f"{name}ForCausalLM")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        lora = LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        peft_model = get_peft_model(model, lora)
        for name, parameter in peft_model.named_parameters():
            if "lora_A" in name:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif "lora_B" in name:
                parameter.normal_(0, 0.02)
    return peft_model.train()


@cache
def textbook(family: str) -> PeftModel:
    return copy.deepcopy(adapted(family)).double()


@cache
def ours(family: str, dropout: float = 0.0, layers: int = 2) -> tuple[PeftModel, Packed]:
    """The model as `myna train` prepares it, and how it computes: packed, with no fallback."""
    model = copy.deepcopy(adapted(family, dropout, layers))
    assert fuse(model) == sum("lora_A" in name for name, _ in model.named_parameters())
    fuse_frozen(model)
    computation, how = choose_computation(
        model, micro_batch_size=None, padded_rows=4, pad_id=0, device=CPU
    )
    assert isinstance(computation, Packed), how
    assert how == "packs of shared prefixes, checked against the model's own attention"
    return model, computation


Step = tuple[float, dict[str, Tensor]]
"""The loss of a step and its gradients."""


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


class InFloat64(TorchFunctionMode):
    """Leaves nothing in float32, whatever the model's code asks for.

    transformers makes softmax, norms and rotations in float32 even for a model in float64. That is
    rounding in the reference, and NaN besides: the float64 mask of a padded query that sees
    nothing (windows) is -inf in float32.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func = Tensor.double if func is Tensor.float else func
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        given = {
            name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()
        }
        return func(*args, **given)


def textbook_step(family: str, rows: Sequence[Example], *, alone: bool = False) -> Step:
    """Rows padded together (or each alone), transformers' and peft's forward, torch's loss."""
    model = textbook(family)
    total, trained = torch.zeros((), dtype=torch.float64), 0
    for batch in [[one] for one in rows] if alone else [rows]:
        input_ids, mask, labels = padded(batch)
        with InFloat64():
            logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        assert logits.dtype == torch.float64
        total = total + summed_cross_entropy(logits, labels)
        trained += int((labels != -100).sum())
    loss = total / trained
    loss.backward()
    return loss.item(), gradients(model)


def padded(rows: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels, padded on the right as in the textbook."""
    width = max(len(r.prompt_ids) + len(r.completion_ids) for r in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for line, example in enumerate(rows):
        whole = torch.tensor([*example.prompt_ids, *example.completion_ids])
        input_ids[line, : len(whole)], mask[line, : len(whole)] = whole, 1
        start = len(example.prompt_ids)
        labels[line, start : len(whole)] = whole[start:]
    return input_ids, mask, labels


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    predicted, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(predicted, wanted, ignore_index=-100, reduction="sum")


def packed_step(family: str, rows: Sequence[Example], budget: int | None = None) -> Step:
    """The same rows as `fit` computes them; with a `budget`, in packs of so many tokens."""
    model, computation = ours(family)
    if budget is not None:
        computation = computation.cut_at(budget)
    pieces = computation.pieces(rows, range(len(rows)))
    trained = sum(len(r.completion_ids) for r in rows)
    total = 0.0
    with computation.prepared(model):
        for piece in pieces:
            loss = computation.summed_loss(model, piece) / trained
            loss.backward()
            total += loss.item()
    return total, gradients(model)


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Of every tensor |g - g0| / |g0|."""
    assert found.keys() == wanted.keys() and wanted
    return {
        name: ((found[name].double() - g).norm() / g.double().norm()).item()
        for name, g in wanted.items()
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", PLAIN)
def test_a_packed_step_is_the_textbooks(family: str, shape: str) -> None:
    rows = SHAPES[shape]
    loss, found = packed_step(family, rows)
    wanted_loss, wanted = textbook_step(family, rows)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    worst = max(errors(found, wanted).items(), key=lambda item: item[1])
    assert worst[1] <= 1e-5, worst


@st.composite
def forests(draw: st.DrawFn) -> list[Example]:
    """Rows that go on from a part of an earlier one, with several answers and duplicates.

    The ids are random ones out of few beginnings, so that rows share by chance as well. (Rows drawn
    id by id shrink to one token repeated, whose gradients cancel: float32 itself loses 1e-5 there.)
    """
    sizes = st.one_of(st.integers(1, 4), st.integers(1, 25))
    seeds = st.integers(0, 5)
    rows: list[Example] = []
    for _ in range(draw(st.integers(1, 6))):
        start: tuple[int, ...] = ()
        if rows and draw(st.booleans()):
            earlier = draw(st.sampled_from(rows))
            whole = earlier.prompt_ids + earlier.completion_ids
            start = whole[: draw(st.integers(0, len(whole)))]
        prompt = (*start, *ids(draw(sizes), draw(seeds)))
        for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
            answer = ids(draw(st.integers(1, 8)), draw(seeds))
            rows += [row(prompt, answer)] * draw(st.sampled_from([1, 1, 1, 2]))
    return rows


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_long_prefix_is_multiplied_as_it_lies_and_is_exact(family: str) -> None:
    """Long segments, and short ones with many descendants, take other products than short rows."""
    prefix = ids(320, 1)
    rows = [row(prefix + ids(a, a), ids(a % 7 + 1, 20 + a)) for a in range(1, 30, 4)]
    loss, found = packed_step(family, rows)
    wanted_loss, wanted = textbook_step(family, rows)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert max(errors(found, wanted).values()) <= 1e-5


def check_forest(family: str, rows: list[Example]) -> None:
    loss, found = packed_step(family, rows)
    wanted_loss, wanted = textbook_step(family, rows)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    # Queries and keys have no gradient where every token sees itself only, and next to none where
    # most do: beside 1e-5 of its own, a tensor may have the rounding of the whole gradient.
    rounding = 1e-7 * torch.stack([g.norm() for g in wanted.values()]).norm()
    for name, g in wanted.items():
        assert (found[name] - g).norm() <= 1e-5 * g.norm() + rounding, name


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(rows=forests())
def test_any_forest_of_rows(family: str, rows: list[Example]) -> None:
    check_forest(family, rows)


@pytest.mark.full
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@settings(max_examples=500, deadline=None, derandomize=True)
@given(rows=forests())
def test_many_forests_of_rows(family: str, rows: list[Example]) -> None:
    check_forest(family, rows)


def test_rows_on_both_sides_of_longropes_boundary_keep_their_frequencies() -> None:
    """Alone in the textbook: padded together, short rows would get the frequencies of long ones."""
    system = ids(6, 1)
    rows = [row(system + ids(a, a), ids(b, b)) for a, b in ((2, 3), (5, 20), (10, 40), (30, 13))]
    assert ours("Phi3 longrope")[1].length_boundary == 40
    loss, found = packed_step("Phi3 longrope", rows)
    wanted_loss, wanted = textbook_step("Phi3 longrope", rows, alone=True)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert max(errors(found, wanted).values()) <= 1e-5


def test_a_row_just_over_longropes_boundary_does_not_depend_on_its_company() -> None:
    edge, longer = row(ids(36, 1), ids(5, 2)), row(ids(36, 3), ids(20, 4))
    together = packed_step("Phi3 longrope", [edge, longer])[0]
    alone = [5 * packed_step("Phi3 longrope", [edge])[0]]
    alone += [20 * packed_step("Phi3 longrope", [longer])[0]]
    assert together == pytest.approx(sum(alone) / 25, rel=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_step_cut_into_packs_has_the_same_gradients(family: str) -> None:
    rows = [*SHAPES["three levels"], *SHAPES["shared prefix"], *SHAPES["duplicates"]]
    budgets: dict[int, int] = {}
    for budget in range(250, 40, -1):
        packs = len(pack_step(rows, range(len(rows)), token_budget=budget))
        budgets.setdefault(packs, budget)
    loss, whole = packed_step(family, rows, budgets[1])
    exact = textbook_step(family, rows)[1]
    for number in (2, 5):
        cut_loss, cut = packed_step(family, rows, budgets[number])
        assert cut_loss == pytest.approx(loss, rel=1e-6)
        assert max(errors(cut, whole).values()) <= 1e-5
        assert max(errors(cut, exact).values()) <= 1e-5


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_with_dropout_a_packs_gradients_are_finite_differences_of_its_loss(family: str) -> None:
    """One drawing of the masks, in float64: the backward uses the masks of the forward."""
    model, computation = ours(family, dropout=0.1)
    model = copy.deepcopy(model).double()
    (pack,) = computation.pieces(SHAPES["three levels"], range(7))

    def loss(seed: int = 3) -> Tensor:
        torch.manual_seed(seed)
        with computation.prepared(model), InFloat64():
            return computation.summed_loss(model, pack)

    loss().backward()
    assert abs(loss(4).item() - loss().item()) > 1e-4, "no dropout"
    parameters = dict(model.named_parameters())
    draw = torch.Generator().manual_seed(5)
    step = 1e-4  # errors: step ** 2, and 1e-16 / step
    for name, gradient in gradients(model).items():
        direction = torch.randn(gradient.shape, generator=draw, dtype=torch.float64)
        direction /= direction.norm()
        with torch.no_grad():
            parameters[name] += step * direction
            above = loss().item()
            parameters[name] -= 2 * step * direction
            below = loss().item()
            parameters[name] += step * direction
        slope = (above - below) / (2 * step)
        assert abs(slope - (gradient * direction).sum()) <= 1e-6 * gradient.norm(), name


def squared_distance(one: Tensor, other: Tensor) -> float:
    """Of the means of two samples (N, P), in units of what it is if they mean the same."""
    apart = (one.mean(0) - other.mean(0)).square().sum()
    return (apart / (one.var(0).sum() / len(one) + other.var(0).sum() / len(other))).item()


def test_rows_that_share_dropout_have_the_gradients_of_rows_that_do_not_on_average() -> None:
    """Many seeds of a pack of four answers to one prompt, against peft's own dropout on rows.

    Every row sees masks of the same distribution, and a step's gradient is the sum of its rows', so
    this holds whatever the model.
    """
    rows = [row(ids(6, 1), ids(number, number)) for number in (1, 2, 3, 4)]
    model, computation = ours("Llama", dropout=0.3, layers=1)
    plain = copy.deepcopy(adapted("Llama", dropout=0.3, layers=1))
    for one in (model, plain):
        with torch.no_grad():  # large, so that dropout is most of what there is
            for name, parameter in one.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(adapted("Llama", 0.3, 1).get_parameter(name) * 20)
    (pack,) = computation.pieces(rows, range(4))
    input_ids, mask, labels = padded(rows)

    def shared() -> Tensor:
        with computation.prepared(model):
            return computation.summed_loss(model, pack)

    def unshared() -> Tensor:
        logits = plain(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        return summed_cross_entropy(logits, labels)

    def sample(loss: Callable[[], Tensor], which: nn.Module, seeds: range) -> Tensor:
        """(N, 1 + P): loss and gradients."""
        found = []
        for seed in seeds:
            torch.manual_seed(seed)
            value = loss()
            value.backward()
            parts = [value.detach()[None], *(g.flatten() for g in gradients(which).values())]
            found.append(torch.cat(parts).double())
        return torch.stack(found)

    together = sample(shared, model, range(300))
    apart = sample(unshared, plain, range(1000, 1300))
    assert squared_distance(together, apart) < 2
    assert squared_distance(together[:, :1], apart[:, :1]) < 9  # the loss alone: 3 deviations
    plain.eval()  # that this can fail: without dropout the mean is another one
    assert squared_distance(together, sample(unshared, plain, range(2))) > 20


def fit_settings(steps: int, rows: int) -> FitSettings:
    return FitSettings(
        epochs=steps,
        max_steps=None,
        batch_size=rows,
        learning_rate=1e-2,
        schedule="constant",
        warmup_steps=0,
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=1,
        save_steps=1000,
        keep_checkpoints=2,
    )


def chunked() -> tuple[nn.Module, list[str]]:
    config = transformers.Llama4TextConfig(
        **SHAPE,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=8,
        attn_implementation="eager",
    )
    return transformers.Llama4ForCausalLM(config), ["q_proj", "k_proj", "v_proj", "o_proj"]


def state_space() -> tuple[nn.Module, list[str]]:
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4
    )
    return transformers.MambaForCausalLM(config), ["in_proj", "x_proj"]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (chunked, "layers of type chunked_attention"),
        (state_space, "state-space layers, which carry a state from token to token"),
    ],
)
def test_what_cannot_be_packed_trains_padded_as_the_textbook_does(
    make: Callable[[], tuple[nn.Module, list[str]]], reason: str
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        base, targets = make()
        lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        theirs: Any = get_peft_model(base, lora).train()
    mine = copy.deepcopy(theirs)
    fuse(mine)
    computation, how = choose_computation(
        mine, micro_batch_size=2, padded_rows=4, pad_id=0, device=CPU
    )
    assert computation == Padded(2, 0, CPU, limit_is_set=True)
    assert how == f"padded batches, because this model cannot be packed: {reason}"

    rows = SHAPES["three levels"]
    with EventLog(None) as events:
        result = fit(
            mine,
            rows,
            [],
            fit_settings(3, len(rows)),
            computation=computation,
            device=CPU,
            events=events,
        )
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    input_ids, mask, labels = padded(rows)
    losses = []
    for _ in range(3):
        logits = theirs(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        loss = summed_cross_entropy(logits, labels) / (labels != -100).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert result.losses == pytest.approx(losses, rel=1e-5)
    for name, parameter in mine.named_parameters():
        if parameter.requires_grad:
            assert (parameter - trained[name]).norm() <= 1e-4 * trained[name].norm(), name


def saved_bytes(rows: Sequence[Example], layers: int) -> int:
    """What the forward of a pack keeps for the backward, weights apart."""
    model, computation = ours("Llama", 0.1, layers)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    (pack,) = computation.pieces(rows, range(len(rows)))
    with (
        computation.prepared(model),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        loss = computation.summed_loss(model, pack)
    assert loss.requires_grad
    return sum(kept.values())


def bytes_per_layer(rows: Sequence[Example]) -> int:
    return saved_bytes(rows, 3) - saved_bytes(rows, 2)


def test_what_a_layer_keeps_grows_with_computed_tokens_not_with_rows_times_prefix() -> None:
    prefix = ids(1500, 1)
    answers = [row(prefix, (*ids(60, 2 + number), 2)) for number in range(16)]
    computed = 1500 + 16 * 60
    shared = bytes_per_layer(answers)
    one_row = bytes_per_layer([row(ids(computed, 1), (2,))])
    rows_apart = 16 * bytes_per_layer(answers[:1])
    assert shared <= 1.05 * one_row
    assert shared <= 1.05 * computed / (16 * 1560) * rows_apart
