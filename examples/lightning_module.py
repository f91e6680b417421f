"""Train DiffMIC as a Lightning module.

    python examples/lightning_module.py --out runs/lightning
    python examples/lightning_module.py --out runs/lightning --config own.yml --epochs 100

`DiffMICModule` has two losses, which share one optimizer: the guidance model is a classifier, and `DiffMIC.loss`, the
loss of the denoiser, passes no gradient to it. The guidance model is trained alone for the first epochs, as published.

The default configuration, `tiny.yml`, trains on drawn images in seconds and learns next to nothing. For real training
name your images in a YAML file (docs/usage.md, "Configuration"), start from ImageNet weights (`model.encoder_weights`,
`model.guidance_weights`) and train for hundreds of epochs. On several GPUs take the package's own trainer, which can
synchronise batch statistics and gather the rows of the MMD terms (docs/usage.md, "Several processes").

Needs `pip install '.[examples]'` (pytorch-lightning).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader

from diffmic_fast import DiffMIC, Preprocessing
from diffmic_fast.config.run import RunConfig, read_config
from diffmic_fast.data.sources import open_source
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.training.datasets import make_dataset

TINY = Path(__file__).with_name("tiny.yml")


class DiffMICModule(pl.LightningModule):
    """DiffMIC with its losses and optimizer."""

    def __init__(self, config: RunConfig, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.settings = config.training
        self.model = DiffMIC(config.model)
        self.model.class_names = classes
        self.model.preprocessing = Preprocessing.from_augmentation(config.data.augmentation)
        self.model.sampling = SamplingOptions.from_config(config.sampling)

    def on_train_epoch_start(self) -> None:
        """Augment every epoch differently."""
        self.trainer.train_dataloader.dataset.set_epoch(self.current_epoch)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The sum of both losses."""
        images, labels, _ = batch
        fused, _, _ = self.model.guidance(images)
        loss = F.cross_entropy(fused, labels)
        self.log("guidance_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        if self.current_epoch >= self.settings.guidance_epochs:
            denoising = self.model.loss(images, labels, draws=self.settings.draws).total
            self.log("denoiser_loss", denoising, on_step=False, on_epoch=True, prog_bar=True)
            loss = loss + denoising
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient of the denoiser alone."""
        torch.nn.utils.clip_grad_norm_(self.model.denoiser.parameters(), 1.0)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """Accuracy of the diffusion."""
        images, labels, _ = batch
        correct = self.model.predict(images).label == labels
        self.log("accuracy", correct.float().mean(), batch_size=len(labels), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """Adam with a learning rate for each part, and a half-cosine over the epochs."""
        rates = self.settings
        groups = [
            {"params": self.model.denoiser.parameters(), "lr": rates.learning_rate},
            {"params": self.model.guidance.parameters(), "lr": rates.guidance_learning_rate},
        ]
        optimizer = torch.optim.Adam(groups)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return [optimizer], [cosine]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description="Train DiffMIC as a Lightning module.")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--config", default=TINY, help="a preset or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args(arguments)

    config = read_config(args.config, args.set)
    pl.seed_everything(config.seed)
    train = make_dataset(config, open_source(config.data, "train"), train=True)
    validation = make_dataset(config, open_source(config.data, "validation"), train=False)
    size = config.training.batch_size
    module = DiffMICModule(config, train.table.classes)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="auto",
        devices=1,
        logger=pl.loggers.CSVLogger(args.out),
        callbacks=[EMAWeightAveraging(decay=config.training.ema_decay or 0.9999)],
        log_every_n_steps=1,
    )
    loader = DataLoader(train, batch_size=size, shuffle=True, drop_last=True)  # for BatchNorm
    trainer.fit(module, loader, DataLoader(validation, batch_size=size))
    folder = Path(args.out) / "model"
    module.model.save_pretrained(folder, overwrite=True)
    print(f'saved; load it with DiffMIC.from_pretrained("{folder}")')


if __name__ == "__main__":
    main()
