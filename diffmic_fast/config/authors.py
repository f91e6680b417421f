"""Translation of the authors' configuration files (the CARD family of YAML) into ours.

Their files have the sections data, model, diffusion, training, sampling, testing, optim and aux_optim. Keys that
decide the model or its training are translated. Keys about plots, image folders and logging of their program have no
meaning here and are ignored silently; unknown keys and values that are not supported are reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffmic_fast.config.errors import nearest

# Keys that their files may have, by section. Those not used below have no effect in this package: names of their own
# variants (type, var_type, cat_x ...), numbers of figures and of log lines, folders, and metrics of regression tasks,
# for which the file format is used too.
_KNOWN: dict[str, tuple[str, ...]] = {
    "data": (
        "dataset", "seed", "label_min_max", "num_classes", "traindata", "testdata", "valdata", "dataroot",
        "num_workers", "image_size", "data_size", "crop_size", "channels", "dataset_size", "gaussian_dequantization",
        "random_flip", "rescaled", "logit_transform", "uniform_dequantization", "dir", "normalize_x", "normalize_y",
        "train_ratio",
    ),
    "model": (
        "type", "data_dim", "n_input_channels", "n_input_padding", "arch", "feature_dim", "hidden_dim", "cat_x",
        "cat_y_pred", "var_type", "ema_rate", "ema", "x_dim", "y_dim", "z_dim", "num_k",
    ),
    "diffusion": (
        "beta_schedule", "beta_start", "beta_end", "timesteps", "test_timesteps", "vis_step", "num_figs",
        "include_guidance", "apply_aux_cls", "trained_aux_cls_ckpt_path", "trained_aux_cls_ckpt_name",
        "trained_aux_cls_log_path", "trained_diffusion_ckpt_path", "trained_diffusion_ckpt_name", "aux_cls",
        "nonlinear_guidance", "noise_prior", "conditioning_signal",
    ),
    "training": (
        "batch_size", "n_epochs", "n_minibatches_per_epoch", "n_iters", "n_ce_epochs_warmup", "n_ce_epochs_interval",
        "n_sanity_check_epochs", "warmup_epochs", "add_ce_loss", "snapshot_freq", "logging_freq", "validation_freq",
        "image_folder", "n_ckpts_to_keep", "n_steps_req_grad", "patience", "lambda_ce", "log_all",
    ),
    "sampling": (
        "batch_size", "sampling_size", "last_only", "image_folder", "n_steps",
    ),
    "testing": (
        "batch_size", "sampling_size", "last_only", "plot_freq", "image_folder", "n_samples", "n_bins",
        "compute_metric_all_steps", "mean_t", "coverage_t", "nll_t", "nll_global_var", "nll_test_var_type",
        "trimmed_mean_range", "PICP_range", "make_plot", "squared_plot", "plot_true", "plot_gen", "fig_size",
        "one_plot_multi_steps", "test_timesteps",
    ),
    "optim": (
        "optimizer", "lr", "weight_decay", "beta1", "amsgrad", "eps", "grad_clip", "lr_schedule", "min_lr",
        "warmup_epochs",
    ),
    "aux_optim": (
        "optimizer", "lr", "weight_decay", "beta1", "amsgrad", "eps", "grad_clip", "lr_schedule", "min_lr",
    ),
    "diffusion.aux_cls": (
        "arch", "feature_dim", "hidden_dim", "hidden_layers", "use_batchnorm", "negative_slope", "dropout_rate",
        "batch_size", "n_pretrain_epochs", "n_epochs", "logging_interval", "joint_train", "pre_train",
    ),
}  # fmt: skip

_SECTIONS = tuple(section for section in _KNOWN if "." not in section)

# Our keys and where their files have them.
_MODEL = {
    "classes": "data.num_classes", "encoder": "model.arch", "feature_dim": "model.feature_dim",
    "schedule": "diffusion.beta_schedule", "beta_start": "diffusion.beta_start",
    "beta_end": "diffusion.beta_end", "timesteps": "diffusion.timesteps",
}  # fmt: skip
_TRAINING = {
    "batch_size": "training.batch_size",
    "epochs": "training.n_epochs",
    "warmup_epochs": "training.warmup_epochs",
    "validate_every": "training.validation_freq",
    "learning_rate": "optim.lr",
    "min_learning_rate": "optim.min_lr",
    "weight_decay": "optim.weight_decay",
    "gradient_clip": "optim.grad_clip",
    "guidance_learning_rate": "aux_optim.lr",
    "guidance_weight_decay": "aux_optim.weight_decay",
    "guidance_epochs": "diffusion.aux_cls.n_pretrain_epochs",
    "ema_decay": "model.ema_rate",
}

# Values of their aux_cls.arch that name a trunk. Their guidance model is a ResNet-50 whatever the entry says; names of
# other families are leftovers of the file format.
_TRUNKS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "densenet121")

# Published test timesteps by dataset; their program has them on its command line or as defaults, not in every file.
_TEST_STEPS = {"APTOS": 60, "APTOS2019": 60, "HAM10000": 250, "ISIC": 250}


def is_authors(values: Mapping[str, Any]) -> bool:
    """Whether a configuration has the authors' format: it has sections that ours does not have."""
    return any(key in values for key in ("diffusion", "optim", "aux_optim", "testing"))


def translate(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Translate the content of one of the authors' files.

    Returns:
        Our configuration as plain dicts, and reports of unknown keys and settings that are not supported.

    Raises:
        ValueError: an unknown section, no number of classes, or a variant that is not DiffMIC (no guidance model).
    """
    for name in values:
        if name not in _SECTIONS:
            raise ValueError(
                f"config: unknown section '{name}' in a configuration in the authors' format; the nearest known "
                f"section is '{nearest(str(name), _SECTIONS)}'"
            )
    theirs = {section: _section(values, section) for section in _SECTIONS}
    theirs["diffusion.aux_cls"] = theirs["diffusion"].get("aux_cls") or {}
    reports = [
        f"unknown key '{key}' in section '{section}' is ignored; the nearest known key is "
        f"'{nearest(str(key), known)}'"
        for section, known in _KNOWN.items()
        for key in theirs[section]
        if key not in known
    ]
    for key in ("include_guidance", "apply_aux_cls"):
        if not theirs["diffusion"].get(key, True):
            raise ValueError(
                f"config: diffusion.{key} is false: a diffusion without the guidance model is not DiffMIC and is not "
                "supported; remove the key or set it to true"
            )
    model = _translated(theirs, _MODEL)
    if "classes" not in model:
        raise ValueError("config: data.num_classes is missing; the number of classes is needed")
    if theirs["diffusion.aux_cls"].get("arch") in _TRUNKS:
        model["guidance_trunk"] = theirs["diffusion.aux_cls"]["arch"]
    result = {
        "data": _data(theirs["data"], reports),
        "model": model,
        "training": _training(theirs, reports),
        "sampling": _sampling(theirs, model.get("timesteps", 1000)),
    }
    if theirs["data"].get("seed") is not None:
        result["seed"] = theirs["data"]["seed"]
    return result, reports


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ValueError(f"config: section '{name}' must be a mapping, got {section!r}")
    return section


def _translated(theirs: Mapping[str, Mapping[str, Any]], keys: Mapping[str, str]) -> dict[str, Any]:
    """Our keys with their values, of those that are given."""
    ours = {}
    for key, path in keys.items():
        section, _, name = path.rpartition(".")
        if theirs[section].get(name) is not None:
            ours[key] = theirs[section][name]
    return ours


def _training(theirs: Mapping[str, Mapping[str, Any]], reports: list[str]) -> dict[str, Any]:
    ours = _translated(theirs, _TRAINING)
    if not theirs["model"].get("ema", True):
        ours["ema_decay"] = None
    for section in ("optim", "aux_optim"):
        optimizer = theirs[section].get("optimizer", "Adam")
        if str(optimizer).lower() != "adam":
            reports.append(f"{section}.optimizer {optimizer!r} is not supported; Adam is used")
    if not theirs["optim"].get("lr_schedule", True):
        reports.append("optim.lr_schedule false is not supported; warm-up and half-cosine are used")
    return ours


def _sampling(theirs: Mapping[str, Mapping[str, Any]], timesteps: Any) -> dict[str, Any]:
    steps = theirs["diffusion"].get("test_timesteps", theirs["testing"].get("test_timesteps"))
    if steps is None:
        steps = _TEST_STEPS.get(str(theirs["data"].get("dataset", "")).upper(), 60)
    if isinstance(steps, int) and isinstance(timesteps, int):
        steps = min(steps, timesteps)
    ours = {"sampler": "ddpm_truncated", "steps": steps}
    size = theirs["testing"].get("batch_size", theirs["sampling"].get("batch_size"))
    if size is not None:
        ours["batch_size"] = size
    return ours


def _data(data: Mapping[str, Any], reports: list[str]) -> dict[str, Any]:
    """The data section: a .pkl list each for training and test, a CSV, or folders of classes.

    Their lists are named relative to the working directory, ours relative to the root of the images: a list that
    exists as they name it is passed on by its absolute path.
    """

    def located(name: Any) -> str:
        path = Path(str(name))
        return str(path.absolute() if data.get("dataroot") and path.exists() else path)

    ours: dict[str, Any] = {"num_classes": data["num_classes"]}
    ours["root"] = str(data["dataroot"]) if data.get("dataroot") else "."
    train = data.get("traindata")
    if train is None:
        reports.append(
            f"data.traindata is missing (dataset {str(data.get('dataset', ''))!r}); set data.kind, data.root and so "
            "on of this package's configuration"
        )
        ours["kind"] = "folder"
    else:
        suffix = Path(str(train)).suffix.lower()
        ours["kind"] = {".pkl": "pkl", ".csv": "csv", ".npz": "medmnist"}.get(suffix, "folder")
        for split, name in (
            ("train", train),
            ("test", data.get("testdata")),
            ("validation", data.get("valdata")),
        ):
            if name is not None:
                ours[f"{split}_table"] = located(name)
    if isinstance(data.get("num_workers"), int):
        ours["workers"] = data["num_workers"]
    return ours
