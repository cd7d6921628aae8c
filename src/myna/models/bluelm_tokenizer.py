"""BlueLM's tokenizer: its sentencepiece files into a plain fast tokenizer, once.

The published class is slow Python run as remote code. Its rule: split the text at the eight special
strings, encode every piece between them apart (each with its own leading `▁`), then prepend `<s>`.
A byte-level-fallback BPE with normalizers says the same; a Metaspace pre-tokenizer does not. Owns
that conversion and the check that it agrees with sentencepiece; which ids stop or pad is left to
`tokenizer.py`.
"""

# mypy: allow-untyped-calls
# (transformers annotates its arguments but few of its return types.)

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from myna.errors import ConfigError
from myna.models.source import read_json

_NORMAL, _USER_DEFINED, _BPE = 1, 4, 2  # enum values of sentencepiece_model.proto

_PROBES = (
    "你好，世界。",
    "皇上万福金安！臣妾给皇上请安——",
    "Hello, world! It's 2023.",
    "  two  spaces  inside and around  ",
    "line\n\n one\ttab\r\nend ",
    "ＡＢＣ１２３　全角，ｶﾅ ﬁ ½ ①",
    "0123456789 3.14 1,000,000",
    "emoji 😀👨‍👩‍👧 and 𝒎𝒂𝒕𝒉, combining é e\u0301",
    "def f(x):\n    return x  # ▁ 中文abc混排",
    "\u200b\ufeff\u00a0 control\u0007",
    "aaaaaaaa bbbb 哈哈哈哈哈 ……",
    " ",
)


def convert_bluelm_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Fast tokenizer with the ids of the published BlueLM tokenizer whose files lie in `folder`.

    Reads `tokenizer.model`, `tokenizer_config.json` and, where present, `added_tokens.json` and
    `special_tokens_map.json`: the published `added_tokens.json` names only two of the four extra
    tokens; the others take the next free ids in the order of the map.

    Raises ConfigError if the model is not a BPE, the extra tokens leave gaps in the ids, or the
    result differs from sentencepiece on a built-in set of strings.
    """
    path = folder / "tokenizer.model"
    proto = sentencepiece_model.ModelProto()  # type: ignore[attr-defined]  # made on import
    try:
        proto.ParseFromString(path.read_bytes())
        reference = SentencePieceProcessor(model_proto=proto.SerializeToString())
    except Exception as error:  # protobuf and sentencepiece have no common class for a broken file
        raise ConfigError(f"{path}: not a sentencepiece model ({error}).") from error
    if proto.trainer_spec.model_type != _BPE:
        raise ConfigError(f"{path}: a sentencepiece model, but not a BPE as BlueLM's is.")

    settings = read_json(folder / "tokenizer_config.json")
    extra = _extra_tokens(folder, settings, num_pieces=len(proto.pieces))
    backend = _backend(proto)
    _check_against(reference, backend, proto, path)

    core = {
        role: _content(settings[role])
        for role in ("unk_token", "bos_token", "eos_token", "pad_token")
        if settings.get(role)
    }
    # Not `normalized` as published: tokenizers would then split after the leading ▁ was prepended,
    # and only the first piece would get one.
    special = [
        AddedToken(name, normalized=False, special=True) for name in (*core.values(), *extra)
    ]
    backend.add_special_tokens(special)
    for name, index in extra.items():
        if backend.token_to_id(name) != index:
            raise ConfigError(
                f"{folder}: token {name} has id {index}, but the ids after the {len(proto.pieces)} "
                f"pieces are {dict(extra)}; expected them without gaps."
            )

    template = folder / "chat_template.jinja"
    chat_template = settings.get("chat_template")
    if template.is_file():
        chat_template = template.read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **core,
        additional_special_tokens=list(extra),
        add_bos_token=settings.get("add_bos_token", True),
        add_eos_token=settings.get("add_eos_token", False),
        padding_side=settings.get("padding_side", "right"),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=chat_template,
        **({"model_max_length": n} if (n := settings.get("model_max_length")) else {}),
    )


def _content(token: Any) -> str:
    """The string of a token written as a string or as an object."""
    return str(token["content"] if isinstance(token, dict) else token)


def _extra_tokens(folder: Path, settings: dict[str, Any], *, num_pieces: int) -> dict[str, int]:
    """Name to id of the tokens after the pieces, in the order of the ids."""
    ids = {
        _content(token): int(index)
        for index, token in settings.get("added_tokens_decoder", {}).items()
        if int(index) >= num_pieces
    }
    ids |= {
        name: index
        for name, index in read_json(folder / "added_tokens.json").items()
        if index >= num_pieces
    }
    listed = [
        *settings.get("additional_special_tokens", []),
        *read_json(folder / "special_tokens_map.json").get("additional_special_tokens", []),
    ]
    for name in map(_content, listed):
        ids.setdefault(name, max([num_pieces - 1, *ids.values()]) + 1)
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def _backend(proto: Any) -> Tokenizer:
    """The tokenizer of the pieces alone, without special tokens."""
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    user_defined = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    tokenizer = Tokenizer(
        BPE(
            vocab,
            list(_merges(proto)),
            unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
            # A user-defined piece has no merges; split off below, it is found as a whole.
            ignore_merges=bool(user_defined),
        )
    )
    if user_defined:
        longest_first = sorted(user_defined, key=len, reverse=True)
        pattern = "|".join(map(_literal, longest_first))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")

    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # Spaces only: normalizers.Strip would take line breaks along.
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)

    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        parts.append(decoders.Strip(" ", left=1, right=0))
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _literal(text: str) -> str:
    """`text` as a regular expression of code points, safe in any dialect."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)


def _merges(proto: Any) -> Iterable[tuple[str, str]]:
    """Pairs in the order sentencepiece merges them: by the score of what they make.

    sentencepiece stores no pairs; it joins whatever two neighbours make a piece. So every split of
    a piece into two pieces is a merge, with the rank of the piece.
    """
    score = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    rank = {text: index for index, text in enumerate(score)}
    ordered = sorted(score, key=lambda text: (-score[text], rank[text]))
    for text in ordered:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in score and right in score:
                yield left, right


def _check_against(
    reference: SentencePieceProcessor, tokenizer: Tokenizer, proto: Any, path: Path
) -> None:
    """Compare with sentencepiece before any special token is added."""
    user_defined = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    for text in (*_PROBES, *(f"a {piece}b" for piece in user_defined)):
        ours, theirs = tokenizer.encode(text).ids, reference.encode(text)
        if ours != theirs:
            raise ConfigError(
                f"{path}: the converted tokenizer differs from sentencepiece on {text!r}:\n"
                f"  sentencepiece {theirs}\n  converted     {ours}\n  It uses something that the "
                "conversion does not know; report it with the file."
            )
