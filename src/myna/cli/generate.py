"""`myna generate`: an answer for every row of a file.

Owns the checks before the model is loaded, the progress bar and the file of answers, which appears
whole or not at all. Reading questions and generating is `inference`'s.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from myna.cli.remote_code import warn_of_remote_code
from myna.cli.terminal import error_console
from myna.errors import ConfigError, DataError
from myna.run_dir import write_file

if TYPE_CHECKING:
    from myna.data.encode import Prompt
    from myna.inference.generate import Answer
    from myna.inference.questions import Question
    from myna.inference.speaker import Speaker


def run(
    source: str,
    questions: Path,
    output: Path,
    *,
    system: str | None,
    batch_size: int,
    sampling: dict[str, Any],
    trust_remote_code: bool,
    force_base: bool = False,
) -> None:
    """Answer the rows of `questions` and write `output`, a JSON object a line, in their order.

    A line has `prompt` (the text the model was sent), `answer`, `stopped` (false where the answer
    was cut at its limit) and, where the row had an answer, `reference`. Raises DataError listing
    all rows that cannot be asked, before the first answer.
    """
    _check_output(output, questions)
    from myna.inference.generate import Sampling
    from myna.inference.questions import read_questions
    from myna.inference.speaker import open_speaker

    asked = read_questions(questions)
    wanted = Sampling(**sampling)
    if trust_remote_code:
        warn_of_remote_code(source, error_console)
    speaker = open_speaker(
        source, system=system, trust_remote_code=trust_remote_code, force_base=force_base
    )
    prompts = _prompts(speaker, asked)
    error_console.print(
        f"{len(asked):,} questions to {speaker.adapter or speaker.description}, "
        f"{speaker.describe(wanted)}",
        markup=False,
        soft_wrap=True,
    )
    answers: dict[int, Answer] = {}
    with Progress(
        TextColumn("answers"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=error_console,
        transient=True,
        disable=not error_console.is_terminal,
    ) as progress:
        task = progress.add_task("answers", total=len(prompts))
        ids = [prompt.ids for prompt in prompts]
        for index, answer in speaker.answer_all(ids, wanted, batch_size=batch_size):
            answers[index] = answer
            progress.advance(task)
    lines = [
        _line(prompt, answers[index], asked[index].reference)
        for index, prompt in enumerate(prompts)
    ]
    write_file(output, "".join(lines))
    cut = sum(not answer.stopped for answer in answers.values())
    error_console.print(
        f"{len(lines):,} answers in {output}" + (f"; {cut:,} cut at their limit" if cut else ""),
        markup=False,
        soft_wrap=True,
    )


def _check_output(output: Path, questions: Path) -> None:
    if output.is_dir():
        raise ConfigError(f"{output} is a folder; expected a file name such as {output}/out.jsonl.")
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: the folder {output.parent} does not exist; make it first.")
    if output.exists() and output.resolve() == questions.resolve():
        raise ConfigError(f"{output} holds the questions; give another file for the answers.")


def _prompts(speaker: "Speaker", asked: "list[Question]") -> "list[Prompt]":
    from myna.inference.questions import list_refusals

    prompts, refusals = [], []
    for question in asked:
        try:
            prompt = speaker.encoder.prompt(question.messages, question.tools)
            speaker.check_fits(prompt.ids)
        except DataError as error:
            refusals.append(f"{question.place}: {error}")
        else:
            prompts.append(prompt)
    if refusals:
        raise DataError(list_refusals(refusals))
    return prompts


def _line(prompt: "Prompt", answer: "Answer", reference: str | None) -> str:
    entry: dict[str, Any] = {
        "prompt": prompt.text,
        "answer": answer.text,
        "stopped": answer.stopped,
    }
    if reference is not None:
        entry["reference"] = reference
    return json.dumps(entry, ensure_ascii=False) + "\n"
