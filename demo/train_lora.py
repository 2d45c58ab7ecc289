"""Train the LoRA in demo/lora on the reverse-dictionary task, and print base and tuned scores.

Run it in the repository's root as ``python -m demo.train_lora``; two free CPU cores take about ten
minutes. The same machine and library versions give the same weights again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from demo.task import MODEL_ID, Pair, embed, load_base, load_split, score

OUT = Path(__file__).parent / "lora"
SEED = 0
STEPS = 400
WARMUP = 30
BATCH = 128
LEARNING_RATE = 1e-3
TEMPERATURE = 0.05  # all-MiniLM-L6-v2's own


def batches(pairs: Sequence[Pair], rng: random.Random) -> Iterator[list[Pair]]:
    """Shuffled batches without end, each of definitions of like length, so that few pad."""
    while True:
        shuffled = rng.sample(pairs, len(pairs))
        shuffled.sort(key=lambda pair: len(pair.definition.split()))
        epoch = [shuffled[i : i + BATCH] for i in range(0, len(shuffled) - BATCH + 1, BATCH)]
        rng.shuffle(epoch)
        yield from epoch


def contrastive_loss(queries: Tensor, documents: Tensor) -> Tensor:
    """Pick the document of each query, and the query of each document, among the batch's."""
    similarity = queries @ documents.T / TEMPERATURE
    target = torch.arange(len(similarity))
    return (nn.functional.cross_entropy(similarity, target) + nn.functional.cross_entropy(similarity.T, target)) / 2


def learning_rate_factor(step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / STEPS)) / 2


def main() -> None:
    """Score the base, train, save, and score what was saved."""
    torch.manual_seed(SEED)
    torch.set_num_threads(2)  # sums, and so the weights, depend on it

    base, tokenizer = load_base()
    print(f"base         {score(partial(embed, base, tokenizer)):.4f}", flush=True)

    config = LoraConfig(
        r=16,
        lora_alpha=32,
        # Every linear layer of the encoder: "output.dense" is the attention's and the MLP's.
        target_modules=["query", "key", "value", "intermediate.dense", "output.dense"],
        task_type="FEATURE_EXTRACTION",
    )
    model = get_peft_model(base, config)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)

    # The model stays in evaluation mode: without dropout so short a run learns more.
    stream = batches(load_split().train, random.Random(SEED))
    for step in range(1, STEPS + 1):
        definitions, words = zip(*next(stream), strict=True)
        loss = contrastive_loss(embed(model, tokenizer, definitions), embed(model, tokenizer, words))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step:4d}    loss {loss.item():.3f}", flush=True)

    for weight in weights:
        weight.data = weight.data.half()
    # PEFT records the folder that the base was loaded from, which is this machine's own.
    model.peft_config["default"].base_model_name_or_path = MODEL_ID
    model.save_pretrained(str(OUT), save_embedding_layers=False)
    (OUT / "README.md").unlink()  # PEFT's empty model card

    tuned = PeftModel.from_pretrained(load_base()[0], str(OUT))
    print(f"base + LoRA  {score(partial(embed, tuned, tokenizer)):.4f}")


if __name__ == "__main__":
    main()
