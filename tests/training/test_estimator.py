"""DiffMICClassifier: scikit-learn's conventions, as far as they apply to paths of images."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks
from training_runs import assert_same_values

from diffmic_fast import DiffMICClassifier, Preprocessing, estimator
from diffmic_fast.checkpoint import load_model
from diffmic_fast.training.interruption import Interrupted
from diffmic_fast.training.trainer import Trainer


@pytest.fixture(scope="module")
def preset(shared_config, tmp_path_factory) -> Path:
    """A configuration of 1 + 1 epochs."""
    path = tmp_path_factory.mktemp("preset") / "c.yml"
    shared_config.training.epochs = 1
    shared_config.save(path)
    return path


@pytest.fixture(scope="module")
def paths(images) -> list[Path]:
    return sorted((images / "train").rglob("*.png"))


@pytest.fixture(scope="module")
def labels(paths) -> list[str]:
    return [path.parent.name for path in paths]


@pytest.fixture(scope="module")
def fitted(preset, paths, labels) -> DiffMICClassifier:
    classifier = DiffMICClassifier(
        preset, validation_fraction=0.2, seed=3, data__augmentation__bit_depth=12
    )
    return classifier.fit(paths, labels)


def test_predictions_are_those_of_the_model(fitted, paths, labels):
    assert is_classifier(fitted) and fitted.classes_.tolist() == ["blue", "green", "red"]
    probabilities = fitted.predict_proba(paths)
    assert probabilities.shape == (15, 3) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    predicted = fitted.predict(paths)
    assert predicted.tolist() == fitted.classes_[probabilities.argmax(axis=1)].tolist()
    assert fitted.score(paths, labels) == np.mean(predicted == np.array(labels))
    model = fitted.model_
    assert model.class_names == ("blue", "green", "red")
    assert model.preprocessing == Preprocessing(bit_depth=12) and fitted.config_.seed == 3
    expected = model.predict(paths[:4]).probabilities  # the batch size of the configuration
    assert np.array_equal(probabilities[:4], expected.numpy())


def test_shapes_of_x(fitted, paths):
    expected = fitted.predict_proba(paths[:5])
    text = [str(path) for path in paths[:5]]
    for x in (text, np.array(text), np.array(text)[:, None], np.array(paths[:5], object)):
        assert np.array_equal(fitted.predict_proba(x), expected)
    for x, message in (
        (text[0], "a sequence of paths, got one path"),
        ([], r"N >= 1, got an array of shape \(0,\)"),
        (np.array([text, text]), r"got an array of shape \(2, 5\)"),
        (np.zeros((3, 1)), "paths of images, got float"),
        ([text[0], None], "paths of images, got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            fitted.predict(x)
    with pytest.raises(ValueError, match="there is no such file"):
        fitted.predict(["nothere.png"])


def test_it_is_pickled(fitted, paths):
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.predict_proba(paths), fitted.predict_proba(paths))


def test_int_labels_a_pipeline_and_the_same_numbers(fitted, preset, paths, labels):
    """Fitting is deterministic, keeps the random generators' states and leaves no folder."""
    numbers = np.array([{"blue": 2, "green": 5, "red": 11}[label] for label in labels])
    pipeline = Pipeline([("as_path", FunctionTransformer()), ("classifier", clone(fitted))])
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(77)  # not where the training of `fitted` would have left them
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    pipeline.fit([str(path) for path in paths], numbers)
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert pipeline.classes_.tolist() == [2, 5, 11]
    assert set(pipeline.predict(paths)) <= {2, 5, 11}
    state = pipeline["classifier"].model_.state_dict()
    assert_same_values(state, fitted.model_.state_dict())


@pytest.mark.slow
def test_a_given_folder_keeps_the_run(preset, paths, labels, tmp_path):
    classifier = DiffMICClassifier(
        preset, out=tmp_path / "run", validation_fraction=0, training__guidance_epochs=0
    ).fit(paths, labels)
    loaded, names = load_model(tmp_path / "run" / "ckpt.pth")
    assert names == ("blue", "green", "red")
    assert_same_values(loaded.state_dict(), classifier.model_.state_dict())
    assert not (tmp_path / "run" / "ckpt_best.pth").exists()  # there were no validation images
    with pytest.raises(ValueError, match="already holds a run"):
        classifier.fit(paths, labels)


def test_temporary_folders_are_removed(preset, paths, labels, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []

    def interrupted(trainer: Trainer) -> Path:
        seen.append(trainer.folder.folder)
        assert trainer.folder.folder.is_dir()
        raise Interrupted(2, "interrupted")

    monkeypatch.setattr(Trainer, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):  # not an Exception, after which a search would go on
        DiffMICClassifier(preset).fit(paths, labels)
    assert seen[0].parent == tmp_path and not list(tmp_path.iterdir())


def test_validation_images_are_a_share_of_every_class(preset, paths, labels, monkeypatch):
    tables = {}

    def stop(trainer: Trainer) -> Path:
        tables.update(train=trainer.dataset.table, validation=trainer.validation.table)
        raise RuntimeError("stop")

    monkeypatch.setattr(Trainer, "fit", stop)
    with pytest.raises(RuntimeError, match="stop"):
        DiffMICClassifier(preset, validation_fraction=0.4).fit(paths, labels)
    assert list(tables["validation"].counts.values()) == [2, 2, 2]
    sources = [{entry.source for entry in table.entries} for table in tables.values()]
    assert sources[0].isdisjoint(sources[1]) and sources[0] | sources[1] == set(paths)


@pytest.fixture
def untrained(monkeypatch):
    """In place of training and of its model: runs by number, and sizes of the batches that were checked.

    The model gives the image n.png, or n_more.png, the class n.
    """
    runs, checked = [], []

    class Run:
        def __init__(self, config, out, **options):
            self.config, self.options = config, options
            runs.append(self)

        def fit(self):
            return Path("ckpt.pth")

    class Model:
        def to(self, device):
            return self

        def predict(self, paths):
            p = torch.eye(3)[[int(path.name[0]) for path in paths]]
            return SimpleNamespace(probabilities=p, check=lambda: checked.append(len(paths)))

    monkeypatch.setattr(estimator, "Trainer", Run)
    monkeypatch.setattr(estimator, "load_model", lambda path: (Model(), None))
    return runs, checked


def test_labels_in_any_order_keep_to_their_images(untrained, preset):
    """Classes are sorted, batches as large as the configuration says, each of them checked."""
    runs, checked = untrained
    labels = ["red", "blue", "green", "blue", "red", "green"]
    paths = [f"{['blue', 'green', 'red'].index(label)}_{i}.png" for i, label in enumerate(labels)]
    classifier = DiffMICClassifier(
        preset, validation_fraction=0, sampling__batch_size=4, sampling__samples=7
    ).fit(paths, labels)
    table = runs[0].options["train"]
    assert table.classes == ("blue", "green", "red") and runs[0].options["validation"] is None
    assert [table.classes[entry.label] for entry in table.entries] == labels
    assert [str(entry.source) for entry in table.entries] == paths
    assert classifier.classes_.tolist() == ["blue", "green", "red"]
    assert classifier.predict(paths).tolist() == labels and checked == [4, 2]
    assert runs[0].config.sampling.samples == classifier.config_.sampling.samples == 7


def test_the_split_follows_its_seed(untrained, preset):
    runs, _ = untrained
    paths, labels = [f"{i % 3}_{i}.png" for i in range(60)], [i % 3 for i in range(60)]
    for seed in (1, 2, 1):
        DiffMICClassifier(preset, validation_fraction=0.5, data__split_seed=seed).fit(paths, labels)
    first, second, again = (
        {entry.source for entry in run.options["validation"].entries} for run in runs
    )
    assert first == again != second and len(first) == len(second) == 30


def test_arguments_of_fit(preset, paths, labels):
    classifier = DiffMICClassifier(preset)
    for y, message in (
        (None, "requires y to be passed"),
        (labels[:-1], "inconsistent numbers of samples"),
        (np.linspace(0.1, 1, 15), "Unknown label type"),
        (["red"] * 15, "at least 2 classes, got 1 class"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier.fit(paths, y)
    for overrides, message in (
        ({"training__epoch": 3}, "unknown key 'epoch' in section 'training'"),
        ({"training__epochs": -1}, r"training\.epochs must be"),
        ({"model__classes": 4}, "model__classes must be that of y, 3, got 4"),
        ({"validation_fraction": 1.5}, r"fraction must be in \(0, 1\), got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            clone(classifier).set_params(**overrides).fit(paths, labels)
    with pytest.raises(ValueError, match="no preset of that name"):
        DiffMICClassifier("nothere").fit(paths, labels)
    with pytest.raises(NotFittedError):
        classifier.predict_proba(paths)


def test_parameters():
    classifier = DiffMICClassifier("demo", training__epochs=2, seed=5)
    assert classifier.get_params()["training__epochs"] == 2 and classifier.get_params()["seed"] == 5
    copy = clone(classifier)
    assert copy.get_params() == classifier.get_params()
    copy.set_params(training__epochs=np.int64(3), verbose=True, sampling__samples=4)
    assert copy.get_params()["training__epochs"] == 3 and copy.verbose
    assert copy.get_params()["seed"] == 5 and copy.get_params()["sampling__samples"] == 4
    with pytest.raises(TypeError, match="got nothere"):
        copy.set_params(verbose=False, nothere=1)
    assert copy.verbose  # nothing is set
    assert classifier.get_params()["training__epochs"] == 2  # clones share nothing
    assert "training__epochs=2" in repr(classifier)
    for name in ("presett", "training", "training__", "other__key", "data__root", "epochs"):
        with pytest.raises(TypeError, match=f"parameters must be preset, .*got {name}"):
            DiffMICClassifier(**{name: 1})
        with pytest.raises(TypeError, match=f"got {name}"):
            classifier.set_params(**{name: 1})


# Checks of `check_estimator` that need no numeric X; where X is text it runs none but the first by itself. Without
# check_no_attributes_set_in_init, which has no notion of **overrides.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        "check_estimator_cloneable",
        "check_estimator_repr",
        "check_estimator_tags_renamed",
        "check_estimators_unfitted",
        "check_get_params_invariance",
        "check_mixin_order",
        "check_parameters_default_constructible",
        "check_requires_y_none",
        "check_set_params",
        "check_valid_tag_types",
    ],
)
def test_checks_of_scikit_learn(name):
    getattr(estimator_checks, name)("DiffMICClassifier", DiffMICClassifier(training__epochs=2))


def test_check_estimator_skips_what_needs_numbers():
    with pytest.warns(UserWarning, match="requires input"):
        estimator_checks.check_estimator(DiffMICClassifier())


@pytest.mark.slow
def test_cross_validation_and_search(preset, paths, labels):
    classifier = DiffMICClassifier(preset, validation_fraction=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # scikit-learn warns of failed fits and of rows that do not sum to 1
        scores = cross_val_score(classifier, paths, labels, cv=2, scoring="neg_log_loss")
        assert scores.shape == (2,) and np.isfinite(scores).all()
        grid = {"training__learning_rate": np.array([1e-3, 1e-2]), "sampling__samples": [2]}
        search = GridSearchCV(classifier, grid, cv=2).fit(np.array(paths), labels)
    assert search.best_params_["training__learning_rate"] in (1e-3, 1e-2)
    assert search.best_estimator_.config_.sampling.samples == 2
    assert search.predict(paths[:2]).shape == (2,)


def test_importing_the_package_imports_no_optional_package():
    code = (
        "import sys, diffmic_fast; "
        "print([m for m in ('sklearn', 'onnx', 'huggingface_hub', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
