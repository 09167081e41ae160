"""The refined schedule in a Trainer of transformers: a run that is watched, and one that learns.

The first run has linear decay, and GradNormRecorder on the optimizer that goes into the Trainer;
the second one gets the schedule that its norms ask for. `max_grad_norm=0`: norms that are clipped
would say little. The peak of a schedule is its own, so that two runs compare nothing:
refined_schedule.py looks for the best of each.
Run: python examples/transformers_refined_schedule.py [--steps 150]
Needs transformers and accelerate.
"""

from __future__ import annotations

import argparse
import os
import tempfile

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from pyloss.optim.lr_scheduler import GradNormRecorder, LinearDecay, RefinedSchedule

VOCABULARY, LENGTH = 32, 24


class Counting(torch.utils.data.Dataset):
    """Sequences that go up in steps of one, two or three."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = (i + (i % 3 + 1) * torch.arange(LENGTH)) % VOCABULARY
        return {"input_ids": tokens, "labels": tokens}


def train(steps: int, rate: float, norms: torch.Tensor | None = None) -> tuple:
    """(the last logged loss, the norms of this run)."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    recorder = GradNormRecorder(optimizer, norm="l1")  # Adam: the L1 norm
    if norms is None:
        schedule = LinearDecay(optimizer, steps)
    else:
        schedule = RefinedSchedule(optimizer, norms, steps, norm="l1")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=8, max_grad_norm=0,
            logging_steps=max(1, steps // 4), save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=Counting(), optimizers=(optimizer, schedule)
        )
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logged:
        step, rate, loss = entry["step"], entry["learning_rate"], entry["loss"]
        print(f"  step {step:3d}  rate {rate:.5f}  loss {loss:.3f}")
    return logged[-1]["loss"], recorder.norms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=0.003)
    parser.add_argument("--refined-rate", type=float, default=0.006)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("linear decay, recorded")
    linear, norms = train(args.steps, args.rate)
    print("refined")
    refined, _ = train(args.steps, args.refined_rate, norms)
    print(f"last loss: linear {linear:.3f}, refined {refined:.3f}")


if __name__ == "__main__":
    main()
