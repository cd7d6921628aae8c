"""Every tutorial recipe against myna: the same text, or the tutorial's own defect between the two.

`tutorial_recipes.json` holds, of each recipe, the prompt and answer that the tutorial trains for
the row (SYS, INSTR, INP, OUT), the codes of its defects, its settings, and what myna trains
instead. A `Reading` says which family's template applies, how the row is written for myna, and
which defect makes which difference: each is one replacement in the tutorial's text. After all of
them, and nothing else, both texts are equal.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from tutorial_families import FAMILIES, Family

from myna.data.conversation import Conversation
from myna.data.dataset import Dataset, encode_dataset
from myna.data.encode import Encoder
from myna.data.formats import read_conversations
from myna.data.templates import ChatTemplate, choose_template

GOLDEN: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "tutorial_recipes.json").read_text(encoding="utf-8")
)
SHARED = Path(__file__).parents[2].parent / "shared" / "tutorials" / "recipes.json"

Part = Literal["prompt", "answer"]


@dataclass(frozen=True)
class Repair:
    """One difference: `codes` of the tutorial's defects are why `old` should read `new`."""

    codes: str
    part: Part
    old: str
    new: str


@dataclass(frozen=True)
class Reading:
    """How a recipe is written for myna, and what its defects did to the text."""

    family: str
    repairs: tuple[Repair, ...] = ()
    row: Mapping[str, Any] = field(
        default_factory=lambda: {"instruction": "INSTR", "input": "INP", "output": "OUT"}
    )
    system: str | None = None
    """In place of the recipe's `system_text`."""
    answer: str = "OUT"
    """What OUT of the recipe stands for, where the row holds thought and answer apart."""
    unseen: Mapping[str, str] = field(default_factory=dict)
    """Codes about the text that leave no trace in it here, and why."""


def prompt(codes: str, old: str, new: str) -> Repair:
    return Repair(codes, "prompt", old, new)


def answer(codes: str, old: str, new: str) -> Repair:
    return Repair(codes, "answer", old, new)


ABOUT_TEXT = {
    "assistant_header_supervised",
    "bogus_end_string",
    "bos_missing_in_training",
    "end_token_never_trained",
    "end_token_twice_or_extra",
    "foreign_bos_literal",
    "input_field_dropped",
    "instruction_and_input_glued",
    "newline_lost_by_strip",
    "no_end_token",
    "template_near_miss",
    "template_not_the_models",
}
"""Codes that change the text: each that a recipe has must be behind a repair, or be explained."""

MARKERS = "markers_as_plain_text"
NOT_THE_MODELS = "template_not_the_models"
NEAR_MISS = "template_near_miss"
PERSONA = "现在你要扮演皇帝身边的女人--甄嬛"
EOS = "<｜end▁of▁sentence｜>"
BOS = "<｜begin▁of▁sentence｜>"

GLUED = prompt("instruction_and_input_glued", "INSTRINP", "INSTR\nINP")
ENDS_IN_PAD = answer("end_token_never_trained", "<|endoftext|>", "<|im_end|>")
FOREIGN_BOS = prompt("foreign_bos_literal", "<s>", "")

CHATGLM3 = Reading(
    "chatglm3",
    (
        GLUED,
        # Written as text, the markers got the white space of text; as tokens each is followed by
        # a line break and a space, the answer's too, and by no line break before the next.
        prompt(MARKERS, f"<|system|>\n{PERSONA}\n", f"<|system|>\n {PERSONA}"),
        prompt(MARKERS, "<|user|>\n", "<|user|>\n "),
        prompt(MARKERS, "<|assistant|>\n", "<|assistant|>"),
        answer(MARKERS, "OUT", "\n OUT"),
    ),
)
DEEPSEEK_LLM = Reading(
    "deepseek_llm",
    (
        GLUED,
        prompt("bos_missing_in_training", "User: ", f"{BOS}User: "),
        answer("assistant_header_supervised", "Assistant: ", " "),
        prompt("assistant_header_supervised", "INP\n\n", "INP\n\nAssistant:"),
        answer("end_token_twice_or_extra", EOS + EOS, EOS),
    ),
)
CHATML_WITHOUT_HEADER = (
    GLUED,
    prompt("newline_lost_by_strip", "INP<|im_end|>", "INP<|im_end|>\n"),
    answer("assistant_header_supervised", "<|im_start|>assistant\n", ""),
    prompt(
        "assistant_header_supervised", "INP<|im_end|>\n", "INP<|im_end|>\n<|im_start|>assistant\n"
    ),
)
QWEN = Reading(
    "qwen",
    (
        *CHATML_WITHOUT_HEADER,
        answer("end_token_twice_or_extra", "<|im_end|>\n<|endoftext|>", "<|im_end|>"),
    ),
)
QWEN2 = Reading("qwen2", (GLUED, ENDS_IN_PAD))
QWEN2_5 = Reading("qwen2_5", (GLUED, ENDS_IN_PAD))
# The tutorial's instruction is the expert's role, the same in every row: in myna `system`.
LAW = Reading(
    "qwen2_5", (ENDS_IN_PAD,), row={"instruction": "INP", "output": "OUT"}, system="INSTR"
)
QWEN3 = Reading("qwen3", (GLUED, FOREIGN_BOS, ENDS_IN_PAD))
XTUNER = {"instruction": "INP", "output": "OUT"}
YUAN2 = Reading("yuan2", (prompt("input_field_dropped", "INSTR<sep>", "INSTR\nINP<sep>"),))

READINGS: dict[str, Reading] = {
    "atom-7b-chat-full": Reading(
        "atom",
        (
            GLUED,
            prompt(NOT_THE_MODELS, "Human:\n", "System: "),
            prompt(NOT_THE_MODELS, "问题：INSTR", "问题：\n</s><s>Human: INSTR"),
            prompt("newline_lost_by_strip", "INP</s>", "INP\n</s>"),
            answer("assistant_header_supervised", "<s>Assistant:", ""),
            prompt("assistant_header_supervised", "INP\n</s>", "INP\n</s><s>Assistant:"),
            answer(NOT_THE_MODELS, "OUT", " OUT"),
            answer("bogus_end_string", "<\\s>", ""),
            answer("end_token_never_trained", "OUT\n", "OUT\n</s>"),
        ),
    ),
    "baichuan2-7b-chat-lora": Reading(
        "baichuan2",
        (
            GLUED,
            prompt(NOT_THE_MODELS, "<|im_start|>system\n", ""),
            prompt(NOT_THE_MODELS, "<|im_end|>\n<|im_start|>user\n", "<reserved_106>"),
            prompt(NOT_THE_MODELS, "<|im_end|>\n\nAssistant: ", "<reserved_107>"),
        ),
    ),
    "bluelm-7b-chat-lora": Reading("bluelm", (GLUED,)),
    "chatglm3-6b-lora": CHATGLM3,
    "chatglm3-6b-pipeline-lora": CHATGLM3,
    "deepseek-llm-7b-chat-lora": DEEPSEEK_LLM,
    "deepseek-llm-7b-chat-qlora": DEEPSEEK_LLM,
    "deepseek-coder-v2-lite-instruct-lora": Reading(
        "deepseek_llm",
        (
            GLUED,
            prompt(NEAR_MISS, "\nUser:", "\n\nUser:"),
            prompt(NEAR_MISS, "\nAssistant:", "\n\nAssistant:"),
            answer(NEAR_MISS, "OUT", " OUT"),
            answer("end_token_twice_or_extra", EOS + EOS, EOS),
        ),
    ),
    "glm-4-9b-chat-lora": Reading(
        # The line break is the answer's: the generation prompt ends with <|assistant|>.
        "glm4",
        (GLUED, answer("newline_lost_by_strip", "OUT", "\nOUT")),
    ),
    "glm-4.5-air-lora": Reading(
        "glm4_5",
        (
            GLUED,
            prompt(NEAR_MISS, "INP<|assistant|>", "INP/nothink<|assistant|>"),
            prompt(NEAR_MISS, "</think>\n", "</think>"),
            answer(NEAR_MISS, "OUT", "\nOUT"),
            answer("no_end_token", "OUT", "OUT<|endoftext|>"),
        ),
    ),
    "glm-4.1v-9b-thinking-lora": Reading(
        "glm4_1v",
        (
            GLUED,
            prompt(NEAR_MISS, "<think></think>\n", ""),
            answer("no_end_token", "OUT", "OUT<|endoftext|>"),
        ),
    ),
    "gemma-2b-it-lora": Reading(
        "gemma",
        (
            GLUED,
            prompt(
                NOT_THE_MODELS,
                f"<start_of_turn>system\n{PERSONA}<end_of_turn>\n<start_of_turn>user\n",
                f"<start_of_turn>user\n{PERSONA}\n\n",
            ),
            prompt("bos_missing_in_training", "<start_of_turn>user", "<bos><start_of_turn>user"),
            answer(
                "bogus_end_string end_token_twice_or_extra", "<end_of_turn>model", "<end_of_turn>"
            ),
        ),
    ),
    "gemma-3-4b-it-lora": Reading(
        "gemma3",
        (
            GLUED,
            prompt("foreign_bos_literal", "<s>", "<bos>"),
            prompt(
                NOT_THE_MODELS,
                f"<|im_start|>system\n{PERSONA}<|im_end|>\n<|im_start|>user\n",
                f"<start_of_turn>user\n{PERSONA}\n\n",
            ),
            prompt(
                NOT_THE_MODELS,
                "<|im_end|>\n<|im_start|>assistant\n",
                "<end_of_turn>\n<start_of_turn>model\n",
            ),
            answer("end_token_never_trained", "<pad>", "<end_of_turn>"),
        ),
    ),
    "internlm2-chat-7b-xtuner-qlora": Reading("internlm2", row=XTUNER | {"system": "SYS"}),
    "amchat-internlm2-math-7b-xtuner-qlora": Reading("internlm2", row=XTUNER),
    "tianji-internlm2-chat-7b-xtuner-qlora": Reading("internlm2", row=XTUNER | {"system": "SYS"}),
    "llama3-8b-instruct-lora": Reading(
        "llama3",
        (
            GLUED,
            prompt(
                "bos_missing_in_training",
                "<|start_header_id|>user",
                "<|begin_of_text|><|start_header_id|>user",
            ),
            answer("end_token_twice_or_extra", "<|eot_id|><|end_of_text|>", "<|eot_id|>"),
        ),
    ),
    "minicpm-2b-sft-lora": Reading(
        "minicpm",
        (GLUED,),
        unseen={
            "bos_missing_in_training": "the model's template writes none either; myna says so, and "
            "sends the same without it when it serves"
        },
    ),
    "qwen-7b-chat-lora": QWEN,
    "qwen-7b-chat-ptuning": QWEN,
    "qwen-7b-chat-full": QWEN,
    "qwen-7b-chat-lora-8bit": QWEN,
    "qwen-7b-chat-qlora-4bit": QWEN,
    "qwen1.5-7b-chat-lora": QWEN2,
    "qwen1.5-7b-chat-lora-swanlab": QWEN2,
    "qwen2-7b-instruct-lora": QWEN2,
    "qwen2.5-7b-instruct-lora": QWEN2_5,
    "qwen2.5-7b-instruct-law-lora": LAW,
    "qwen2.5-coder-7b-instruct-lora": QWEN2_5,
    "qwen2.5-coder-7b-instruct-law-lora": LAW,
    "qwen3-8b-lora": QWEN3,
    "qwen3-30b-a3b-lora": QWEN3,
    "qwen3-0.6b-extraction-lora": Reading(
        "qwen3",
        QWEN3.repairs,
        row={"system": "SYS", "instruction": "INSTR", "input": "INP", "output": "OUT"},
    ),
    "qwen3-1.7b-medical-full": Reading(
        "qwen3",
        (ENDS_IN_PAD,),
        row={
            "messages": [
                {"role": "user", "content": "INP"},
                {"role": "assistant", "content": "ANSWER", "reasoning_content": "THINK"},
            ]
        },
        # The tutorial's data spells it "<think>THINK</think> \n ANSWER"; myna takes the two apart
        # and writes them as the model's template does.
        answer="<think>\nTHINK\n</think>\n\nANSWER",
    ),
    "transnormerllm-7b-lora": Reading(
        # A base model: nothing is the model's own, and myna refuses to guess.
        "alpaca",
        (
            GLUED,
            prompt(NOT_THE_MODELS, "<|im_start|>system\n", ""),
            prompt(NOT_THE_MODELS, "<|im_end|>\n<|im_start|>user\n", "\n\n### Instruction:\n"),
            prompt(NOT_THE_MODELS, "<|im_end|>\n<|im_start|>assistant\n", "\n\n### Response:\n"),
        ),
    ),
    "yi-6b-chat-lora": Reading(
        "yi",
        (
            *CHATML_WITHOUT_HEADER,
            answer("end_token_twice_or_extra", "<|im_end|>\n<unk>", "<|im_end|>"),
        ),
    ),
    "yuan2-2b-mars-lora-bf16": YUAN2,
    "yuan2-2b-mars-lora-fp16": YUAN2,
    "phi-3-mini-4k-instruct-lora": Reading(
        "phi3",
        (
            GLUED,
            answer("end_token_twice_or_extra", "<|end|>\n<|endoftext|>", "<|end|>"),
        ),
    ),
}

each_recipe = pytest.mark.parametrize("recipe", GOLDEN, ids=lambda recipe: recipe["name"])


@dataclass(frozen=True)
class Trained:
    """The one row of a recipe as myna trains it."""

    dataset: Dataset
    family: Family
    conversation: Conversation
    template: ChatTemplate

    @property
    def texts(self) -> dict[Part, str]:
        (example,) = self.dataset.examples
        return {"prompt": example.prompt_text, "answer": example.completion_text}


def train(recipe: dict[str, Any], tmp_path: Path) -> Trained:
    reading = READINGS[recipe["name"]]
    family = FAMILIES[reading.family]
    tokenizer = family.tokenizer()
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(dict(reading.row)), encoding="utf-8")
    rows = read_conversations([path])
    of_the_data = recipe["system_text"] == "SYS"
    template = choose_template(tokenizer, family.model_type, override=family.built_in)
    encoder = Encoder(
        tokenizer,
        template,
        stop_ids=family.stop_ids(tokenizer),
        system=reading.system or (None if of_the_data else recipe["system_text"]),
    )
    dataset = encode_dataset(encoder, rows)
    (conversation,) = rows.conversations
    messages = encoder._with_system(conversation.messages)
    conversation = Conversation(tuple(messages), conversation.place)
    return Trained(dataset, family, conversation, template)


@each_recipe
def test_prompt_and_answer_are_the_tutorials_but_for_its_own_defects(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    reading = READINGS[recipe["name"]]
    stated = set(recipe["defects"])
    texts: dict[Part, str] = {"prompt": recipe["prompt_text"], "answer": recipe["response_text"]}
    used: Counter[str] = Counter()
    for repair in reading.repairs:
        codes = repair.codes.split()
        assert stated.issuperset(codes), f"{repair}: not among the defects of the recipe"
        assert texts[repair.part].count(repair.old) == 1, repair
        texts[repair.part] = texts[repair.part].replace(repair.old, repair.new)
        used.update(codes)
    texts["answer"] = texts["answer"].replace("OUT", reading.answer)
    assert train(recipe, tmp_path).texts == texts
    # Nothing that the recipe is said to do to the text is left unexplained.
    assert stated & ABOUT_TEXT == (used.keys() & ABOUT_TEXT) | reading.unseen.keys()


@each_recipe
def test_what_is_trained_is_the_golden_text_and_what_a_server_sends(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    trained = train(recipe, tmp_path)
    assert trained.texts == {"prompt": recipe["myna_prompt"], "answer": recipe["myna_completion"]}
    (example,) = trained.dataset.examples
    tokenizer = trained.dataset.tokenizer
    bos = tokenizer.bos_token_id
    *before, last = trained.conversation.messages
    if trained.template.folds_system and before[0].role == "system":
        # A client of such a model puts the persona into its question.
        text = f"{before[0].content}\n\n{before[1].content}"
        messages = [{"role": "user", "content": text}]
    else:
        messages = [message.as_template_input() for message in before]
    options = {"enable_thinking": last.reasoning is not None}
    served = tokenizer.apply_chat_template(
        messages,
        chat_template=trained.template.source,
        add_generation_prompt=True,
        tokenize=True,
        **options,
    )["input_ids"]
    assert list(example.prompt_ids) == served
    ids = example.prompt_ids + example.completion_ids
    assert tokenizer.decode(ids) == recipe["myna_prompt"] + recipe["myna_completion"]
    stops = set(trained.family.stop_ids(tokenizer)) | {tokenizer.eos_token_id}
    stops |= set(tokenizer.convert_tokens_to_ids(["<end_of_turn>"]))
    assert example.completion_ids[-1] in stops
    assert stops.isdisjoint(example.completion_ids[:-1])
    if bos is not None and READINGS[recipe["name"]].family != "atom":
        assert ids.count(bos) == (ids[0] == bos)


def test_no_recipe_is_left_out() -> None:
    assert len(GOLDEN) == len(READINGS) == 39
    assert {recipe["name"] for recipe in GOLDEN} == READINGS.keys()


@each_recipe
def test_the_golden_facts_are_those_of_the_collection(recipe: dict[str, Any]) -> None:
    if not SHARED.exists():
        pytest.skip("../shared/tutorials is not beside the repository")
    recipes = {found["name"]: found for found in json.loads(SHARED.read_text(encoding="utf-8"))}
    assert recipes.keys() == READINGS.keys()
    facts = {key: value for key, value in recipe.items() if not key.startswith("myna_")}
    found = recipes[recipe["name"]]
    assert facts == {key: found[key] for key in facts}


def test_a_model_without_bos_in_its_template_is_trained_without_and_the_run_says_so(
    tmp_path: Path,
) -> None:
    (minicpm,) = [recipe for recipe in GOLDEN if recipe["name"] == "minicpm-2b-sft-lora"]
    said = 'the chat template writes no "<s>"; servers add none'
    assert any(note.startswith(said) for note in train(minicpm, tmp_path).dataset.notes)
