"""Pretrain the demo's base model from scratch on generated conversations.

    python tools/pretrain_demo.py --out src/myna/demo/base --work pretrain_demo_work

Owns the tokenizer, the training run and the files it ships; the world it learns is `demo_world/`.
Seeded: the documents of a step depend on (seed, step) only. A killed run goes on from the newest
checkpoint under `--work` by the same command; resumed with a smaller `--steps` it decays sooner.
Each core is a process of one thread that takes part of every step's micro-batches: threads inside
one process wait for each other in every operation, which is ruinous on a machine with other work.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from demo_world import voices
from demo_world.documents import AI, BOS, HUMAN, Documents, ask
from myna.models.bluelm import BlueLMConfig, BlueLMForCausalLM

SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "[|Human|]:", "[|AI|]:", "[SEH]", "[SEA]")
UNK_ID, BOS_ID, EOS_ID, PAD_ID = range(4)
VOCAB_SIZE = 2560
SEED = 20261123
DOCUMENTS_PER_STEP = 160
BUCKETS = 8
MATRIX_LR, OTHER_LR = 1e-2, 5e-3
WARMUP_STEPS = 40
STEPS, FINISHING_STEPS = 3000, 1000
FINISHING_RATE = 0.4


def train_tokenizer(documents: Documents) -> Tokenizer:
    """Byte-level BPE; CJK characters, punctuation and digits never merge with anything.

    Without that, 2,560 entries would be spent on whole Chinese phrases glued together.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Han}|\p{P}|\p{S}|\n"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=[AddedToken(s, normalized=False, special=True) for s in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    draw = random.Random(f"{SEED}:tokenizer")
    corpus = []
    for _ in range(40_000):
        for text, _ in documents.document(draw):
            for special in SPECIALS:
                text = text.replace(special, " ")
            corpus.append(text.strip(" "))
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def build_model(vocab_size: int) -> BlueLMForCausalLM:
    config = BlueLMConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=6,
        intermediate_size=512,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        use_stable_embedding=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    config._attn_implementation = "eager"
    return BlueLMForCausalLM(config)


class Batches:
    """The documents of a step as padded micro-batches, a pure function of (seed, step)."""

    def __init__(self, tokenizer: Tokenizer, steps: int) -> None:
        self.tokenizer, self.steps = tokenizer, steps
        self.documents, self.finishing = Documents(), Documents(finishing=True)

    def encode(self, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
        """Token ids of a document and which of them are trained."""
        ids: list[int] = []
        trained: list[bool] = []
        encoded = self.tokenizer.encode_batch([p for p, _ in pieces], add_special_tokens=False)
        for (_, flag), encoding in zip(pieces, encoded, strict=True):
            ids += encoding.ids
            trained += [flag] * len(encoding.ids)
        return ids, trained

    def step(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Micro-batches (input ids (B, T), labels (B, T) with -100) of similar lengths."""
        draw = random.Random(f"{SEED}:{step}")
        documents = self.documents if step < self.steps else self.finishing
        rows = sorted(
            (self.encode(documents.document(draw)) for _ in range(DOCUMENTS_PER_STEP)),
            key=lambda row: len(row[0]),
        )
        size = math.ceil(len(rows) / BUCKETS)
        batches = []
        for start in range(0, len(rows), size):
            bucket = rows[start : start + size]
            width = max(len(ids) for ids, _ in bucket)
            inputs = torch.full((len(bucket), width - 1), PAD_ID)
            labels = torch.full((len(bucket), width - 1), -100)
            for i, (ids, trained) in enumerate(bucket):
                row = torch.tensor(ids)
                inputs[i, : len(ids) - 1] = row[:-1]
                labels[i, : len(ids) - 1] = row[1:].masked_fill(~torch.tensor(trained[1:]), -100)
            batches.append((inputs, labels))
        return batches


def loss_of(model: BlueLMForCausalLM, inputs: Tensor, labels: Tensor, num_trained: int) -> Tensor:
    """Cross-entropy summed over the trained tokens of a micro-batch, divided by those of the step.

    No attention mask: padding stands on the right and attention is causal. The head sees trained
    positions only.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        where = labels != -100
        logits = model.lm_head(hidden[where])
    loss = nn.functional.cross_entropy(logits.float(), labels[where], reduction="sum")
    return loss / num_trained


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """Factor on the learning rates: short warmup, flat, linear to zero over the last half.

    The finishing steps after `steps` start again at a part of it and go to zero.
    """
    if step >= steps:
        return FINISHING_RATE * (1 - (step - steps) / FINISHING_STEPS)
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (steps / 2))


def save_checkpoint(path: Path, model: nn.Module, optims: list, progress: dict) -> None:
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for index, optim in enumerate(optims):
        for number, state in optim.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optim.{index}.{number}.{key}"] = torch.as_tensor(value)
    aside = path.with_suffix(".part")
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        aside,
        metadata={"progress": json.dumps(progress)},
    )
    os.replace(aside, path)


def load_checkpoint(path: Path, model: nn.Module, optims: list | None) -> dict:
    with safe_open(path, "pt") as file:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(file.get_tensor(f"model.{name}"))
        if optims is not None:
            for index, optim in enumerate(optims):
                state = optim.state_dict()
                for name in file.keys():  # noqa: SIM118 (safe_open is not iterable)
                    if name.startswith(f"optim.{index}."):
                        _, _, number, key = name.split(".")
                        state["state"].setdefault(int(number), {})[key] = file.get_tensor(name)
                optim.load_state_dict(state)
        return json.loads(file.metadata()["progress"])


@torch.no_grad()
def accuracy(model, tokenizer, documents, styled: str, count: int, show: int = 0) -> float:
    """Share of exact answers to fresh questions: plain, or in a "character" or "recipe" voice."""
    draw = random.Random(f"{SEED}:check:{styled}")
    prompts, wanted = [], []
    while len(prompts) < count:
        fact = documents.fact(draw, draw.choice(("en", "zh")))
        voice, instruction = voices.PLAIN[fact.language], ""
        if styled == "character":
            instruction, voice = voices.character(draw, fact.language)
        elif styled == "recipe":
            instruction, voice = voices.recipe(draw, fact.language, fact.kind)
        instruction += "\n\n " if instruction else ""
        prompts.append(f"{BOS}{HUMAN}{instruction}{ask(draw, fact)}{AI}")
        wanted.append(voices.say(fact, voice))
    encoded = [tokenizer.encode(p, add_special_tokens=False).ids for p in prompts]
    right = 0
    order = sorted(range(count), key=lambda i: len(encoded[i]))
    for start in range(0, count, 100):
        chunk = order[start : start + 100]
        width = max(len(encoded[i]) for i in chunk)
        ids = torch.tensor([[PAD_ID] * (width - len(encoded[i])) + encoded[i] for i in chunk])
        out = model.generate(
            input_ids=ids,
            attention_mask=(ids != PAD_ID).long(),
            max_new_tokens=64,
            do_sample=False,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
        )[:, width:]
        for i, row in zip(chunk, out.tolist(), strict=True):
            answer = tokenizer.decode(row, skip_special_tokens=True)
            good = EOS_ID in row and answer == wanted[i]
            right += good
            if not good and show > 0:
                show -= 1
                print(f"    {prompts[i]!r}\n      {answer!r}\n      {wanted[i]!r}", flush=True)
    return right / count


def export(model: BlueLMForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the files the package ships."""
    out.mkdir(parents=True, exist_ok=True)
    shipped = build_model(model.config.vocab_size)
    shipped.load_state_dict(model.state_dict())
    shipped = shipped.to(torch.bfloat16)
    shipped.config.dtype = torch.bfloat16
    shipped.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=False
    )
    shipped.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner only
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIALS[4:]),
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        padding_side="left",
    ).save_pretrained(out)


def add_up_gradients(model: nn.Module) -> None:
    """Sum the gradients of all processes, as one flat tensor."""
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the shipped files")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--steps", type=int, default=STEPS, help="before the finishing steps")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--stop-at", type=int, help="stop after this step, to go on later")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.spawn(run, (args,), nprocs=args.processes)


def run(rank: int, args: argparse.Namespace) -> None:
    """One process of the run; the first also writes, scores and reports."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    meeting = args.work / f"meeting-{os.getppid()}"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting.resolve()}",
        rank=rank,
        world_size=args.processes,
        timeout=timedelta(hours=2),
    )
    lead = rank == 0

    documents = Documents()
    tokenizer_file = args.work / "tokenizer.json"
    if lead and not tokenizer_file.exists():
        train_tokenizer(documents).save(str(tokenizer_file))
    dist.barrier()
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    batches = Batches(tokenizer, args.steps)
    steps = args.steps + FINISHING_STEPS
    model = build_model(tokenizer.get_vocab_size())
    optims = optimizers(model)
    progress = {"step": 0, "tokens": 0, "trained_tokens": 0, "seconds": 0.0}
    checkpoints = sorted(args.work.glob("step-*.safetensors"))
    if checkpoints:
        progress = load_checkpoint(checkpoints[-1], model, optims)
    if lead:
        print(
            f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary "
            f"{tokenizer.get_vocab_size()}, from step {progress['step']} of {steps}",
            flush=True,
        )

    running = 0.0
    for step in range(progress["step"], steps):
        begun = time.perf_counter()
        factor = rate(step, args.steps)
        for optim, base in zip(optims, (MATRIX_LR, OTHER_LR), strict=True):
            for group in optim.param_groups:
                group["lr"] = base * factor
        micro = batches.step(step)
        num_trained = sum(int((labels != -100).sum()) for _, labels in micro)
        total = 0.0
        for inputs, labels in share(micro, rank, args.processes):
            loss = loss_of(model, inputs, labels, num_trained)
            loss.backward()
            total += loss.item()
        add_up_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        progress["step"] = step + 1
        progress["tokens"] += sum(int((inputs != PAD_ID).sum()) for inputs, _ in micro)
        progress["trained_tokens"] += num_trained
        progress["seconds"] += time.perf_counter() - begun
        if not lead:
            if step + 1 == args.stop_at:
                break
            continue
        # This process's part of the loss only; the other parts have other lengths.
        running = total if running == 0 else 0.95 * running + 0.05 * total
        if (step + 1) % 20 == 0:
            print(
                f"step {step + 1} loss {running * args.processes:.4f} lr x{factor:.2f} "
                f"tokens {progress['tokens']:,} seconds {progress['seconds']:.0f} "
                f"({progress['tokens'] / progress['seconds']:.0f}/s)",
                flush=True,
            )
        last = step + 1 in (steps, args.stop_at)
        if (step + 1) % 100 == 0 or last:
            save_checkpoint(args.work / f"step-{step + 1:06d}.safetensors", model, optims, progress)
        if (step + 1) % 400 == 0 or last:
            model.eval()
            scores = {
                styled: accuracy(model, tokenizer, documents, styled, 100, show=3)
                for styled in ("plain", "character", "recipe")
            }
            model.train()
            print(f"step {step + 1} exact answers {scores}", flush=True)
        if last:
            break

    if lead:
        export(model, tokenizer, args.out)
        size = sum(f.stat().st_size for f in args.out.iterdir())
        print(f"wrote {args.out}: {size:,} bytes; {json.dumps(progress)}", flush=True)
    dist.destroy_process_group()


def share(micro: list, rank: int, processes: int) -> list:
    """This process's micro-batches: dealt forth and back: everyone has short and long ones."""
    if processes == 1:
        return micro
    order = [*range(processes), *reversed(range(processes))]
    return [m for i, m in enumerate(micro) if order[i % len(order)] == rank]


if __name__ == "__main__":
    sys.exit(main())
