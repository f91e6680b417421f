"""Fitting a calibration to a model's predictions, and what predict and checkpoints do with it."""

from __future__ import annotations

import csv
import dataclasses
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch_versions import traces_context_managers
from training_fixtures import CLASSES, write_images
from training_runs import make_config

from diffmic_fast.calibration import Calibration, Scaling, confidence
from diffmic_fast.checkpoint import (
    add_calibration,
    atomic_save,
    load_model,
    read_checkpoint,
    weights_digest,
)
from diffmic_fast.config.run import RunConfig
from diffmic_fast.data.dataset import ImageDataset
from diffmic_fast.data.sources import open_source
from diffmic_fast.diffusion.sampling_options import SamplingOptions
from diffmic_fast.inference.calibrate import calibrate, images_of
from diffmic_fast.inference.output import save
from diffmic_fast.inference.predict import ProbabilityOptions, collect_files, predict_files
from diffmic_fast.models import DiffMIC
from diffmic_fast.training.datasets import make_dataset

OPTIONS = SamplingOptions("ddim", 3, samples=4, seed=5)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train with 3 x 20 images, test with 3 x 9."""
    root = tmp_path_factory.mktemp("many")
    write_images(root / "train", 20)
    write_images(root / "test", 9, seed=1)
    return root


@pytest.fixture(scope="module")
def configuration(many: Path) -> RunConfig:
    return make_config(many)


@pytest.fixture(scope="module")
def datasets(configuration: RunConfig) -> tuple[ImageDataset, ImageDataset]:
    """Validation and training images."""
    validation, training = (
        make_dataset(configuration, open_source(configuration.data, split), train=False)
        for split in ("validation", "train")
    )
    return validation, training


@pytest.fixture(scope="module")
def fitted(
    configuration: RunConfig, datasets: tuple[ImageDataset, ImageDataset]
) -> tuple[DiffMIC, Calibration]:
    torch.manual_seed(1)
    model = DiffMIC(configuration.model).eval()
    return model, calibrate(model, *datasets, OPTIONS, batch_size=8)


@pytest.fixture
def model(fitted: tuple[DiffMIC, Calibration]) -> DiffMIC:
    """The model with its calibration, which a test may take away."""
    fitted[0].calibration = fitted[1]
    return fitted[0]


def batch(datasets: tuple[ImageDataset, ImageDataset], count: int = 5) -> torch.Tensor:
    return torch.stack([datasets[0][i][0] for i in range(count)])


def test_the_calibration_is_of_the_models_own_predictions(model, datasets):
    from diffmic_fast.calibration import fit_calibration

    calibration = model.calibration
    images = batch(datasets, 27)
    labels = torch.tensor([datasets[0][i][1] for i in range(27)])
    result = model.predict(images, probability="published", **asdict(OPTIONS))
    expected = fit_calibration(result.samples, result.guidance[:, 0], labels, OPTIONS)
    assert calibration.diffusion.factor == pytest.approx(expected.diffusion.factor, rel=1e-3)
    torch.testing.assert_close(calibration.scores, expected.scores, rtol=1e-3, atol=1e-4)
    assert (calibration.images, calibration.classes) == (27, 3)
    assert calibration.weights == weights_digest(model)


def test_batch_size_changes_only_the_rounding(model, datasets):
    counts: list[int] = []
    again = calibrate(model, *datasets, OPTIONS, batch_size=5, on_batch=counts.append)
    assert sum(counts) == images_of(*datasets) and max(counts) == 5
    one, other = model.calibration.diffusion, again.diffusion
    assert one.kind == other.kind and one.factor == pytest.approx(other.factor, rel=1e-3)


def test_published_probabilities_are_those_of_a_model_without_a_calibration(model, datasets):
    images = batch(datasets)
    published = model.predict(images, probability="published", **asdict(OPTIONS))
    model.calibration = None
    before = model.predict(images, **asdict(OPTIONS))
    assert not before.calibrated and not published.calibrated
    for name in ("probabilities", "label", "spread", "samples", "guidance"):
        assert torch.equal(getattr(before, name), getattr(published, name)), name
    assert torch.equal(before.probabilities, before.samples.softmax(-1).mean(1))


def test_predictions_are_calibrated_where_the_calibration_fits(model, datasets):
    images = batch(datasets)
    found = model.predict(images, **asdict(OPTIONS))
    assert found.calibrated
    expected = model.calibration.probabilities(found.samples, found.guidance[:, 0])
    assert torch.equal(found.probabilities, expected)
    assert torch.equal(found.label, expected.argmax(dim=1))
    each = model.calibration.sample_probabilities(found.samples, found.guidance[:, 0])
    torch.testing.assert_close(found.spread, each.std(dim=1, correction=0))
    asked = model.predict(images, probability="calibrated", **asdict(OPTIONS))
    assert torch.equal(asked.probabilities, found.probabilities)
    # Guidance and features of an earlier call give the same.
    shared = model.predict(
        images, guidance=model.guide(images), features=model.encode(images), **asdict(OPTIONS)
    )
    torch.testing.assert_close(shared.probabilities, found.probabilities)
    torch.testing.assert_close(shared.features, found.features)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 4}, "was fitted for steps 3, got 4"),
        ({"samples": 5}, "was fitted for samples 4, got 5"),
        ({"eta": 0.5}, r"was fitted for eta 0\.0, got 0\.5"),
        (
            {"sampler": "ddpm", "steps": None},
            "was fitted for sampler ddim, got ddpm; steps 3, got None",
        ),
    ],
)
def test_other_sampling_is_published_or_an_error(model, datasets, changes, message):
    options = dataclasses.replace(OPTIONS, **changes)
    images = batch(datasets, 2)
    assert not model.predict(images, **asdict(options)).calibrated
    with pytest.raises(
        ValueError, match=f"probabilities are not calibrated: the calibration {message}"
    ):
        model.predict(images, probability="calibrated", **asdict(options))
    assert model.predict(images, **asdict(dataclasses.replace(OPTIONS, seed=6))).calibrated


def test_a_model_without_a_calibration_is_an_error_if_asked(model, datasets):
    model.calibration = None
    with pytest.raises(ValueError, match="not calibrated: the model has no calibration"):
        model.predict(batch(datasets, 1), probability="calibrated")
    with pytest.raises(ValueError, match="must be None, 'published' or 'calibrated', got 'best'"):
        model.predict(batch(datasets, 1), probability="best")


def test_confidence_has_all_measures(model, datasets):
    images = batch(datasets)
    found = model.predict(images, **asdict(OPTIONS))
    sure = confidence(found, model.calibration, images=images, coverage=0.8)
    assert sure.prediction_set is not None and sure.prediction_set.shape == (5, 3)
    assert bool(sure.prediction_set.gather(1, found.label[:, None]).all())
    assert sure.novelty is not None and sure.flagged is not None
    assert bool(((sure.novelty > 0) & (sure.novelty <= 1)).all())
    black = torch.full((2, 3, 32, 32), -2.0)
    flagged = confidence(
        model.predict(black, **asdict(OPTIONS)), model.calibration, images=black
    ).flagged
    assert flagged is not None and bool(flagged.all())


@traces_context_managers
def test_a_compiled_and_an_exported_model_are_calibrated(datasets):
    torch.manual_seed(2)
    configuration = make_config(Path("unused")).model
    model = DiffMIC(configuration).eval()
    options = SamplingOptions("ddpm")
    vector = Scaling("vector", 3.0, 0.5, torch.tensor([0.5, 0.0, -0.5]))
    calibration = calibrate(model, *datasets, options)
    model.calibration = dataclasses.replace(calibration, diffusion=vector)
    images = batch(datasets, 4)
    expected = model(images)
    assert not torch.equal(expected, model.predict(images, probability="published").probabilities)
    program = torch.export.export(
        model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    torch.testing.assert_close(program.module()(images), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(images)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)


def test_without_training_images_the_earlier_ones_are_kept(model, datasets):
    validation, _ = datasets
    counts: list[int] = []
    again = calibrate(model, validation, None, OPTIONS, on_batch=counts.append)
    assert sum(counts) == images_of(validation, None) == len(validation)
    assert again.novelty is not None
    assert torch.equal(again.novelty.neighbours, model.calibration.novelty.neighbours)
    model.calibration = None
    assert calibrate(model, validation, None, OPTIONS).novelty is None


def test_few_images_and_other_classes_are_rejected(model, datasets, configuration):
    validation, training = datasets
    few = make_dataset(configuration, validation.table.select(range(19)), train=False)
    with pytest.raises(ValueError, match="at least 20 validation images, got 19"):
        calibrate(model, few, training, OPTIONS)
    with pytest.raises(ValueError, match=r"steps must be in \[1, 12\] .* got 99"):
        calibrate(model, validation, training, SamplingOptions("ddim", 99))


# -- files ---------------------------------------------------------------------------------------


@pytest.fixture
def saved(model: DiffMIC, tmp_path: Path) -> Path:
    """A published checkpoint: denoiser and guidance in two files, with a moving average."""
    average = {name: value + 0.01 for name, value in model.denoiser.named_parameters()}
    atomic_save(
        [model.denoiser.state_dict(), {"state": {}}, 7, 1234, average], tmp_path / "ckpt.pth"
    )
    atomic_save([model.guidance.state_dict(), {"state": {}}], tmp_path / "aux_ckpt.pth")
    return tmp_path / "ckpt.pth"


def test_a_checkpoint_holds_a_calibration(saved, datasets, configuration):
    before = torch.load(saved, weights_only=True)
    model, _ = load_model(saved, config=configuration)
    assert model.calibration is None
    calibration = calibrate(model, *datasets, OPTIONS)
    add_calibration(saved, calibration)
    after = torch.load(saved, weights_only=True)
    assert len(after) == 5 and after[2:4] == [7, 1234]
    for part in (0, 4):
        assert all(torch.equal(value, after[part][key]) for key, value in before[part].items())
    loaded, _ = load_model(saved, config=configuration)
    assert loaded.calibration is not None
    images = batch(datasets)
    model.calibration = calibration
    expected = model.predict(images, **asdict(OPTIONS))
    found = loaded.predict(images, **asdict(OPTIONS))
    assert found.calibrated and torch.equal(found.probabilities, expected.probabilities)
    # A second calibration replaces the first.
    add_calibration(saved, dataclasses.replace(calibration, samples=9))
    assert read_checkpoint(saved).calibration.samples == 9


def test_a_calibration_of_other_weights_is_left_out(saved, datasets, configuration, tmp_path):
    model, _ = load_model(saved, config=configuration)
    add_calibration(saved, calibrate(model, *datasets, OPTIONS))
    with pytest.warns(UserWarning, match="fitted for other weights than those loaded"):
        plain, _ = load_model(saved, config=configuration, ema=False)
    assert plain.calibration is None
    guidance = {key: value * 1.5 for key, value in model.guidance.state_dict().items()}
    atomic_save([guidance, {}], tmp_path / "other.pth")
    with pytest.warns(UserWarning, match="fitted for other weights than those loaded"):
        other, _ = load_model(saved, tmp_path / "other.pth", configuration)
    assert other.calibration is None


def test_a_damaged_calibration_names_the_file(saved, fitted, configuration):
    parts = torch.load(saved, weights_only=True)
    state = fitted[1].to_state()
    parts[1]["diffmic_fast"] = {"calibration": {**state, "scores": torch.tensor([torch.nan])}}
    torch.save(parts, saved)
    with pytest.raises(ValueError, match=r"ckpt\.pth: calibration: scores must be finite"):
        load_model(saved, config=configuration)


def test_a_failed_write_leaves_the_checkpoint(saved, fitted, monkeypatch):
    before = saved.read_bytes()

    def failing(value, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="no space left"):
        add_calibration(saved, fitted[1])
    assert saved.read_bytes() == before
    assert not list(saved.parent.glob(".*tmp"))


def test_a_bare_state_dict_takes_no_calibration(model, fitted, tmp_path):
    torch.save(model.denoiser.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(
        ValueError, match=r"must hold a list .* to take a calibration, got OrderedDict"
    ):
        add_calibration(tmp_path / "bare.pth", fitted[1])


def test_rows_of_files_have_the_confidence(model, many, configuration, tmp_path):
    files = collect_files([many / "test" / "blue"])
    augmentation = configuration.data.augmentation
    result = predict_files(
        model, files, CLASSES, augmentation, OPTIONS, probabilities=ProbabilityOptions(coverage=0.8)
    )
    assert result.heading.obstacle is None and result.heading.coverage == 0.8
    for row in result.rows:
        assert row.calibrated and row.prediction_set is not None and row.name in row.prediction_set
        assert row.novelty is not None and row.flagged == (row.novelty <= 0.05)
    save(result, tmp_path / "p.csv")
    save(result, tmp_path / "p.json")
    with open(tmp_path / "p.csv", newline="") as file:
        table = list(csv.DictReader(file))
    value = json.loads((tmp_path / "p.json").read_text())
    assert value["not_calibrated"] is None and value["coverage"] == 0.8
    for line, record, row in zip(table, value["predictions"], result.rows, strict=True):
        assert line["calibrated"] == "yes" and record["calibrated"] is True
        assert line["guidance_class"] == record["guidance_class"] == row.guidance_name
        assert (
            line["prediction_set"].split("|")
            == record["prediction_set"]
            == list(row.prediction_set)
        )
        for name in ("guidance_probability", "interval_width", "t_test_p", "agreement", "novelty"):
            assert float(line[name]) == pytest.approx(record[name], rel=1e-5), name
        assert line["flagged"] == ("yes" if row.flagged else "no")


def test_rows_that_are_not_calibrated_say_so(model, many, configuration, tmp_path):
    files = collect_files([many / "test" / "blue"])
    augmentation = configuration.data.augmentation
    model.calibration = None
    single = dataclasses.replace(OPTIONS, samples=1)
    result = predict_files(model, files, CLASSES, augmentation, single)
    assert result.heading.obstacle == "the model has no calibration"
    save(result, tmp_path / "p.csv")
    save(result, tmp_path / "p.json")
    with open(tmp_path / "p.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for line in table:
        assert line["calibrated"] == "no" and line["agreement"] == "1"
        for name in ("interval_width", "t_test_p", "prediction_set", "novelty", "flagged"):
            assert line[name] == "", name
    value = json.loads((tmp_path / "p.json").read_text())
    assert value["not_calibrated"] == "the model has no calibration"
    assert value["predictions"][0]["prediction_set"] is None
    assert value["predictions"][0]["interval_width"] is None


def test_published_probabilities_of_files(model, many, configuration):
    files = collect_files([many / "test" / "blue"])
    augmentation = configuration.data.augmentation
    published = ProbabilityOptions("published")
    result = predict_files(model, files, CLASSES, augmentation, OPTIONS, probabilities=published)
    assert result.heading.obstacle == "published probabilities were asked for"
    assert not any(row.calibrated for row in result.rows)
    # The detector needs no calibrated probabilities.
    assert all(row.novelty is not None for row in result.rows)
    with pytest.raises(
        ValueError, match="not calibrated: the calibration was fitted for samples 4, got 2"
    ):
        predict_files(model, files, CLASSES, augmentation, dataclasses.replace(OPTIONS, samples=2),
                      probabilities=ProbabilityOptions("calibrated"))  # fmt: skip
    with pytest.raises(ValueError, match=r"coverage must be in \(0, 1\), got 2"):
        ProbabilityOptions(coverage=2)


def test_a_bar_in_a_class_name_is_escaped(model, many, configuration, tmp_path):
    files = collect_files([many / "test" / "blue"])[:1]
    names = ("b|ue", "green", "red")
    options = ProbabilityOptions(coverage=0.99)  # all classes: 27 images do not support it
    result = predict_files(
        model, files, names, configuration.data.augmentation, OPTIONS, probabilities=options
    )
    save(result, tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="") as file:
        assert next(csv.DictReader(file))["prediction_set"] == "b\\|ue|green|red"
