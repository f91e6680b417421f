"""Configuration files in the authors' format are read and translated."""

import warnings

import pytest

from diffmic_fast.config.run import read_config

TEXT = """
data:
    dataset: "APTOS"
    traindata: "lists/train.pkl"
    testdata: "lists/test.pkl"
    label_min_max: [0.001, 0.999]
    num_classes: 5
    num_workers: 8
    dataroot:
    seed: 2000
model:
    type: "simple"
    data_dim: 6144
    n_input_channels: 3
    n_input_padding: 0
    feature_dim: 6144
    hidden_dim: 6144
    cat_x: True
    cat_y_pred: True
    arch: resnet18
    var_type: fixedlarge
    ema_rate: 0.9999
    ema: True
diffusion:
    beta_schedule: linear
    beta_start: 0.0001
    beta_end: 0.02
    timesteps: 1000
    vis_step: 100
    num_figs: 10
    include_guidance: True
    apply_aux_cls: True
    trained_aux_cls_ckpt_path:
    trained_aux_cls_ckpt_name: aux_ckpt.pth
    aux_cls:
        arch: sevit
        n_pretrain_epochs: 10
        joint_train: True
training:
    batch_size: 32
    n_epochs: 1000
    warmup_epochs: 40
    snapshot_freq: 1000000000
    logging_freq: 120
    validation_freq: 20000
    image_folder: training_image_samples
sampling:
    batch_size: 1
    last_only: True
    image_folder: sampling_image_samples
testing:
    batch_size: 64
    plot_freq: 200
    n_bins: 10
optim:
    weight_decay: 0.0
    optimizer: Adam
    lr: 0.001
    beta1: 0.9
    amsgrad: False
    eps: 0.00000001
    grad_clip: 1.0
aux_optim:
    weight_decay: 0.0
    optimizer: Adam
    lr: 0.0002
    beta1: 0.9
    amsgrad: True
    eps: 0.00000001
    grad_clip: 1.0
"""


def read(tmp_path, text):
    path = tmp_path / "aptos.yml"
    path.write_text(text)
    return read_config(path)


def test_translation_emits_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = read(tmp_path, TEXT)
    assert (config.data.kind, config.data.train_table, config.data.test_table) == (
        "pkl", "lists/train.pkl", "lists/test.pkl",
    )  # fmt: skip
    assert (config.data.num_classes, config.data.workers, config.seed) == (5, 8, 2000)
    model = config.model
    assert (model.classes, model.feature_dim, model.encoder) == (5, 6144, "resnet18")
    assert model.guidance_trunk == "resnet50"
    assert (model.timesteps, model.schedule, model.beta_start, model.beta_end) == (
        1000, "linear", 1e-4, 2e-2,
    )  # fmt: skip
    training = config.training
    assert (training.batch_size, training.epochs, training.warmup_epochs) == (32, 1000, 40)
    assert (training.guidance_epochs, training.learning_rate) == (10, 1e-3)
    assert (training.guidance_learning_rate, training.gradient_clip) == (2e-4, 1.0)
    assert training.ema_decay == 0.9999
    assert (config.sampling.sampler, config.sampling.steps) == ("ddpm_truncated", 60)
    assert config.sampling.batch_size == 64


def test_test_timesteps_follow_the_dataset_and_ema_can_be_off(tmp_path):
    config = read(tmp_path, TEXT.replace('"APTOS"', '"HAM10000"').replace("ema: True", "ema: no"))
    assert config.sampling.steps == 250
    assert config.training.ema_decay is None


def test_unknown_keys_warn_and_unknown_sections_raise(tmp_path):
    with pytest.warns(UserWarning, match=r"'n_epoch' in section 'training'.*'n_epochs'"):
        read(tmp_path, TEXT.replace("n_epochs: 1000", "n_epochs: 9\n    n_epoch: 3"))
    with pytest.raises(ValueError, match=r"unknown section 'modell'.*'model'"):
        read(tmp_path, TEXT + "modell:\n    arch: resnet18\n")


def test_unsupported_settings_raise_or_warn(tmp_path):
    with pytest.raises(ValueError, match="include_guidance is false"):
        read(tmp_path, TEXT.replace("include_guidance: True", "include_guidance: False"))
    with pytest.raises(ValueError, match="num_classes is missing"):
        read(tmp_path, TEXT.replace("num_classes: 5", ""))
    with pytest.raises(ValueError, match=r"num_classes must be a valid integer, got 'five'"):
        read(tmp_path, TEXT.replace("num_classes: 5", "num_classes: five"))
    with pytest.warns(UserWarning, match="optim.optimizer 'SGD' is not supported"):
        read(tmp_path, TEXT.replace("optimizer: Adam\n    lr: 0.001", "optimizer: SGD\n    lr: 1"))
