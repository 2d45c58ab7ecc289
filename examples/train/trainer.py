"""Trains a sparse adapter with transformers' Trainer: small checkpoints that can be resumed, and a file to apply.

`python -m examples.train.trainer MODEL TEXTS OUT`: a causal language model's folder, JSON Lines with the key `text`,
and a folder for checkpoints and `task.shd`.  TRL's trainers, such as SFTTrainer, take the model and the callback in the
same way.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from shiradelta import train
from shiradelta.text.kinds import TEXT
from shiradelta.text.read import read_file
from shiradelta.train.trainer import SparseCheckpoints

RATE, CALIBRATION = 5e-4, 16


def main(folder: str, texts: str, out: str, steps: int = 200) -> Path:
    """Trains, prints how to apply the file, and returns it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [tokenizer(text, truncation=True, max_length=256) for text in read_file(texts, [TEXT]).plain]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    calibration = [collate(rows[i : i + 4]) for i in range(0, min(4 * CALIBRATION, len(rows)), 4)]
    # Over 60 % of the steps the density is pruned from 5 % to 1 %, and training finds which weights matter.
    tuner = train.attach(model, sparsity=0.01, mask="snip", calibration=calibration, prune_steps=steps * 6 // 10)
    print(tuner)

    arguments = TrainingArguments(
        out, max_steps=steps, per_device_train_batch_size=4, learning_rate=RATE, save_steps=50, report_to=[]
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[SparseCheckpoints(tuner)])
    begun = any(Path(out).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=begun)

    file = Path(out) / "task.shd"
    tuner.save(file)
    tuner.detach()  # the model is the base again
    print(f"shiradelta apply {folder} {file}")
    return file


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
