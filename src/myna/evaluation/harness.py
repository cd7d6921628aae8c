"""lm-eval's tasks on our model: public benchmarks, answered as `myna chat` would answer.

Owns what the harness is told of a model: its template and persona around every question, its
tokenizer without added tokens, its stop tokens, and base and adapter as two sides of one model. The
tasks, their prompts and their metrics are lm-eval's. Needs the extra `lm-eval`.
"""

import difflib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from myna.data.conversation import Message
from myna.errors import ConfigError
from myna.evaluation.losses import SIDES, Sides, side_of
from myna.inference.generate import Sampling
from myna.inference.speaker import Speaker

DEFAULT_CONTEXT = 2048
"""Tokens of a request at most, where the model does not say what it can hold."""

MAX_NEW_TOKENS = 256
"""Longest answer, where a task does not say."""


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A speaker as the harness wants it: scores of given answers, and answers."""

    def __init__(self, speaker: Speaker, *, batch_size: int) -> None:
        super().__init__()
        self._speaker = speaker
        self._batch_size = batch_size
        self._device = speaker.model.device
        self._encoder = speaker.history_encoder  # benchmarks may spell control tokens

    @property
    def eot_token_id(self) -> int:
        """What ends an answer."""
        return self._encoder.stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text without context."""
        bos = self._speaker.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Tokens of a request at most."""
        return self._speaker.context or DEFAULT_CONTEXT

    @property
    def tokenizer_name(self) -> str:
        """Keeps requests of other models apart in lm-eval's caches, which are off here."""
        return self._encoder.template.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template that is always there."""
        return self._encoder.template.source

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt text of these messages; without a generation prompt the last is begun."""
        messages = [Message(each["role"], each["content"]) for each in chat_history]  # type: ignore[arg-type]  # lm-eval's roles are ours
        begun = ""
        if not add_generation_prompt and messages[-1].role == "assistant":
            begun = messages.pop().content
        return self._encoder.prompt(messages).text + begun

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids as in training and chat: the template writes what has to stand before a text.

        `add_special_tokens` is not obeyed.
        """
        encoded = self._speaker.tokenizer(string, add_special_tokens=False, verbose=False)
        ids: list[int] = encoded["input_ids"]
        return ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of an answer behind it, the border being where training has it.

        lm-eval moves white space at the end of the prompt to the answer: here it ends the template.
        """
        prompt, whole = self.tok_encode(context), self.tok_encode(context + continuation)
        if whole[: len(prompt)] == prompt:
            return prompt, whole[len(prompt) :]
        return prompt, self.tok_encode(continuation)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each, cut before the first of the texts that its task ends at."""
        by_settings: dict[tuple[int, float], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            by_settings[self._settings(request.args[1])].append(number)
        answers = [""] * len(requests)
        for (limit, temperature), numbers in by_settings.items():
            sampling = Sampling(max_new_tokens=limit, temperature=temperature, seed=0)
            room = max(1, self.max_length - limit)
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            for at, answer in self._speaker.answer_all(
                prompts, sampling, batch_size=self._batch_size
            ):
                number = numbers[at]
                answers[number] = _cut(answer.text, requests[number].args[1].get("until"))
        return answers

    def _settings(self, asked: Mapping[str, Any]) -> tuple[int, float]:
        """Longest answer and temperature that a task asks for."""
        limit = int(asked.get("max_gen_toks", MAX_NEW_TOKENS))
        samples = bool(asked.get("do_sample", False))
        return limit, float(asked.get("temperature", 1.0)) if samples else 0.0

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, each cut into windows that the model can hold."""
        found = []
        for request in requests:
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length - 1,
                    context_len=1,
                ),
            )
            pairs = [(("", ""), list(context), list(rest)) for context, rest in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return found

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the likeliest at every token."""
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n][1] + requests[n][2]))
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            rows = [(requests[n][1] + requests[n][2])[-self.max_length :] for n in batch]
            log_probs = self._log_probs(rows)
            for number, row, scores in zip(batch, rows, log_probs, strict=True):
                size = min(len(requests[number][2]), len(row) - 1)
                targets = torch.tensor(row[len(row) - size :], device=scores.device).long()
                # The token at t is predicted from t - 1.
                predicting = scores[len(row) - size - 1 : len(row) - 1]
                chosen = predicting.gather(-1, targets[:, None])
                is_greedy = bool((predicting.argmax(-1) == targets).all())
                found[number] = float(chosen.sum()), is_greedy
        return [found[number] for number in range(len(requests))]

    def _log_probs(self, rows: Sequence[list[int]]) -> Tensor:
        """(B, T, V) float32, padded on the right, where causal attention does not look."""
        longest = max(map(len, rows))
        padded = [row + [self._speaker.pad_id] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        output = self._speaker.model(
            input_ids=torch.tensor(padded, device=self._device),
            attention_mask=torch.tensor(mask, device=self._device),
            use_cache=False,
        )
        logits: Tensor = output.logits
        return logits.float().log_softmax(-1)


def run_tasks(
    speaker: Speaker,
    tasks: Sequence[str],
    known: Any,
    *,
    batch_size: int,
    limit: int | None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, dict[str, Sides]]:
    """Metrics of each task for base and adapter; `known` is from `find_tasks`.

    Raises ConfigError where the data of a task cannot be had.
    """
    found: dict[str, dict[str, Sides]] = defaultdict(lambda: defaultdict(dict))
    model = HarnessModel(speaker, batch_size=batch_size)
    for side in SIDES:
        say(f"lm-eval: {', '.join(tasks)} ({side})")
        with side_of(speaker.model, side):
            # Not simple_evaluate: that collects facts of the machine through a shell.
            results = evaluate(
                model,
                _load(known, tasks),
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                apply_chat_template=True,
                fewshot_as_multiturn=True,
            )
        for task, values in results["results"].items():
            for key, value in values.items():
                name, _, way = key.partition(",")
                if isinstance(value, (int, float)) and not name.endswith("_stderr") and way:
                    label = name if way == "none" else f"{name} ({way})"
                    found[task][label][side] = float(value)
    return {task: dict(values) for task, values in found.items()}


def find_tasks(tasks: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's manager of tasks; `folder` holds task files of one's own.

    Raises ConfigError for a task that is unknown, before a model is loaded.
    """
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--tasks-folder {folder}: there is no such folder.")
    manager = None
    if folder is not None:  # alone, if that is enough: lm-eval's own are thousands of files
        manager = TaskManager(include_path=str(folder), include_defaults=False)
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=None if folder is None else str(folder))
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=1, cutoff=0.6)
            raise ConfigError(
                f'--tasks: lm-eval has no task "{task}"'
                + ("" if folder is None else f", nor has {folder}")
                + "."
                + (f' Did you mean "{near[0]}"?' if near else "")
                + "\n  `lm-eval ls tasks` lists them; --tasks-folder DIR adds files of your own."
            )
    return manager


def _load(known: Any, tasks: Sequence[str]) -> Any:
    try:
        return known.load(list(tasks))
    except (OSError, ValueError) as error:
        said = (str(error) or repr(error)).splitlines()[0]
        raise ConfigError(
            f"--tasks: the data of {', '.join(tasks)} cannot be had: {said}\n"
            "  lm-eval fetches it from the hub, or reads the files that the task names."
        ) from error


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    ends = [until] if isinstance(until, str) else list(until or ())
    for end in ends:
        if end:
            text = text.partition(end)[0]
    return text
