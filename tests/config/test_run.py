"""Configuration: presets, files, overrides, and every kind of mistake in them."""

import dataclasses

import pytest

from diffmic_fast.config.run import RunConfig, presets, read_config


def test_every_preset_reads_and_survives_a_round_trip(tmp_path):
    assert set(presets()) == {"pmg2000", "aptos2019", "ham10000", "chest_xray_small", "demo"}
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


def test_overrides_are_read_as_yaml():
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


def test_unknown_key_is_named_with_section_and_nearest_known_key(tmp_path):
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
        ("training.batch_size=large", "training.batch_size wants a whole number, got 'large'"),
        ("training.batch_size=true", "training.batch_size wants a whole number, got True"),
        ("training.batch_size=8.5", "training.batch_size wants a whole number, got 8.5"),
        ("training.batch_size=1", "training.batch_size wants at least 2"),
        ("training.epochs=-1", "training.epochs wants a number not below 0"),
        ("training.learning_rate=fast", "training.learning_rate wants a number, got 'fast'"),
        ("training.learning_rate=.inf", "training.learning_rate wants a finite number"),
        ("training.learning_rate=0", "training.learning_rate wants a positive number"),
        ("training.ema_decay=1.0", "training.ema_decay wants a number between 0 and 1"),
        ("training.precision=fp16", "training.precision wants one of 'fp32', 'bf16', 'auto'"),
        ("training.tensorboard=1", "training.tensorboard wants true or false"),
        ("training.epochs=", "training.epochs wants a whole number, got None"),
        ("model.classes=1", "model.classes wants at least 2"),
        ("model.image_size=-96", "model.image_size wants a positive whole number, got -96"),
        ("model.image_size=16", "model.crop_size wants at most image_size 16"),
        ("model.schedule=linea", "model.schedule wants one of linear"),
        ("model.beta_end=2", "model.beta_end wants a number between 0 and 1"),
        ("model.encoder=18", "model.encoder wants text, got 18"),
        ("sampling.steps=5000", "wants steps from 1 to 1000"),
        ("sampling.steps=null", "wants steps from 1 to 1000"),
        ("sampling.sampler=ddpm", "walks all 1000 timesteps, got steps 60"),
        ("sampling.eta=2", "sampling.eta wants a number from 0 to 1"),
        ("data.kind=foldre", "kind must be one of folder"),
        ("data.synthetic_size=a", "data.synthetic_size wants a whole number"),
        ("data=folder", "section 'data' wants keys with values"),
        ("seed=1.5", "seed wants a whole number"),
        ("training.batch_size", "--set wants section.key=value"),
        ("training..x=3", "--set wants section.key=value"),
        ("training.epochs=[1", "not valid YAML"),
    ],
)
def test_wrong_values_are_refused_in_words(override, message):
    with pytest.raises(ValueError) as error:
        read_config("pmg2000", [override])
    assert message in str(error.value)


def test_wrong_types_are_refused_in_python_too(config):
    with pytest.raises(ValueError, match=r"training.batch_size wants a whole number, got '8'"):
        dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size="8"))


def test_missing_file_and_missing_key_and_broken_yaml(tmp_path):
    with pytest.raises(ValueError, match=r"no file 'nothere.yml'.*presets are aptos2019"):
        read_config("nothere.yml")
    path = tmp_path / "c.yml"
    for text, message in (
        ("model: {image_size: 64}\ndata: {kind: folder}", "model.classes is missing"),
        ("model: {classes: 3}", "data is missing"),
        ("model: [3", r"c\.yml, line 1: not valid YAML"),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        ("- a\n- b", "wants sections with keys"),
        ("", "wants sections with keys"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(path)
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(ValueError, match="not a text file"):
        read_config(path)
