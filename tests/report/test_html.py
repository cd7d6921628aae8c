"""report.html: numbers equal those of the run's files, text is only text, nothing is loaded."""

import json
import re
from html.parser import HTMLParser

import pytest
from made_run import BEGIN, EVALUATION, SAMPLE, START, step, write_events

from myna.report.html import run_page
from myna.report.run_record import read_run
from myna.run_dir import RunDir

VOID = {"meta", "path", "rect", "br"}


class Reader(HTMLParser):
    """Tags, the text between them, and whether all are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def read(run: RunDir, state: str = "finished", path: str = "runs/parrot") -> Reader:
    reader = Reader()
    reader.feed(run_page(read_run(run), state=state, path=path))
    reader.close()
    assert reader.open == []
    return reader


def words(run: RunDir, state: str = "finished") -> str:
    return re.sub(r"\s+", " ", " ".join(read(run, state).text))


def paths(reader: Reader, kind: str) -> list[str]:
    return [a["d"] or "" for tag, a in reader.tags if tag == "path" and a["class"] == kind]


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing(run: RunDir) -> None:
    run.evaluation.write_text(json.dumps(EVALUATION))
    reader = read(run)
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "a"}
    for _, attributes in reader.tags:
        assert not {"src", "href", "srcset", "action", "xlink:href"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
        assert "url(" not in (attributes.get("style") or "")
    page = run_page(read_run(run), state="finished", path="runs/parrot")
    assert "http" not in page.replace("http-equiv", "") and "@import" not in page
    (policy,) = [a["content"] for _, a in reader.tags if "http-equiv" in a]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_same_run_gives_the_same_page(run: RunDir) -> None:
    pages = {run_page(read_run(run), state="finished", path="runs/parrot") for _ in range(2)}
    assert len(pages) == 1


def test_the_numbers_are_those_of_the_events(run: RunDir) -> None:
    text = words(run)
    # The trend at the end: steps 5 and 6.
    assert f"{(1 / 5 + 1 / 6) / 2:.3g} loss at step 6 (trend), 1 at step 1" in text
    assert "0.75 lowest held-out loss, at step 3" in text
    assert "6 of 6 steps, 2 epochs" in text
    assert "12 s in steps" in text  # six of two seconds
    assert "50 tokens a second" in text  # 100 in two seconds
    assert "400 MB peak memory" in text
    # Epochs: the mean of 1, 1/2, 1/3 and of 1/4, 1/5, 1/6, which have equally many tokens.
    assert "1 3 0.6111 0.7500 50 6 s" in text and "2 3 0.2056 0.8750 50 6 s" in text
    for line in (
        "time in steps 12 s (12.0 s)",
        "from the first start to the last event 2 min",
        "resumed never",
        "rows 24, 2 a second",
        "tokens 600, 50 a second",
        "tokens computed 480",
        "tokens trained 240",
        "peak memory 400 MB of the process",
    ):
        assert line in text, line


def test_the_mean_of_an_epoch_is_over_tokens_not_over_steps(run: RunDir) -> None:
    write_events(
        run.events,
        START,
        step(1, epoch=0.5, loss=1.0, trained_tokens=30),
        step(2, epoch=1.0, loss=5.0, trained_tokens=10),
    )
    assert "1 2 2.0000 50 4 s" in words(run)


def test_data_settings_and_environment(run: RunDir) -> None:
    text = words(run)
    for line in (
        "rows in 24",
        "trained whole 21",
        "truncated 1 user text cut in its middle to fit max_length",
        "refused 2 longer than max_length",
        "answers 24 trained 22 held out 2",
        "tokens 1,200 trained 300 25.0% of the tokens",
        "Computed tokens, 80.0%",
        "rows.jsonl: prompt is question",
        "model some/model job.yaml line 1",
        "lora.rank 4 job.yaml line 5 (lora_r)",
        "system Speak like a bird. command line",
        "3 settings have their defaults",
        "myna 9.8.7",
        "torch 2.99.0",
        "transformers 5.99.0",
        "processor Abacus 3000",
        "parameters trained 25 of 1,000 (2.50%)",
        "number format float32: float32 on cpu, as asked for.",
        "layers recomputed 1 of 5",
        "peak expected 500 MB of 2.0 GB",
        "the loss is 8, more than it was",
        "LoRA of rank 4 on some/model trained on rows.jsonl",
    ):
        assert line in text, line


def test_rows_stand_token_by_token_with_the_trained_ones_marked(run: RunDir) -> None:
    reader = read(run)
    assert "<user>What?⟦A bird</s>⟧" in "".join(reader.text)
    classes = [(a.get("class") or "").split() for tag, a in reader.tags if tag == "span"]
    assert sum("t" in names for names in classes) == 1 + len(SAMPLE[0]["trained"])  # the legend's
    assert "rows.jsonl line 7, answer 1: 3 tokens of context, 2 trained" in words(run).replace(
        "line 7 ,", "line 7,"
    )


def test_curves_go_where_the_numbers_are(run: RunDir) -> None:
    reader = read(run)
    loss, norm, speed = paths(reader, "line each")
    # Six steps, from left to right; the axis of the loss is 0 to 1.
    places = [tuple(map(float, pair.split())) for pair in loss[1:].split("L")]
    assert [x for x, _ in places] == [0, 200, 400, 600, 800, 1000]
    assert [y for _, y in places] == pytest.approx([1000 * (1 - 1 / s) for s in range(1, 7)], abs=1)
    assert len({pair.split()[1] for pair in norm[1:].split("L")}) == 1  # 2.0 at every step
    assert len({pair.split()[1] for pair in speed[1:].split("L")}) == 1
    assert paths(reader, "dots held-out")[0].count("M") == 2
    assert paths(reader, "epoch") == ["M400.0 0v1000"]  # the first epoch ends at step 3
    text = "".join(reader.text)
    assert "step 3, each step 0.3333, trend" in text and "held-out rows 0.75" in text


def test_a_loss_that_falls_far_is_drawn_on_a_logarithmic_scale(run: RunDir) -> None:
    write_events(run.events, START, step(1, loss=10.0), step(2, loss=1.0), step(3, loss=0.001))
    reader = read(run)
    assert "Loss per trained token, log scale" in words(run)
    loss = paths(reader, "line each")[0]  # from 10 to 0.001 are four powers of ten
    assert [float(pair.split()[1]) for pair in loss[1:].split("L")] == [0, 250, 1000]
    write_events(run.events, START, step(1, loss=10.0), step(2, loss=1.0), step(3, loss=0.0))
    assert "log scale" not in words(run)  # of zero there is no logarithm


def test_without_an_evaluation_the_page_says_how_to_get_one(run: RunDir) -> None:
    assert "Not judged yet: myna eval runs/parrot asks base and adapter the same" in words(run)


def test_answers_of_base_and_adapter_stand_side_by_side(run: RunDir) -> None:
    run.evaluation.write_text(json.dumps(EVALUATION))
    text = words(run)
    for line in (
        "Base and adapter on 12 rows: held-out rows of the run.",
        "loss per trained token 4.5000 1.2500 −3.2500",
        "perplexity 90.02 3.49 −86.53",
        "exact 12.5% 87.5% +75.0%",
        "chrf 10.2 55.5 +45.2",
        "forgetting: loss on neutral sentences 2.0000 2.1250 +0.1250",
        "Question 1? base base says 1 adapter adapter says 1 in the data reference 1",
        "4 more are in evaluation.json.",
        "rows.jsonl line 12 4.0000 3.0000 Question 12?",
    ):
        assert line in text, line
    assert "base says 9" not in text and "adapter\nsays 1" in "".join(read(run).text)


HOSTILE = '</style></pre><script>alert(1)</script><img src=x onerror="x">\x1b[2J\u202e\x00'


def test_hostile_text_is_only_text(run: RunDir) -> None:
    run.config.write_text(
        run.config.read_text()
        .replace('"some/model"', json.dumps(HOSTILE))
        .replace("job.yaml line 3", "<script>alert(1)</script>")
    )
    run.sample.write_text(json.dumps([SAMPLE[0] | {"place": HOSTILE, "trained": [HOSTILE]}]))
    row = dict.fromkeys(("place", "question", "reference", "base", "adapter"), HOSTILE)
    judged = EVALUATION | {"data": HOSTILE, "metrics": {HOSTILE: {"base": 0, "adapter": 1}}}
    run.evaluation.write_text(json.dumps(judged | {"rows": [row]}))
    start = START | {"version": HOSTILE, "notes": [HOSTILE], "environment": {HOSTILE: HOSTILE}}
    error = {"event": "error", "message": HOSTILE, "exit_code": 6}
    write_events(run.events, start, step(1), {"event": "warning", "message": HOSTILE}, error)
    reader = read(run, "failed", path=f"runs/{HOSTILE}")
    assert not {"script", "img"} & {tag for tag, _ in reader.tags}
    text = "".join(reader.text)
    assert text.count("<script>alert(1)</script>") >= 15
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", text)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("running", "A process trains it."),
        ("stopped", "myna train runs/parrot goes on from the last checkpoint."),
        ("failed", "It ended with an error. step 2: loss is nan Rows: rows.jsonl line 3"),
        ("begun", "It has not come to its first step."),
    ],
)
def test_runs_that_are_not_finished_have_a_page_that_says_so(
    run: RunDir, state: str, said: str
) -> None:
    events = [] if state == "begun" else [step(1)]
    error = {"event": "error", "message": "step 2: loss is nan\n  Rows: rows.jsonl line 3"}
    write_events(run.events, START, *events, *([error] if state == "failed" else []))
    (run.adapter / "adapter_config.json").unlink()
    text = words(run, state)
    assert f"parrot {state}" in text and said in text
    assert "Use it" not in text and ("of 6 steps" in text) == (state != "begun")


def test_a_run_that_ended_before_anything_was_written_has_a_page(run: RunDir) -> None:
    for path in (run.config, run.plan, run.data, run.sample, run.adapter / "adapter_config.json"):
        path.unlink()
    write_events(run.events, {"event": "error", "message": "no memory"})
    assert "no memory" in words(run, "failed")


def test_commands_name_this_run_quoted_where_a_shell_needs_it(run: RunDir) -> None:
    text = "".join(read(run, path="my runs/parrot").text)
    assert "myna chat 'my runs/parrot'" in text
    assert 'folder = "my runs/parrot/adapter"' in text
    assert "max_new_tokens=200, eos_token_id=[2, 7])" in text
    assert '{"role": "system", "content": "Speak\\nlike a bird."}' in text
    assert (
        "vllm serve some/model --tokenizer 'my runs/parrot/adapter' \\\n"
        "    --chat-template 'my runs/parrot/adapter/chat_template.jinja' \\\n"
        "    --enable-lora --max-lora-rank 8 \\\n"
        "    --lora-modules 'parrot=my runs/parrot/adapter'"
    ) in text


@pytest.mark.parametrize("saved", [{"r": 4, "use_dora": True}, {"r": 513}])
def test_what_vllm_does_not_load_is_said(run: RunDir, saved: dict[str, object]) -> None:
    (run.adapter / "adapter_config.json").write_text(json.dumps(saved))
    text = words(run)
    assert "vllm serve" not in text and "vLLM loads neither DoRA nor ranks above 512." in text


def test_a_base_that_only_myna_has_is_registered_first(run: RunDir) -> None:
    write_events(run.events, START | {"model_type": "BlueLM"}, step(1))
    text = words(run)
    assert "from myna.models.bluelm import register register() folder =" in text
    assert "vllm serve" not in text and "vLLM does not know BlueLM." in text


def test_a_long_run_has_a_small_page_that_keeps_its_peaks(run: RunDir) -> None:
    spike = 3_001
    write_events(
        run.events,
        START | {"total_steps": 5_000},
        *(
            step(number, loss=50.0 if number == spike else 1.0, epoch=number / 50)
            for number in range(1, 5_001)
        ),
        *({"event": "warning", "message": f"warning {number}"} for number in range(200)),
    )
    page = run_page(read_run(run), state="finished", path="runs/parrot")
    assert len(page.encode()) < 300_000
    reader = read(run)
    heights = [float(pair.split()[1]) for pair in paths(reader, "line each")[0][1:].split("L")]
    assert min(heights) == 0  # the axis ends at the spike
    text = words(run)
    assert "The first 60 are left out." in text and "The first 150 are left out." in text
    assert "warning 199" in text and "warning 149" not in text


def test_the_time_of_the_last_event_is_told(run: RunDir) -> None:
    from myna.report.amounts import moment

    assert f"events up to {moment(BEGIN + 110)}" in words(run)
