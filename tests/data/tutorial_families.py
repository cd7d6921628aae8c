"""The families of the tutorial recipes: a chat template and the control tokens of each, tiny.

The vocabulary is that of all bytes, so that any text can be written; what a family's real tokenizer
has beyond that are its control tokens, and those are here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SHIPPED = Path(__file__).parent / "family_templates"
"""Templates that the tokenizers of the hub ship."""
BUILT_IN = Path(__file__).parents[2] / "src" / "myna" / "data" / "builtin_templates"
"""Templates for models that ship none."""


@dataclass(frozen=True)
class Family:
    """What decides the text of a family's prompts and answers."""

    template: Path
    eos: str
    bos: str | None = None
    pad: str | None = None
    unk: str | None = None
    control: tuple[str, ...] = ()
    """Special tokens beside those named above."""
    added: tuple[str, ...] = ()
    """Added tokens that are not marked special."""
    stops: tuple[str, ...] = ()
    """What the model's generation_config.json names as its ends beside `eos`."""
    model_type: str | None = None
    adds_bos: bool = False
    """Whether plain text gets the BOS in front, as sentencepiece tokenizers mostly do."""

    def tokenizer(self) -> Any:
        """The control tokens over single bytes, with a template where the hub's have one."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({token: n for n, token in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        named = {"eos": self.eos, "bos": self.bos, "pad": self.pad, "unk": self.unk}
        special = {f"{name}_token": token for name, token in named.items() if token}
        backend.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False)
                for token in dict.fromkeys([*special.values(), *self.control])
            ]
        )
        if self.adds_bos:
            assert self.bos, "a BOS that is added has a name"
            backend.post_processor = processors.TemplateProcessing(
                single=f"{self.bos} $A",
                special_tokens=[(self.bos, backend.token_to_id(self.bos))],
            )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in self.added])
        if self.template.parent == SHIPPED:
            tokenizer.chat_template = self.template.read_text(encoding="utf-8")
        return tokenizer

    @property
    def built_in(self) -> str | None:
        """What `template:` has to name, for models whose type says too little."""
        is_ours = self.template.parent == BUILT_IN and self.model_type is None
        return self.template.stem if is_ours else None

    def stop_ids(self, tokenizer: Any) -> Sequence[int]:
        """Ids of `eos` and `stops`: what `load_tokenizer` finds in the files of such a model."""
        ids: list[int] = tokenizer.convert_tokens_to_ids([self.eos, *self.stops])
        return ids


CHATML = ("<|im_start|>", "<|im_end|>")
GLM = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "[gMASK]")
THINK = ("<think>", "</think>")

FAMILIES: dict[str, Family] = {
    "atom": Family(
        BUILT_IN / "atom.jinja", eos="</s>", bos="<s>", pad="</s>", unk="<unk>", adds_bos=True
    ),
    "baichuan2": Family(
        BUILT_IN / "baichuan2.jinja",
        eos="</s>",
        bos="<s>",
        unk="<unk>",
        control=("<reserved_106>", "<reserved_107>"),
        model_type="baichuan",
    ),
    "bluelm": Family(
        BUILT_IN / "bluelm.jinja",
        eos="</s>",
        bos="<s>",
        pad="<pad>",
        unk="<unk>",
        control=("[|Human|]:", "[|AI|]:"),
        model_type="BlueLM",
        adds_bos=True,
    ),
    "chatglm3": Family(
        SHIPPED / "chatglm3.jinja", eos="</s>", pad="<unk>", unk="<unk>", control=GLM
    ),
    "deepseek_llm": Family(
        SHIPPED / "deepseek_llm.jinja",
        eos="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        pad="<｜end▁of▁sentence｜>",
        adds_bos=True,
    ),
    "gemma": Family(
        SHIPPED / "gemma.jinja",
        eos="<eos>",
        bos="<bos>",
        pad="<pad>",
        unk="<unk>",
        control=("<start_of_turn>", "<end_of_turn>"),
        adds_bos=True,
    ),
    "gemma3": Family(
        SHIPPED / "gemma3.jinja",
        eos="<eos>",
        bos="<bos>",
        pad="<pad>",
        unk="<unk>",
        control=("<start_of_turn>", "<end_of_turn>"),
        stops=("<end_of_turn>",),
        adds_bos=True,
    ),
    "glm4": Family(
        SHIPPED / "glm4.jinja",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        control=(*GLM, "<sop>"),
        stops=("<|user|>", "<|observation|>"),
    ),
    "glm4_1v": Family(
        SHIPPED / "glm4_1v.jinja",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        control=(*GLM, "<sop>"),
        added=THINK,
        stops=("<|user|>",),
    ),
    "glm4_5": Family(
        SHIPPED / "glm4_5.jinja",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        control=(*GLM, "<sop>"),
        added=(*THINK, "/nothink"),
        stops=("<|user|>", "<|observation|>"),
    ),
    "internlm2": Family(
        SHIPPED / "internlm2.jinja",
        eos="</s>",
        bos="<s>",
        pad="</s>",
        unk="<unk>",
        control=CHATML,
        stops=("<|im_end|>",),
        adds_bos=True,
    ),
    "llama3": Family(
        SHIPPED / "llama3.jinja",
        eos="<|end_of_text|>",
        bos="<|begin_of_text|>",
        control=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        stops=("<|eot_id|>",),
        adds_bos=True,
    ),
    "minicpm": Family(
        SHIPPED / "minicpm.jinja",
        eos="</s>",
        bos="<s>",
        unk="<unk>",
        control=("<用户>", "<AI>"),
        adds_bos=True,
    ),
    "phi3": Family(
        SHIPPED / "phi3.jinja",
        eos="<|endoftext|>",
        bos="<s>",
        pad="<|endoftext|>",
        unk="<unk>",
        control=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        stops=("<|end|>",),
    ),
    "alpaca": Family(BUILT_IN / "alpaca.jinja", eos="</s>", bos="<s>", pad="</s>", unk="<unk>"),
    "qwen": Family(
        BUILT_IN / "qwen.jinja",
        model_type="qwen",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        control=CHATML,
        stops=("<|im_end|>",),
    ),
    "qwen2": Family(
        SHIPPED / "qwen2.jinja",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        control=CHATML,
        stops=("<|endoftext|>",),
    ),
    "qwen2_5": Family(
        SHIPPED / "qwen2_5.jinja",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        control=CHATML,
        stops=("<|endoftext|>",),
    ),
    "qwen3": Family(
        SHIPPED / "qwen3.jinja",
        eos="<|im_end|>",
        pad="<|endoftext|>",
        control=CHATML,
        added=THINK,
        stops=("<|endoftext|>",),
    ),
    "yi": Family(
        SHIPPED / "yi.jinja",
        eos="<|im_end|>",
        bos="<|startoftext|>",
        pad="<unk>",
        unk="<unk>",
        control=CHATML,
    ),
    "yuan2": Family(
        BUILT_IN / "yuan2.jinja",
        eos="<eod>",
        pad="<eod>",
        unk="<unk>",
        control=("<sep>", "<n>"),
        model_type="yuan",
    ),
}
