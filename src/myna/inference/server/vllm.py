"""vLLM: the command line and environment with which it serves our adapters as they were trained.

Owns what vLLM is told (base, adapters, tokenizer, chat template, what ends an answer) and what is
refused before it starts, because vLLM would refuse it after minutes or compute it wrongly. The
persona of training, which vLLM does not know of, is written into the template it is given. Routes,
limits and batching are vLLM's own; nothing here imports it.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from myna.data.cache import cache_folder
from myna.data.templates import ChatTemplate
from myna.errors import ConfigError
from myna.inference.server.names import BASE
from myna.inference.speaker import Voice, voice_of
from myna.lora.adapter_file import AdapterInfo, read_adapter
from myna.models.bluelm import BlueLMConfig
from myna.models.load import fingerprint_of, load_config
from myna.models.source import find_folder, read_json
from myna.models.tokenizer import load_tokenizer
from myna.run_dir import make_folder, write_file

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's --max-lora-rank may have."""

_UNKNOWN_SETTINGS = {
    "use_dora": "DoRA",
    "bias": "biases of an adapter",
    "lora_bias": "biases of an adapter",
    "modules_to_save": "modules that are trained whole",
    "trainable_token_indices": "rows of the embedding that are trained whole",
    "target_parameters": "adapters on parameters that are no layers",
    "layer_replication": "repeated layers",
    "alora_invocation_tokens": "adapters that a token switches on",
    "rank_pattern": "layers with a rank of their own: it would scale their updates wrongly",
    "alpha_pattern": "layers with an alpha of their own: it would scale their updates wrongly",
}
"""Settings of peft that vLLM refuses or passes over, and what they stand for."""
_OFF: tuple[object, ...] = (None, False, "none", [], {})
_UPDATE = re.compile(r".*\.\d+\..*\.lora_[AB]\.weight")
"""A tensor of a linear layer inside a numbered decoder layer: what vLLM takes."""

_PERSONA_FIRST = """\
{%- if messages[0]['role'] != 'system' -%}
{%- set messages = [{'role': 'system', 'content': PERSONA}] + messages -%}
{%- endif -%}
"""
_SYSTEM_FOLDED = """\
{%- set asked = messages | selectattr('role', 'equalto', 'user') | first -%}
{%- if messages[0]['role'] == 'system' and asked is defined -%}
{%- set folded = namespace(system=messages[0]['content'], messages=[]) -%}
{%- set messages = messages[1:] -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' and folded.system is not none -%}
{%- set text = folded.system + '\\n\\n' + message['content'] -%}
{%- set folded.messages = folded.messages + [{'role': 'user', 'content': text}] -%}
{%- set folded.system = none -%}
{%- else -%}
{%- set folded.messages = folded.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = folded.messages -%}
{%- endif -%}
"""
# An expression, after which Jinja takes no line break away from the template that follows.
_NOTHING = "{{- '' }}"


@dataclass(frozen=True)
class Launch:
    """How vLLM is started."""

    arguments: tuple[str, ...]
    """The program and its arguments; no key among them."""
    environment: Mapping[str, str]
    """All of it, the key included."""
    notes: tuple[str, ...]
    """What a person should know before it runs."""

    def run(self) -> NoReturn:
        """Become vLLM: it has this process's id and gets its signals."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(self.arguments[0], self.arguments, self.environment)


def plan_vllm(
    base: str,
    adapters: Mapping[str, Path],
    *,
    host: str,
    port: int,
    api_key: str | None,
    trust_remote_code: bool = False,
    force_base: bool = False,
) -> Launch:
    """The command that serves `base` and `adapters` (model name to folder) under vLLM.

    Writes the template and what ends an answer into myna's cache, under a name made from their
    content. Raises ConfigError where vLLM is not installed or cannot serve this, naming every
    reason, and where adapters do not belong together or to the base.
    """
    program = _program()
    config = load_config(base, trust_remote_code=trust_remote_code)
    if isinstance(config, BlueLMConfig):
        raise ConfigError(
            f"--engine vllm: vLLM has no BlueLM, the architecture of {base}.\n  Merge the run, "
            "which writes a Llama, and serve that: `myna merge RUN OUT`, then `vllm serve OUT`."
        )
    infos = {name: read_adapter(folder) for name, folder in adapters.items()}
    _check_adapters(infos)
    of_base = load_tokenizer(base, trust_remote_code=trust_remote_code)
    voices = {
        name: voice_of(info, of_base, None, trust_remote_code) for name, info in infos.items()
    }
    _check_alike(voices)
    notes: list[str] = []
    if infos:
        fingerprint = fingerprint_of(base, trust_remote_code=trust_remote_code)
        for name, info in infos.items():
            notes += voices[name].check(info, fingerprint, force_base)
    voice = next(iter(voices.values()), None) or voice_of(None, of_base, None, trust_remote_code)
    folder = _write_settings(base, voice)
    arguments = [program, "serve", str(Path(base).expanduser()), "--served-model-name", BASE]
    arguments += ["--host", host, "--port", str(port)]
    arguments += ["--tokenizer", str(voice.tokenizer.folder)]
    arguments += ["--chat-template", str(folder / "chat_template.jinja")]
    # Texts reach the template as texts, as in training; vLLM would guess from the template.
    arguments += ["--chat-template-content-format", "string"]
    arguments += ["--generation-config", str(folder)]
    # Any page of the web may ask it otherwise.
    arguments += ["--allowed-origins", "[]", "--disable-fastapi-docs"]
    if infos:
        rank = max(info.rank for info in infos.values())
        arguments += ["--enable-lora", "--max-loras", str(len(infos))]
        arguments += ["--max-lora-rank", str(next(most for most in RANKS if most >= rank))]
        arguments += ["--lora-modules"]
        arguments += [f"{name}={info.folder.resolve()}" for name, info in infos.items()]
    if trust_remote_code:
        arguments += ["--trust-remote-code"]
    return Launch(tuple(arguments), _environment(api_key), (*notes, *_notes(voice, api_key)))


def _program() -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which("vllm", path=path)
    if program is None:
        raise ConfigError(
            "--engine vllm: vLLM is not installed here.\n  Install it with `pip install vllm` (it "
            "needs a GPU), or leave --engine out: myna serves without it."
        )
    return program


def _environment(api_key: str | None) -> dict[str, str]:
    # Adapters are loaded from the command line only, and nobody is told that vLLM runs here.
    left_out = ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_SERVER_DEV_MODE", "MYNA_API_KEY")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if api_key is not None:
        environment["VLLM_API_KEY"] = api_key
    return environment


def _notes(voice: Voice, api_key: str | None) -> Iterator[str]:
    if voice.encoder.system is not None:
        yield "the persona of training stands in the chat template, for the model `base` too"
    if api_key is not None:
        yield (
            "vLLM asks for the key on paths under /v1 only; others, such as /tokenize and "
            "/invocations, stay open to whoever reaches the port"
        )


def _check_adapters(infos: Mapping[str, AdapterInfo]) -> None:
    """Raise ConfigError listing all that vLLM cannot serve."""
    faults = [
        f"{name} ({info.folder}): {fault}"
        for name, info in infos.items()
        for fault in _faults(info)
    ]
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise ConfigError(
            f"--engine vllm: vLLM cannot serve this:\n{listed}\n  Leave --engine out, or merge the "
            "run (`myna merge RUN OUT`) and serve the merged model (`vllm serve OUT`)."
        )


def _faults(info: AdapterInfo) -> Iterator[str]:
    for name, meaning in _UNKNOWN_SETTINGS.items():
        value = info.config.get(name)
        if value not in _OFF:
            yield f"{name} is {json.dumps(value)}; vLLM knows no {meaning}"
    if info.rank > RANKS[-1]:
        yield f"rank {info.rank}; vLLM takes {RANKS[-1]} at most"
    # DoRA's magnitudes are told by their setting.
    odd = [n for n in info.shapes if not _UPDATE.fullmatch(n) and "magnitude" not in n]
    if odd:
        listed = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        yield (
            f"{listed}: vLLM takes updates of linear layers inside the decoder layers only, not of "
            "the output head or the embedding"
        )
    if any(sign in str(info.folder.resolve()) for sign in "=,"):
        yield "vLLM reads NAME=PATH and takes no path with = or a comma in it; rename the folder"


def _check_alike(voices: Mapping[str, Voice]) -> None:
    """Raise ConfigError where adapters need several of what vLLM has one of for all models."""
    items = list(voices.items())
    for name, other in items[1:]:
        first, of_first = items[0]
        one, two = of_first.encoder, other.encoder
        differing = [
            what
            for what, same in (
                ("tokenizer", of_first.tokenizer.fingerprint == other.tokenizer.fingerprint),
                ("chat template", one.template.fingerprint == two.template.fingerprint),
                ("persona", one.system == two.system),
                ("ends of an answer", set(one.stop_ids) == set(two.stop_ids)),
            )
            if not same
        ]
        if differing:
            raise ConfigError(
                f"--engine vllm: {first} and {name} differ in their {' and '.join(differing)}, and "
                "vLLM has one for all its models.\n  Start one vLLM for each, or leave --engine "
                "out."
            )


def template_text(template: ChatTemplate, system: str | None) -> str:
    """Jinja that writes the prompts of `data.encode` with persona `system`, without myna."""
    head = ""
    if system is not None:
        # A JSON text is a Jinja text; beyond ASCII Jinja wants the characters themselves.
        head += _PERSONA_FIRST.replace("PERSONA", json.dumps(system, ensure_ascii=False))
    if template.folds_system:
        head += _SYSTEM_FOLDED
    return f"{head.rstrip()}{_NOTHING}{template.saved_source}" if head else template.saved_source


def _write_settings(base: str, voice: Voice) -> Path:
    """A folder with `chat_template.jinja` and `generation_config.json`."""
    settings = read_json(find_folder(base) / "generation_config.json")
    ends = settings.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    settings |= {"eos_token_id": sorted({*ends, *voice.encoder.stop_ids})}
    contents = {
        "chat_template.jinja": template_text(voice.encoder.template, voice.encoder.system),
        "generation_config.json": json.dumps(settings, indent=2, sort_keys=True) + "\n",
    }
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / "vllm" / digest[:16]
    make_folder(folder)
    for name, content in contents.items():
        write_file(folder / name, content)
    return folder
