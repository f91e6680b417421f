"""Code written against the published program, in which only the import changes.

    python examples/swap_import.py CONFIG.yml ckpt.pth aux_ckpt.pth

`diffmic_fast.compat` has the names, argument order and return values of the published program (docs/usage.md, "In place
of the published program"). CONFIG.yml is its configuration file. ckpt.pth and aux_ckpt.pth are files of its training,
of denoiser and guidance model: lists whose first entry is a state dict, which loads with `strict=True`. The command
`diffmic-fast convert MODEL ckpt.pth --to published` writes such files too.

The images here are random numbers, of which a model says nothing useful; replace `torch.randn` by your data loader.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from torch import Tensor

# The only change: these names came from the modules of the published program.
from diffmic_fast.compat import DCG, ConditionalModel, make_beta_schedule, p_sample_loop


def namespace(value: Any) -> Any:
    """A nested mapping as the namespace that the published program makes of its configuration."""
    if not isinstance(value, dict):
        return value
    return SimpleNamespace(**{key: namespace(part) for key, part in value.items()})


def state_dict(path: str) -> dict[str, Tensor]:
    """The first entry of a checkpoint, without the prefix of DataParallel."""
    state = torch.load(path, map_location="cpu", weights_only=True)[0]
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


@torch.no_grad()
def sample(
    config: Any, model: ConditionalModel, guidance: DCG, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Probabilities [B, C] of the guidance model, and of one whole reverse chain per image."""
    diffusion = config.diffusion
    betas = make_beta_schedule(
        diffusion.beta_schedule, diffusion.timesteps, diffusion.beta_start, diffusion.beta_end
    )
    alphas = 1.0 - betas
    one_minus_alphas_bar_sqrt = torch.sqrt(1 - alphas.cumprod(dim=0))
    y_fusion, _, _ = guidance(images)
    y_hat = y_fusion.softmax(dim=1)
    y_0 = p_sample_loop(
        model,
        images,
        y_hat,
        y_hat,
        diffusion.timesteps,
        alphas,
        one_minus_alphas_bar_sqrt,
        only_last_sample=True,
    )
    return y_hat, y_0.softmax(dim=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description="Sample with files of the published program.")
    parser.add_argument("config", help="the published program's configuration")
    parser.add_argument("checkpoint", help="of the denoiser")
    parser.add_argument("guidance", help="of the guidance model")
    parser.add_argument("--images", type=int, default=2, help="number of random images")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    with open(args.config, encoding="utf-8") as file:
        config = namespace(yaml.safe_load(file))
    model = ConditionalModel(config, guidance=True)
    model.load_state_dict(state_dict(args.checkpoint), strict=True)
    guidance = DCG(config)
    guidance.load_state_dict(state_dict(args.guidance), strict=True)
    model.eval()
    guidance.eval()

    torch.manual_seed(args.seed)  # the noise is drawn in the published order
    size = config.data.image_size
    images = torch.randn(args.images, 3, size, size)
    for number, (prior, probabilities) in enumerate(
        zip(*sample(config, model, guidance, images), strict=True)
    ):
        print(f"image {number}: guidance {prior.tolist()}, diffusion {probabilities.tolist()}")


if __name__ == "__main__":
    main()
