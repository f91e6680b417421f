"""Translation of the authors' configuration files (the CARD family of YAML) into ours.

Their files have the sections data, model, diffusion, training, sampling, testing, optim and
aux_optim. Keys that decide the model or its training are carried over; keys about plots, image
folders and logging of their program have no meaning here and are passed over in silence; a key
this translation has never heard of is reported, and so is a value it cannot follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffmic_fast.config.schema import nearest

_SECTIONS = (
    "data",
    "model",
    "diffusion",
    "training",
    "sampling",
    "testing",
    "optim",
    "aux_optim",
)

# Known keys by section. Those not used below change nothing in this package: names of their own
# variants (type, var_type, cat_x ...), numbers of figures and of log lines, folders, and
# measures of regression tasks that the file format shares.
_KNOWN: dict[str, tuple[str, ...]] = {
    "data": (
        "dataset", "seed", "label_min_max", "num_classes", "traindata", "testdata", "valdata",
        "dataroot", "num_workers", "image_size", "data_size", "crop_size", "channels",
        "dataset_size", "gaussian_dequantization", "random_flip", "rescaled", "logit_transform",
        "uniform_dequantization", "dir", "normalize_x", "normalize_y", "train_ratio",
    ),
    "model": (
        "type", "data_dim", "n_input_channels", "n_input_padding", "arch", "feature_dim",
        "hidden_dim", "cat_x", "cat_y_pred", "var_type", "ema_rate", "ema", "x_dim", "y_dim",
        "z_dim", "num_k",
    ),
    "diffusion": (
        "beta_schedule", "beta_start", "beta_end", "timesteps", "test_timesteps", "vis_step",
        "num_figs", "include_guidance", "apply_aux_cls", "trained_aux_cls_ckpt_path",
        "trained_aux_cls_ckpt_name", "trained_aux_cls_log_path", "trained_diffusion_ckpt_path",
        "trained_diffusion_ckpt_name", "aux_cls", "nonlinear_guidance", "noise_prior",
        "conditioning_signal",
    ),
    "training": (
        "batch_size", "n_epochs", "n_minibatches_per_epoch", "n_iters", "n_ce_epochs_warmup",
        "n_ce_epochs_interval", "n_sanity_check_epochs", "warmup_epochs", "add_ce_loss",
        "snapshot_freq", "logging_freq", "validation_freq", "image_folder", "n_ckpts_to_keep",
        "n_steps_req_grad", "patience", "lambda_ce", "log_all",
    ),
    "sampling": ("batch_size", "sampling_size", "last_only", "image_folder", "n_steps"),
    "testing": (
        "batch_size", "sampling_size", "last_only", "plot_freq", "image_folder", "n_samples",
        "n_bins", "compute_metric_all_steps", "mean_t", "coverage_t", "nll_t", "nll_global_var",
        "nll_test_var_type", "trimmed_mean_range", "PICP_range", "make_plot", "squared_plot",
        "plot_true", "plot_gen", "fig_size", "one_plot_multi_steps", "test_timesteps",
    ),
    "optim": (
        "optimizer", "lr", "weight_decay", "beta1", "amsgrad", "eps", "grad_clip", "lr_schedule",
        "min_lr", "warmup_epochs",
    ),
    "aux_optim": (
        "optimizer", "lr", "weight_decay", "beta1", "amsgrad", "eps", "grad_clip", "lr_schedule",
        "min_lr",
    ),
}  # fmt: skip
_AUX_CLS = (
    "arch", "feature_dim", "hidden_dim", "hidden_layers", "use_batchnorm", "negative_slope",
    "dropout_rate", "batch_size", "n_pretrain_epochs", "n_epochs", "logging_interval",
    "joint_train", "pre_train",
)  # fmt: skip

# What their aux_cls.arch is called as a trunk. Their guidance model is a ResNet-50 whatever the
# entry says; names of other families are leftovers of the file format.
_TRUNKS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "densenet121")

# Published test timesteps and guidance epochs by dataset; their program has them on its command
# line or as defaults, not in every file.
_TEST_STEPS = {"APTOS": 60, "APTOS2019": 60, "HAM10000": 250, "ISIC": 250}


def is_authors(values: Mapping[str, Any]) -> bool:
    """Whether a configuration is of the authors' kind: it has sections that ours does not have."""
    return any(key in values for key in ("diffusion", "optim", "aux_optim", "testing"))


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ValueError(f"config: section '{name}' wants keys with values, got {section!r}")
    return section


def _report(section: str, keys: Mapping[str, Any], known: tuple[str, ...]) -> list[str]:
    reports = []
    for key in keys:
        if key not in known:
            hint = nearest(str(key), known)
            reports.append(
                f"unknown key '{key}' in section '{section}' is ignored; the nearest known key is "
                f"'{hint}'"
            )
    return reports


def _copy(source: Mapping[str, Any], pairs: Mapping[str, str], target: dict[str, Any]) -> None:
    for theirs, ours in pairs.items():
        if source.get(theirs) is not None:
            target[ours] = source[theirs]


def _switched(source: Mapping[str, Any], key: str, default: bool) -> bool:
    return bool(source.get(key, default))


def translate(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our configuration (plain dicts) for one of the authors' files, and a list of reports.

    Reports name unknown keys and settings that cannot be followed. Raises ValueError for an
    unknown section, for a missing number of classes, or for a variant that this package does not
    have (a label diffusion without guidance).
    """
    for name in values:
        if name not in _SECTIONS:
            hint = nearest(str(name), _SECTIONS)
            raise ValueError(
                f"config: unknown section '{name}' in a configuration of the authors' kind; the "
                f"nearest known section is '{hint}'"
            )
    reports = []
    for name in _SECTIONS:
        reports += _report(name, _section(values, name), _KNOWN[name])
    data, model, diffusion = (_section(values, s) for s in ("data", "model", "diffusion"))
    training, optim, aux_optim = (_section(values, s) for s in ("training", "optim", "aux_optim"))
    testing, sampling = _section(values, "testing"), _section(values, "sampling")
    aux = diffusion.get("aux_cls") or {}
    reports += _report("diffusion.aux_cls", aux, _AUX_CLS)
    for key in ("include_guidance", "apply_aux_cls"):
        if not _switched(diffusion, key, True):
            raise ValueError(
                f"config: diffusion.{key} is false: a diffusion without the guidance model is "
                "not DiffMIC and is not offered here; remove the key or set it to true"
            )

    our_model: dict[str, Any] = {}
    _copy(data, {"num_classes": "classes"}, our_model)
    if "classes" not in our_model:
        raise ValueError("config: data.num_classes is missing; the number of classes is needed")
    _copy(model, {"arch": "encoder", "feature_dim": "feature_dim"}, our_model)
    _copy(
        diffusion,
        {
            "beta_schedule": "schedule",
            "beta_start": "beta_start",
            "beta_end": "beta_end",
            "timesteps": "timesteps",
        },
        our_model,
    )
    if aux.get("arch") in _TRUNKS:
        our_model["guidance_trunk"] = aux["arch"]

    our_training: dict[str, Any] = {}
    _copy(
        training,
        {"batch_size": "batch_size", "n_epochs": "epochs", "warmup_epochs": "warmup_epochs",
         "validation_freq": "validate_every"},
        our_training,
    )  # fmt: skip
    _copy(
        optim,
        {"lr": "learning_rate", "min_lr": "min_learning_rate", "weight_decay": "weight_decay",
         "grad_clip": "gradient_clip"},
        our_training,
    )  # fmt: skip
    _copy(
        aux_optim,
        {"lr": "guidance_learning_rate", "weight_decay": "guidance_weight_decay"},
        our_training,
    )
    _copy(aux, {"n_pretrain_epochs": "guidance_epochs"}, our_training)
    if not _switched(model, "ema", True):
        our_training["ema_decay"] = None
    else:
        _copy(model, {"ema_rate": "ema_decay"}, our_training)
    for name, section in (("optim", optim), ("aux_optim", aux_optim)):
        if str(section.get("optimizer", "Adam")).lower() != "adam":
            reports.append(
                f"{name}.optimizer {section['optimizer']!r} is not offered; Adam is used"
            )
    if not _switched(optim, "lr_schedule", True):
        reports.append("optim.lr_schedule false is not offered; warm-up and half-cosine are used")

    our_sampling: dict[str, Any] = {"sampler": "ddpm_truncated"}
    timesteps = our_model.get("timesteps", 1000)
    dataset = str(data.get("dataset", ""))
    steps = diffusion.get("test_timesteps", testing.get("test_timesteps"))
    if steps is None:
        steps = _TEST_STEPS.get(dataset.upper(), 60)
    if isinstance(steps, int) and isinstance(timesteps, int):
        steps = min(steps, timesteps)
    our_sampling["steps"] = steps
    size = testing.get("batch_size", sampling.get("batch_size"))
    if size is not None:
        our_sampling["batch_size"] = size

    result: dict[str, Any] = {
        "data": _data(data, dataset, reports),
        "model": our_model,
        "training": our_training,
        "sampling": our_sampling,
    }
    if data.get("seed") is not None:
        result["seed"] = data["seed"]
    return result, reports


def _data(data: Mapping[str, Any], dataset: str, reports: list[str]) -> dict[str, Any]:
    """The data section: a .pkl list each for training and test, a CSV, or folders of classes.

    Their lists are named relative to the working directory, ours relative to the root of the
    images: a list that is there as they name it is passed on by its full path.
    """

    def located(name: Any) -> str:
        path = Path(str(name))
        return str(path.absolute() if data.get("dataroot") and path.exists() else path)

    ours: dict[str, Any] = {"num_classes": data["num_classes"]}
    train, test = data.get("traindata"), data.get("testdata")
    ours["root"] = str(data["dataroot"]) if data.get("dataroot") else "."
    if train is None:
        reports.append(
            f"data.traindata is missing (dataset {dataset!r}); set data.kind, data.root and so on "
            "of this package's configuration"
        )
        ours["kind"] = "folder"
    else:
        suffix = Path(str(train)).suffix.lower()
        ours["kind"] = {".pkl": "pkl", ".csv": "csv", ".npz": "medmnist"}.get(suffix, "folder")
        ours["train_table"] = located(train)
        if test is not None:
            ours["test_table"] = located(test)
        if data.get("valdata") is not None:
            ours["validation_table"] = located(data["valdata"])
    if isinstance(data.get("num_workers"), int):
        ours["workers"] = data["num_workers"]
    return ours
