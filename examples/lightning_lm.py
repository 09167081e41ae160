"""Trains a small language model with Lightning and a loss that stores no logits.

The LightningModule's training_step hands hidden states to ChunkedLMHeadLoss, which holds the output
layer; validation does the same without a gradient. The text is Python's own documentation, one
token per byte, so nothing is downloaded.

Run: python examples/lightning_lm.py [--steps 120]
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pydoc_data.topics import topics

import lightning
import torch
from torch import Tensor, nn

from pyloss.integrations.torchtitan import ChunkedLMHeadLoss

LENGTH, VOCABULARY, WIDTH = 64, 256, 96


class Texts(torch.utils.data.Dataset):
    """Pieces of the topics of Python's help(), as byte numbers; one byte more than the length."""

    def __init__(self, first: float, last: float) -> None:
        text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
        tokens = torch.tensor(list(text[int(first * len(text)) : int(last * len(text))]))
        self.pieces = tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, i: int) -> Tensor:
        return self.pieces[i]


class LanguageModel(lightning.LightningModule):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.rnn = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY)
        # The same loss with z-loss in training only; it takes the output layer from the model.
        self.training_loss = ChunkedLMHeadLoss(metrics=("accuracy",), z_loss=1e-4)
        self.validation_loss = ChunkedLMHeadLoss(metrics=("accuracy",))
        for loss in (self.training_loss, self.validation_loss):
            loss.set_lm_head(self.lm_head)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states, before the output layer."""
        return self.rnn(self.embedding(tokens))[0]

    def shared_step(self, loss: ChunkedLMHeadLoss, batch: Tensor, name: str) -> Tensor:
        tokens, labels = batch[:, :-1], batch[:, 1:]
        value, metrics = loss(self(tokens), labels, labels.numel())
        accuracy = metrics["accuracy/mean"]
        self.log_dict({f"{name}_loss": value, f"{name}_accuracy": accuracy}, batch_size=len(batch))
        return value

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.shared_step(self.training_loss, batch, "train")

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.shared_step(self.validation_loss, batch, "valid")

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args().steps

    warnings.filterwarnings("ignore", category=UserWarning)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    lightning.seed_everything(0, verbose=False)
    train = torch.utils.data.DataLoader(Texts(0.0, 0.9), batch_size=16, shuffle=True)
    valid = torch.utils.data.DataLoader(Texts(0.9, 1.0), batch_size=16)
    model = LanguageModel(steps)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=10,
        gradient_clip_val=1.0, num_sanity_val_steps=0, check_val_every_n_epoch=None,
        val_check_interval=max(1, steps // 4),
    )  # fmt: skip

    print("step   validation loss   accuracy")

    class Table(lightning.Callback):
        def on_validation_end(self, trainer: lightning.Trainer, module: LanguageModel) -> None:
            found = trainer.callback_metrics
            loss, accuracy = found["valid_loss"].item(), found["valid_accuracy"].item()
            print(f"{trainer.global_step:4d}   {loss:15.3f}   {accuracy:8.1%}")

    trainer.callbacks.append(Table())
    trainer.validate(model, valid, verbose=False)
    trainer.fit(model, train, valid)


if __name__ == "__main__":
    main()
