"""Train DiffMIC in a loop in the style of timm: its optimizers, schedulers, moving average and meters.

    python examples/timm_loop.py --out runs/timm
    python examples/timm_loop.py --out runs/timm --config own.yml --opt adamw --epochs 100

`DiffMIC` is an `nn.Module` with two parts to train. The guidance model is a classifier; `DiffMIC.loss` is the loss of
the denoiser, and passes no gradient to the guidance model, so both losses can be added. (The published program trains
the guidance model alone for some epochs first, as `lightning_module.py` does.)

The default configuration, `tiny.yml`, trains on drawn images in seconds and learns next to nothing. For real training
name your images in a YAML file (docs/usage.md, "Configuration"), start from ImageNet weights (`model.encoder_weights`,
`model.guidance_weights`) and train for hundreds of epochs, or take the package's own trainer (`train_on_csv.py`), which
trains in phases, calibrates and resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, ModelEmaV3, accuracy, dispatch_clip_grad
from torch.utils.data import DataLoader

from diffmic_fast import DiffMIC, Preprocessing
from diffmic_fast.config.run import read_config
from diffmic_fast.data.sources import open_source
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.training.datasets import make_dataset

TINY = Path(__file__).with_name("tiny.yml")


@torch.no_grad()
def validate(model: DiffMIC, loader: DataLoader) -> float:
    """Accuracy in percent."""
    meter = AverageMeter()
    device = next(model.parameters()).device
    for images, labels, _ in loader:
        prediction = model.predict(images.to(device))
        (top1,) = accuracy(prediction.probabilities, labels.to(device), topk=(1,))
        meter.update(float(top1), len(labels))
    return float(meter.avg)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description="Train DiffMIC in a loop in the style of timm.")
    parser.add_argument("--out", required=True, help="folder of the model to write")
    parser.add_argument("--config", default=TINY, help="a preset or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--opt", default="adam", help="an optimizer of timm")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)

    config = read_config(args.config, args.set)
    train = make_dataset(config, open_source(config.data, "train"), train=True)
    validation = make_dataset(config, open_source(config.data, "validation"), train=False)
    size = config.training.batch_size
    # BatchNorm needs two images: a last batch of one would be an error.
    loader = DataLoader(train, batch_size=size, shuffle=True, drop_last=True)

    torch.manual_seed(config.seed)
    model = DiffMIC(config.model).to(args.device)
    model.class_names = train.table.classes
    model.preprocessing = Preprocessing.from_augmentation(config.data.augmentation)
    model.sampling = SamplingOptions.from_config(config.sampling)

    groups = [
        {"params": model.denoiser.parameters(), "lr": config.training.learning_rate},
        {"params": model.guidance.parameters(), "lr": config.training.guidance_learning_rate},
    ]
    optimizer = create_optimizer_v2(groups, opt=args.opt, weight_decay=0.0)
    scheduler = CosineLRScheduler(optimizer, t_initial=args.epochs, warmup_t=1, warmup_lr_init=1e-5)
    ema = ModelEmaV3(model, decay=config.training.ema_decay or 0.9999)

    for epoch in range(args.epochs):
        train.set_epoch(epoch)  # of the augmentation
        model.train()
        guidance_loss, denoiser_loss = AverageMeter(), AverageMeter()
        for images, labels, _ in loader:
            images, labels = images.to(args.device), labels.to(args.device)
            fused, _, _ = model.guidance(images)
            classification = F.cross_entropy(fused, labels)
            denoising = model.loss(images, labels, draws=config.training.draws).total
            optimizer.zero_grad()
            (classification + denoising).backward()
            dispatch_clip_grad(model.denoiser.parameters(), 1.0)
            optimizer.step()
            ema.update(model)
            guidance_loss.update(classification.item(), len(labels))
            denoiser_loss.update(denoising.item(), len(labels))
        scheduler.step(epoch + 1)
        print(
            f"epoch {epoch + 1}/{args.epochs}: guidance loss {guidance_loss.avg:.4f}, "
            f"denoiser loss {denoiser_loss.avg:.4f}, "
            f"accuracy {validate(ema.module, DataLoader(validation, batch_size=size)):.1f} %"
        )

    ema.module.save_pretrained(args.out, overwrite=True)
    print(f'saved; load it with DiffMIC.from_pretrained("{args.out}")')


if __name__ == "__main__":
    main()
