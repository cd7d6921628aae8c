"""report.html: all that is known of one run, on one page.

Owns what stands on it and in what order. The numbers are `run_record.py`'s, the curves
`charts.py`'s; frame, colours and escaping are those of all pages (`data/web_page.py`).
"""

import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from myna.data.preview import Line, row_lines, token_lines
from myna.data.web_page import (
    card,
    document,
    lines_table,
    notes,
    prose,
    section,
    share_bar,
    text,
    tiles,
    token_legend,
    token_row,
)
from myna.report import charts
from myna.report.amounts import duration, moment, size
from myna.report.charts import Chart, Curve
from myna.report.curves import Point, trend
from myna.report.run_record import (
    AnsweredRow,
    Epoch,
    Evaluation,
    Incident,
    Pair,
    RunRecord,
    SavedAdapter,
    Step,
)

ANSWERS_SHOWN = 8
"""Rows of the evaluation whose answers stand on the page."""
LEAST_LEARNED = 5
"""Rows in the list of those that the adapter finds hardest."""
EPOCHS_SHOWN = 40
"""Rows of the table of epochs; of more, the last ones."""
INCIDENTS_SHOWN = 50
"""Warnings and the like on the page; of more, the last ones."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank (its `MaxLoRARanks`, which begins at 1)."""
OURS = "BlueLM"
"""The architecture that neither transformers nor vLLM has (`models/bluelm.py`)."""

_STYLE = (
    charts.STYLE
    + """
h1 .state { font-size: .82rem; font-weight: 600; vertical-align: middle; margin-left: .7rem;
  border-radius: 1rem; padding: .22rem .75rem; background: var(--context2); color: var(--soft); }
h1 .finished { background: var(--trained); color: var(--trained-ink); }
h1 .failed { background: var(--held); color: var(--paper); }
h1 .running { background: var(--accent); color: var(--paper); }
h1 .stopped { background: var(--warn-paper); color: var(--warn); }
.said { border-left: 4px solid var(--warn); }
.said.error { border-color: var(--held); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
  gap: .9rem; margin-top: .9rem; }
.halves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
  gap: .9rem 2rem; margin-bottom: .9rem; }
.halves h3:first-child { margin-top: .2rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr));
  gap: .5rem 1.5rem; }
.pair p { margin: .1rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 20rem;
  overflow: auto; }
.pair h4 { margin: 0; font-size: .78rem; font-weight: 600; color: var(--soft); }
.asked { white-space: pre-wrap; overflow-wrap: anywhere; margin: .1rem 0 .7rem; font-weight: 550; }
.adapter { border-left: 3px solid var(--trained2); padding-left: .8rem; }
.base { border-left: 3px solid var(--context2); padding-left: .8rem; }
.reference { border-left: 3px solid transparent; padding-left: .8rem; }
.named { table-layout: fixed; }
.named th { width: 34%; color: var(--soft); overflow-wrap: anywhere; }
.named td { color: var(--ink); overflow-wrap: anywhere; white-space: pre-wrap; }
.named td + td { width: 34%; color: var(--soft); }
.happened td:first-child { white-space: nowrap; color: var(--soft); }
.happened td { overflow-wrap: anywhere; white-space: pre-wrap; color: var(--ink); }
details summary { cursor: pointer; color: var(--soft); font-size: .93rem; margin: .6rem 0; }
code { font: .92em ui-monospace, "Cascadia Mono", Menlo, Consolas, "Noto Sans Mono", monospace; }
pre.command { white-space: pre; overflow-x: auto; font-size: 13px; line-height: 1.6; }
@media (max-width: 30rem) {
  body { padding: 1.5rem .8rem 3rem; }
  .card { padding: .7rem .8rem; }
  td, th { padding-right: .55rem; }
  tr > :last-child { padding-right: 0; }
  table { font-size: .86rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: .5rem; }
  .tiles li { padding: .6rem .75rem; }
  .tiles b { font-size: 1.25rem; }
  .named th { width: 38%; }
  .named.three td + td { width: 28%; }
}
"""
)

_STATES = {
    "running": "A process trains it. The page has what was there when it was made.",
    "stopped": "It was stopped or its process died. {train} goes on from the last checkpoint.",
    "failed": "It ended with an error.",
    "begun": "It has not come to its first step.",
}


def run_page(record: RunRecord, *, state: str, path: str) -> str:
    """The page as HTML.

    Args:
        record: what the run left.
        state: how it stands, a word of `myna runs`.
        path: the run directory as a person would type it, for the commands on the page.
    """
    command = shlex.quote(path)
    parts = [
        f'<h1>{text(record.name)}<span class="state {text(state)}">{text(state)}</span></h1>',
        f'<p class="soft">{_lead(record)}</p>',
        *_standing(record, state, command),
        *([tiles(_tiles(record))] if record.steps else []),
        *section("How it went", _curves(record)),
        *section("Before and after", _evaluation(record, state, command)),
        *(section("Use it", _use(record, record.adapter, path)) if record.adapter else []),
        *(section("Data", _data(record)) if record.accounting else []),
        *(section("Rows as they are trained", _sample(record)) if record.sample else []),
        *section("Warnings, stops, resumptions", _incidents(record)),
        *(section("Cost", [_named(_cost(record))]) if record.steps else []),
        *(section("Settings", _settings(record)) if record.settings else []),
        *section("Environment", [_named(_environment(record)), *_fingerprints(record)]),
    ]
    footer = "" if record.last_time is None else f" · events up to {moment(record.last_time)}"
    return document(f"{record.name}: {state}", parts, style=_STYLE, footer=footer)


def _lead(record: RunRecord) -> str:
    said = ["LoRA"]
    if isinstance(rank := record.setting("lora.rank"), int):
        said.append(f"of rank {rank}")
    if isinstance(model := record.setting("model"), str):
        said.append(f"on {_last_name(model)}")
    if isinstance(data := record.setting("data"), list):
        paths = [
            each["path"] if isinstance(each, dict) and "path" in each else each for each in data
        ]
        names = [_last_name(str(path)) for path in paths]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        said.append(f"trained on {', '.join(names[:3])}{more}")
    return text(" ".join(said))


def _last_name(path: str) -> str:
    """The name at the end of a path; hub ids stay whole."""
    return path.rpartition("/")[2] if path.startswith("/") else path


def _standing(record: RunRecord, state: str, command: str) -> list[str]:
    """What there is to say of a run that is not finished."""
    if state not in _STATES:
        return []
    train = f"<code>myna train {text(command)}</code>"
    said = f"<p>{_STATES[state].format(train=train)}</p>"
    errors = [incident for incident in record.incidents if incident.event == "error"]
    if state == "failed" and errors:
        said += f"<pre>{prose(errors[-1].message)}</pre>"
    kind = " error" if state == "failed" else ""
    return [f'<div class="card said{kind}">{said}</div>']


def _tiles(record: RunRecord) -> Iterable[tuple[str, str]]:
    cost, last = record.cost, record.steps[-1]
    smooth = trend(_points(record.steps, lambda step: step.loss))
    first = record.steps[0]
    yield (
        f"{smooth[-1][1]:.3g}",
        f"loss at step {last.step:,} (trend), {first.loss:.3g} at step 1",
    )
    if best := record.best_held_out:
        kept = ", which is the adapter" if record.setting("train.keep_best") else ""
        yield f"{best.loss:.3g}", f"lowest held-out loss, at step {best.step:,}{kept}"
    total = f"of {record.starts[-1].total_steps:,} " if record.starts else ""
    yield f"{last.step:,}", f"{total}steps, {last.epoch:.3g} epochs"
    yield duration(cost.seconds), "in steps"
    yield _rate(cost.tokens, cost.seconds), "tokens a second"
    yield size(cost.peak_memory_bytes), "peak memory"


def _rate(count: int, seconds: float) -> str:
    rate = count / max(seconds, 1e-9)
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _points(steps: Sequence[Step], value: Callable[[Step], float | None]) -> list[Point]:
    found = ((step.step, value(step)) for step in steps)
    return [(number, each) for number, each in found if each is not None]


def _curves(record: RunRecord) -> list[str]:
    steps = record.steps
    if not steps:
        return ['<p class="soft">No step yet.</p>']
    ends = [
        earlier.step
        for earlier, later in pairwise(steps)
        if int(later.epoch - 1e-6) > int(earlier.epoch - 1e-6)
    ]
    epochs = ends if len(ends) <= EPOCHS_SHOWN else []
    losses = _points(steps, lambda step: step.loss)
    rates = _points(steps, lambda step: step.tokens / max(step.seconds, 1e-9))
    norms = _points(steps, lambda step: step.grad_norm)
    peak = record.cost.peak_memory_bytes
    unit, name = (1e9, "GB") if peak >= 1e9 else (1e6, "MB")
    memory = _points(steps, lambda step: step.peak_memory_bytes / unit)
    held_out = [(each.step, each.loss) for each in record.held_out]
    tall = charts.draw(
        Chart(
            "Loss per trained token",
            [
                Curve("each step", losses, "each"),
                Curve("trend", trend(losses), "trend"),
                Curve("held-out rows", held_out, "held-out"),
            ],
            epochs=epochs,
            may_be_logarithmic=True,
            is_tall=True,
        )
    )
    small = [
        Chart("Learning rate", [_alone(_points(steps, lambda step: step.learning_rate))]),
        Chart("Gradient norm", _with_trend(norms)),
        Chart("Tokens a second", _with_trend(rates), "{:,.0f}".format, "{:,.0f}".format, True),
        Chart(f"Peak memory, {name}", [_alone(memory)], "{:,.1f}".format, "{:,.4g}".format, True),
    ]
    return [
        tall,
        '<div class="charts">',
        *map(charts.draw, small),
        "</div>",
        _epochs(record.epochs),
    ]


def _alone(points: list[Point]) -> Curve:
    return Curve("value", points, "trend")


def _with_trend(points: list[Point]) -> list[Curve]:
    return [Curve("each step", points, "each"), Curve("trend", trend(points), "trend")]


def _epochs(epochs: Sequence[Epoch]) -> str:
    shown = epochs[-EPOCHS_SHOWN:]
    judged = any(epoch.held_out is not None for epoch in shown)
    head = ["epoch", "steps", "loss", *(["held-out"] if judged else []), "tokens/s", "time"]
    rows = [
        [
            f"{epoch.number:,}",
            f"{epoch.steps:,}",
            f"{epoch.loss:.4f}",
            *([_loss(epoch.held_out)] if judged else []),
            _rate(epoch.tokens, epoch.seconds),
            duration(epoch.seconds),
        ]
        for epoch in shown
    ]
    left_out = len(epochs) - len(shown)
    more = f'<p class="soft">The first {left_out:,} are left out.</p>' if left_out else ""
    return f"<h3>Epochs</h3>{more}{_numbers(head, rows)}"


def _numbers(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 0) -> str:
    """A table of numbers; the first cell of each row and the last `words` are text."""

    def cells(row: Sequence[str], tag: str) -> str:
        end = len(row) - words
        return "".join(
            f"<{tag}{' class=n' if 0 < at < end else ''}>{text(cell)}</{tag}>"
            for at, cell in enumerate(row)
        )

    lines = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return card(
        f"<table>\n<thead><tr>{cells(head, 'th')}</tr></thead>\n<tbody>{lines}</tbody>\n</table>"
    )


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _evaluation(record: RunRecord, state: str, command: str) -> list[str]:
    found = record.evaluation
    if found is None:
        judged = f"<code>myna eval {text(command)}</code>"
        when = "" if state == "finished" else "when it is finished, "
        return [
            f'<p class="soft">Not judged yet: {when}{judged} asks base and adapter the same, and '
            f"<code>myna report {text(command)}</code> puts the answers here.</p>"
        ]
    rows = "" if found.data is None else f" on {found.rows_judged:,} rows: {found.data}"
    parts = [
        f'<p class="soft">{text(f"Base and adapter{rows}.")}</p>',
        _numbers(["", "base", "adapter", "change"], _scores(found)),
    ]
    shown = [row for row in found.rows if row.adapter is not None][:ANSWERS_SHOWN]
    if shown:
        parts += ["<h3>Answers</h3>", *map(_answers, shown)]
        if left_out := found.rows_judged - len(shown):
            parts.append(f'<p class="soft">{left_out:,} more are in evaluation.json.</p>')
    losses = [(row.loss.adapter, row) for row in found.rows if row.loss and row.loss.adapter]
    if losses:
        losses.sort(key=lambda each: each[0], reverse=True)
        hardest = [row for _, row in losses[:LEAST_LEARNED]]
        parts += ["<h3>Rows with the highest loss under the adapter</h3>", _hardest(hardest)]
    return parts


def _scores(found: Evaluation) -> Iterable[list[str]]:
    if found.loss is not None:
        yield _score("loss per trained token", found.loss, _loss)
    if found.perplexity is not None:
        yield _score("perplexity", found.perplexity, _perplexity)
    for name, pair in found.metrics.items():
        worth = found.scale.get(name, 1)
        yield _score(name, pair, "{:.1%}".format if worth == 1 else "{:.1f}".format)
    if (probe := found.forgetting) is not None:
        kept = Pair(base=probe.base, adapter=probe.adapter)
        yield _score(f"forgetting: loss on {probe.text}", kept, _loss)
    for task, metrics in found.tasks.items():
        for name, pair in metrics.items():
            yield _score(f"{task}: {name}", pair, _loss)


def _perplexity(value: float) -> str:
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def _score(name: str, pair: Pair, number: Callable[[float], str]) -> list[str]:
    values = ["" if each is None else number(each) for each in (pair.base, pair.adapter)]
    change = ""
    if pair.base is not None and pair.adapter is not None:
        difference = pair.adapter - pair.base
        change = ("+" if difference >= 0 else "−") + number(abs(difference))
    return [name, *values, change]


def _answers(row: AnsweredRow) -> str:
    sides = "".join(
        f'<div class="{kind}"><h4>{name}</h4><p>{prose(answer)}</p></div>'
        for kind, name, answer in (
            ("base", "base", row.base),
            ("adapter", "adapter", row.adapter),
            ("reference", "in the data", row.reference),
        )
        if answer is not None
    )
    return (
        f'<article class="card"><header><b>{text(row.place)}</b></header>'
        f'<div class="asked">{prose(row.question)}</div><div class="pair">{sides}</div></article>'
    )


def _hardest(rows: Sequence[AnsweredRow]) -> str:
    lines = [
        [row.place, _loss(row.loss.base), _loss(row.loss.adapter), _begin(row.question)]
        for row in rows
        if row.loss is not None
    ]
    return _numbers(["row", "base", "adapter", "asked"], lines, words=1)


def _begin(content: str) -> str:
    line = " ".join(content.split())
    return line if len(line) <= 100 else f"{line[:99]}…"


def _data(record: RunRecord) -> list[str]:
    accounting = record.accounting
    assert accounting is not None, "the section is made for runs that have one"
    lines: list[Line] = [*row_lines(accounting)]
    start = record.starts[-1] if record.starts else None
    if start is not None and start.train_rows is not None and start.held_out_rows is not None:
        lines.append(("answers", f"{start.train_rows + start.held_out_rows:,}", ""))
        lines.append(("  trained", f"{start.train_rows:,}", ""))
        lines.append(("  held out", f"{start.held_out_rows:,}", ""))
    parts = []
    if accounting.tokens:
        lines += token_lines(accounting)
        parts.append(
            share_bar("Trained tokens", accounting.trained_tokens / accounting.tokens, trained=True)
        )
    cost = record.cost
    if cost.tokens:
        parts.append(share_bar("Computed tokens", cost.computed_tokens / cost.tokens))
        parts.append(
            '<p class="soft">A beginning that rows of a step share, such as a system prompt or '
            "earlier turns, is computed once.</p>"
        )
    told = [notes(start.notes)] if start is not None and start.notes else []
    return [
        f'<div class="halves">{lines_table(lines)}<div>{"".join(parts)}</div></div>',
        *told,
    ]


def _sample(record: RunRecord) -> list[str]:
    legend = token_legend(f"The first {len(record.sample)} that are trained.")
    return [legend, *map(token_row, record.sample)]


def _incidents(record: RunRecord) -> list[str]:
    told = record.incidents
    if not told:
        return ['<p class="soft">None.</p>']
    shown = told[-INCIDENTS_SHOWN:]
    rows = "\n".join(
        f"<tr><td>{moment(each.time)}</td><td>{prose(_told(each))}</td></tr>" for each in shown
    )
    left_out = len(told) - len(shown)
    more = f'<p class="soft">The first {left_out:,} are left out.</p>' if left_out else ""
    return [more + card(f'<table class="happened">\n{rows}\n</table>')]


def _told(incident: Incident) -> str:
    if incident.event == "resume":
        return f"went on after step {incident.step}"
    return incident.message


def _cost(record: RunRecord) -> Iterable[tuple[str, str]]:
    cost = record.cost
    yield "steps", f"{cost.steps:,}"
    yield "time in steps", f"{duration(cost.seconds)} ({cost.seconds:,.1f} s)"
    if record.starts and record.last_time is not None:
        resumed = sum(each.event == "resume" for each in record.incidents)
        whole = duration(max(0.0, record.last_time - record.starts[0].time))
        yield "from the first start to the last event", whole
        yield "resumed", {0: "never", 1: "once"}.get(resumed, f"{resumed:,} times")
    yield "rows", f"{cost.rows:,}, {_rate(cost.rows, cost.seconds)} a second"
    yield "tokens", f"{cost.tokens:,}, {_rate(cost.tokens, cost.seconds)} a second"
    yield "tokens computed", f"{cost.computed_tokens:,}"
    yield "tokens trained", f"{cost.trained_tokens:,}"
    on_gpu = record.plan is not None and record.plan.device == "cuda"
    whose = "of the GPU" if on_gpu else "of the process"
    yield "peak memory", f"{size(cost.peak_memory_bytes)} {whose}"


def _settings(record: RunRecord) -> list[str]:
    chosen = [setting for setting in record.settings if setting.source != "default"]
    rest = [setting for setting in record.settings if setting.source == "default"]
    return [
        _named([(each.name, _value(each.value), each.source) for each in chosen]),
        f"<details><summary>{len(rest):,} settings have their defaults</summary>"
        + _named([(each.name, _value(each.value)) for each in rest])
        + "</details>",
    ]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(_value, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _environment(record: RunRecord) -> Iterable[tuple[str, str]]:
    if record.starts:
        start = record.starts[-1]
        yield "myna", start.version
        yield "torch", start.torch
        if start.model_type is not None:
            yield "architecture", start.model_type
    for name in ("transformers", "peft"):
        if name in record.hashes:
            yield name, record.hashes[name]
    if record.starts:
        yield from ((name, str(value)) for name, value in start.environment.items())
        yield "processes", f"{start.processes:,}"
        share = start.trainable / max(start.parameters, 1)
        yield "parameters trained", f"{start.trainable:,} of {start.parameters:,} ({share:.2%})"
    if (plan := record.plan) is not None:
        yield "device", plan.device
        yield "number format", f"{plan.dtype}: {plan.reason}"
        yield "rows are computed in", plan.computation
        if (memory := plan.memory) is not None:
            yield "at most at once", f"{memory.limit:,} {memory.unit}"
            yield "layers recomputed", f"{memory.layers_recomputed} of {memory.num_layers}"
            if memory.expected_peak_bytes is not None and memory.budget_bytes is not None:
                budget = size(memory.budget_bytes)
                yield "peak expected", f"{size(memory.expected_peak_bytes)} of {budget}"
        if plan.prepacked is not None:
            yield "weights", plan.prepacked.reason


def _fingerprints(record: RunRecord) -> list[str]:
    names = ("data", "tokenizer", "template", "base")
    found = [(name, record.hashes[name]) for name in names if name in record.hashes]
    if not found:
        return []
    return [f"<details><summary>SHA-256 of what went in</summary>{_named(found)}</details>"]


def _named(rows: Iterable[Sequence[str]]) -> str:
    """A table of names and values, and where the values came from if that is known."""
    rows = list(rows)
    kind = "named three" if any(len(row) > 2 for row in rows) else "named"
    lines = "\n".join(
        f"<tr><th>{text(name)}</th>" + "".join(f"<td>{prose(each)}</td>" for each in rest) + "</tr>"
        for name, *rest in rows
    )
    return card(f'<table class="{kind}">\n{lines}\n</table>')


def _use(record: RunRecord, adapter: SavedAdapter, path: str) -> list[str]:
    model, folder, run = str(record.setting("model")), f"{path}/adapter", shlex.quote(path)
    architecture = record.starts[-1].model_type if record.starts else None
    answers = f"myna generate {run} questions.jsonl -o answers.jsonl"
    parts = [
        *_command("Talk to it", f"myna chat {run}"),
        *_command("Answer a file of questions", answers),
        *_command("In Python, with peft", _python(model, folder, adapter, architecture)),
    ]
    rank = next((each for each in VLLM_RANKS if each >= adapter.rank), None)
    if architecture == OURS:
        parts.append(f'<p class="soft">vLLM does not know {OURS}.</p>')
    elif rank is None or adapter.use_dora:
        parts.append('<p class="soft">vLLM loads neither DoRA nor ranks above 512.</p>')
    else:
        parts += _command("In vLLM", _vllm(model, folder, record.name, rank))
    if adapter.system:
        parts.append(
            '<p class="soft">It was trained with a system text: myna puts it before every '
            "conversation, other engines have to be sent it.</p>"
        )
    return parts


def _python(model: str, folder: str, adapter: SavedAdapter, architecture: str | None) -> str:
    messages = [{"role": "system", "content": adapter.system}] if adapter.system else []
    messages.append({"role": "user", "content": "Hello!"})
    ours = (
        "\nfrom myna.models.bluelm import register\n\nregister()\n" if architecture == OURS else ""
    )
    ends = f", eos_token_id={list(adapter.stop_ids)}" if adapter.stop_ids else ""
    return f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
{ours}
folder = {json.dumps(folder, ensure_ascii=False)}
tokenizer = AutoTokenizer.from_pretrained(folder)
base = AutoModelForCausalLM.from_pretrained({json.dumps(model, ensure_ascii=False)}, dtype="auto")
model = PeftModel.from_pretrained(base, folder)
messages = {json.dumps(messages, ensure_ascii=False)}
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**prompt, max_new_tokens=200{ends})
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _vllm(model: str, folder: str, name: str, rank: int) -> str:
    return (
        f"vllm serve {shlex.quote(model)} --tokenizer {shlex.quote(folder)} \\\n"
        f"    --chat-template {shlex.quote(f'{folder}/chat_template.jinja')} \\\n"
        f"    --enable-lora --max-lora-rank {rank} \\\n"
        f"    --lora-modules {shlex.quote(f'{name}={folder}')}"
    )


def _command(title: str, content: str) -> list[str]:
    return [f"<h3>{text(title)}</h3>", card(f'<pre class="command">{prose(content)}</pre>')]
