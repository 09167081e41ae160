"""Trains a small language model on preferences with TRL's DPOTrainer and the losses of pyloss.

The model's weights are random and its words are invented, so nothing is downloaded. The preferred
answer counts on from the prompt, the other one is random. Each loss type is trained once by TRL's
own trainer and once by pyloss.integrations.trl.DPOTrainer, from the same model on the same data.

Run: python examples/trl_dpo.py [--steps 30] [--losses sigmoid,ipo,hinge,apo_zero]
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import datasets
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pyloss.integrations.trl import DPOTrainer

NUMBERS = 40
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *(str(n) for n in range(NUMBERS))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUMBERS + len(SPECIAL), hidden_size=48, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_pairs(rows: int = 256) -> datasets.Dataset:
    generator = random.Random(0)

    def row() -> dict[str, str]:
        start = generator.randrange(NUMBERS)
        counted = [(start + i) % NUMBERS for i in range(9)]
        other = [generator.randrange(NUMBERS) for _ in range(generator.randrange(3, 7))]
        prompt, chosen = counted[:4], counted[4:]
        return {
            name: "".join(f" {n}" for n in numbers)
            for name, numbers in (("prompt", prompt), ("chosen", chosen), ("rejected", other))
        }

    return datasets.Dataset.from_list([row() for _ in range(rows)])


def train(cls: type, loss: str, steps: int, folder: str) -> list[dict[str, float]]:
    settings = trl.DPOConfig(
        folder, loss_type=loss, beta=0.1, max_steps=steps, per_device_train_batch_size=8,
        learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        bf16=False, disable_tqdm=True, seed=0, log_level="error",
    )  # fmt: skip
    trainer = cls(
        model=make_model(), ref_model=make_model(), args=settings, train_dataset=make_pairs(),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.remove_callback(next(type(c) for c in trainer.callback_handler.callbacks
                                 if type(c).__name__ == "PrinterCallback"))  # fmt: skip
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--losses", default="sigmoid,ipo,hinge,apo_zero")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()

    print("loss       trainer   first loss   last loss   reward margin   right pairs")
    with tempfile.TemporaryDirectory() as folder:
        for loss in arguments.losses.split(","):
            for name, cls in (("TRL", trl.DPOTrainer), ("pyloss", DPOTrainer)):
                log = train(cls, loss, arguments.steps, folder)
                last = log[-5:]
                margin, right = (
                    sum(entry[f"rewards/{key}"] for entry in last) / len(last)
                    for key in ("margins", "accuracies")
                )
                print(
                    f"{loss:10s} {name:7s}   {log[0]['loss']:10.4f}   {last[-1]['loss']:9.4f}   "
                    f"{margin:13.3f}   {right:11.1%}"
                )


if __name__ == "__main__":
    main()
