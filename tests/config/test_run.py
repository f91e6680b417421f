"""Configurations: presets, files, overrides, and the errors for invalid ones."""

import dataclasses

import pytest

from diffmic_fast.config.run import RunConfig, TrainingConfig, presets, read_config


def test_presets_load_and_round_trip(tmp_path):
    assert set(presets()) == {
        "pmg2000", "aptos2019", "ham10000", "aptos2019_small", "isic2018_small", "chest_xray_small", "demo",
    }  # fmt: skip
    for name in presets():
        config = read_config(name)
        config.save(tmp_path / "config.yml")
        assert read_config(tmp_path / "config.yml") == config
        assert RunConfig.from_dict(config.to_dict()) == config


def test_published_settings():
    aptos, ham = read_config("aptos2019"), read_config("ham10000")
    assert (aptos.model.classes, aptos.model.feature_dim, aptos.model.timesteps) == (5, 6144, 1000)
    assert (aptos.model.schedule, aptos.model.beta_start, aptos.model.beta_end) == (
        "linear", 1e-4, 2e-2,
    )  # fmt: skip
    assert (aptos.training.batch_size, ham.training.batch_size) == (32, 64)
    assert (aptos.sampling.steps, ham.sampling.steps) == (60, 250)
    assert (aptos.training.epochs, aptos.training.warmup_epochs) == (1000, 40)
    assert aptos.training.guidance_epochs == 15
    assert ham.model.classes == 7
    assert read_config("pmg2000").model.classes == 4
    chest = read_config("chest_xray_small")
    assert chest.data.train_folds == (1, 2, 3) and chest.data.test_folds == (0,)


# What the published method does not have, with the value that leaves it out.
EXTENSIONS = {
    "draws": 1, "classifier_ema_decay": None, "classifier_dropout": 0.0, "classifier_head_factor": 1.0,
    "guidance_gradient_clip": None, "encoder_epochs": 0, "feature_epochs": 0, "joint_guidance": True,
    "prior_dropout": 0.0, "label_smoothing": 0.0, "ordinal": False, "balance": 0.0, "guidance_warmup_epochs": 0.0,
    "guidance_cosine": False, "encoder_learning_rate": None,
}  # fmt: skip


@pytest.mark.parametrize("name", ["pmg2000", "aptos2019", "ham10000"])
def test_published_presets_leave_the_extensions_out(name):
    config = read_config(name)
    for key, value in EXTENSIONS.items():
        assert getattr(config.training, key) == value, key
        assert getattr(TrainingConfig(), key) == value, key
    assert not config.model.crop_foreground and config.model.crop_channels == "first"
    assert (config.sampling.views, config.sampling.samples) == (1, 1)


def test_overrides_are_parsed_as_yaml():
    config = read_config(
        "pmg2000",
        ["training.batch_size=16", "training.learning_rate=1e-4", "training.gradient_clip=null",
         "data.augmentation.horizontal_flip=false", "sampling.steps=7"],
    )  # fmt: skip
    assert config.training.batch_size == 16
    assert config.training.learning_rate == 1e-4
    assert config.training.gradient_clip is None
    assert config.data.augmentation.horizontal_flip is False
    assert config.sampling.steps == 7


def test_unknown_keys_name_section_and_nearest_known_key(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text("data: {kind: folder}\nmodel: {classes: 3}\ntraining: {batch_sise: 8}\n")
    with pytest.raises(ValueError, match=r"'batch_sise' in section 'training'.*'batch_size'"):
        read_config(path)
    with pytest.raises(ValueError, match=r"'modle' at the top level.*'model'"):
        read_config("pmg2000", ["modle.classes=3"])
    with pytest.raises(ValueError, match=r"'rotaton'.*'data.augmentation'.*'rotation'"):
        read_config("pmg2000", ["data.augmentation.rotaton=3"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batch_size=large", "training.batch_size must be a valid integer, got 'large'"),
        ("training.batch_size=true", "training.batch_size must be a valid integer, got True"),
        ("training.batch_size=8.5", "training.batch_size must be a valid integer, got 8.5"),
        ("training.batch_size=8.0", "training.batch_size must be a valid integer, got 8.0"),
        ("training.batch_size=1", "training.batch_size must be greater than or equal to 2, got 1"),
        ("training.epochs=-1", "training.epochs must be greater than or equal to 0, got -1"),
        (
            "training.learning_rate=fast",
            "training.learning_rate must be a valid number, got 'fast'",
        ),
        ("training.learning_rate=.inf", "training.learning_rate must be a finite number, got inf"),
        ("training.learning_rate=0", "training.learning_rate must be greater than 0, got 0"),
        ("training.min_learning_rate=1", "min_learning_rate must be at most learning_rate 0.001"),
        ("training.ema_decay=1.0", "training.ema_decay must be less than 1, got 1.0"),
        ("training.precision=fp16", "training.precision must be 'fp32', 'bf16' or 'auto'"),
        ("training.tensorboard=1", "training.tensorboard must be a valid boolean, got 1"),
        ("training.epochs=", "training.epochs must be a valid integer, got None"),
        ("model.classes=1", "model.classes must be greater than or equal to 2, got 1"),
        ("model.image_size=-96", "model.image_size must be greater than or equal to 1, got -96"),
        ("model.image_size=16", "model.crop_size must be at most image_size 16, got 32"),
        ("model.schedule=linea", "model.schedule must be one of linear"),
        ("model.beta_end=2", "model.beta_end must be less than 1, got 2"),
        ("model.encoder=18", "model.encoder must be a valid string, got 18"),
        ("sampling.steps=5000", "steps must be in [1, 1000]"),
        ("sampling.steps=null", "steps must be in [1, 1000]"),
        ("sampling.sampler=ddpm", "walks all 1000 timesteps, got steps=60"),
        ("sampling.eta=2", "sampling.eta must be less than or equal to 1, got 2"),
        ("data.kind=foldre", "data.kind must be 'folder', 'csv'"),
        ("data.synthetic_size=a", "data.synthetic_size must be a valid integer, got 'a'"),
        ("data.class_names=[yes, no]", "data.class_names[0] must be a valid string, got True"),
        ("data.class_names=[a, a]", "data.class_names: class names: 'a' is there twice"),
        ("data.train_folds=[0, a]", "data.train_folds[1] must be a valid integer, got 'a'"),
        ("data.train_folds=1", "data: train_folds needs kind csv, got kind folder"),
        ("data.augmentation.std=[1, 1]", "data.augmentation.std[2] is missing"),
        ("data.augmentation.std=[1, 1, 0]", "data.augmentation.std[2] must be greater than 0"),
        ("data.test_table=x", "data: test_table is given, so train_table must be given too"),
        ("data=folder", "data must be a dictionary or an instance of DataConfig, got 'folder'"),
        ("seed=1.5", "seed must be a valid integer, got 1.5"),
        ("seed=-1", "seed must be greater than or equal to 0, got -1"),
        ("training.batch_size", "--set must be section.key=value"),
        ("training..x=3", "--set must be section.key=value"),
        ("training.epochs=[1", "not valid YAML"),
    ],
)
def test_invalid_values_name_key_and_value(override, message):
    with pytest.raises(ValueError) as error:
        read_config("pmg2000", [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_every_error_is_reported_at_once():
    with pytest.raises(ValueError, match=r"training.epochs must be .*; sampling.steps must be"):
        read_config("pmg2000", ["training.epochs=a", "sampling.steps=b"])


def test_integers_stand_for_names_and_single_folds():
    """YAML reads an unquoted class name 0 as a number."""
    config = read_config(
        "chest_xray_small", ["data.class_names=[0, 1, two]", "data.train_folds=2", "data.table=t"]
    )
    assert config.data.class_names == ("0", "1", "two")
    assert config.data.train_folds == (2,)


def test_invalid_values_are_rejected_in_python_too(config):
    with pytest.raises(ValueError, match=r"TrainingConfig\nbatch_size\n.*integer.*input_value='8'"):
        dataclasses.replace(config.training, batch_size="8")
    with pytest.raises(ValueError, match=r"RunConfig\nmodel\.classes\n.*equal to 2.*input_value=1"):
        dataclasses.replace(config, model=dataclasses.replace(config.model, classes=1))
    config.training.batch_size = "8"  # sections are mutable, and are checked again in a RunConfig
    with pytest.raises(ValueError, match=r"RunConfig\ntraining\.batch_size\n"):
        dataclasses.replace(config, seed=1)


def test_missing_files_missing_keys_and_invalid_yaml(tmp_path):
    with pytest.raises(ValueError, match=r"no file 'nothere.yml'.*presets are aptos2019"):
        read_config("nothere.yml")
    path = tmp_path / "c.yml"
    for text, message in (
        ("model: {image_size: 64}\ndata: {kind: folder}", "model.classes is missing"),
        ("model: {classes: 3}", "data is missing"),
        ("model: [3", r"c\.yml, line 1: not valid YAML"),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        ("- a\n- b", "must be a mapping of sections"),
        ("", "must be a mapping of sections"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(path)
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(ValueError, match="not a text file"):
        read_config(path)


def test_an_average_of_the_guidance_needs_epochs_of_its_own() -> None:
    """Joint epochs that train it too would begin from the average; of the encoder alone there is no such epoch."""
    both = {"epochs": 1, "joint_guidance": True, "classifier_ema_decay": 0.9}
    with pytest.raises(ValueError, match="joint_guidance must be false with classifier_ema_decay"):
        TrainingConfig(guidance_epochs=1, **both)
    TrainingConfig(guidance_epochs=0, encoder_epochs=1, **both)
    TrainingConfig(guidance_epochs=1, **both | {"joint_guidance": False})
