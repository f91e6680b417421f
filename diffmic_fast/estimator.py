"""`DiffMICClassifier`: training and prediction as an estimator of scikit-learn, over paths of images."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffmic_fast._optional import require
from diffmic_fast.checkpoint import load_model
from diffmic_fast.config.data import DataConfig
from diffmic_fast.config.run import RunConfig, read_config
from diffmic_fast.data.table import ImageEntry, ImageTable
from diffmic_fast.devices import choose_device
from diffmic_fast.models import DiffMIC
from diffmic_fast.training.interruption import Interrupted
from diffmic_fast.training.random_states import keep_random_states
from diffmic_fast.training.trainer import Trainer

_base = require("sklearn.base", extra="train", purpose="DiffMICClassifier")
_multiclass = require("sklearn.utils.multiclass", extra="train", purpose="DiffMICClassifier")
_validation = require("sklearn.utils.validation", extra="train", purpose="DiffMICClassifier")

_SECTIONS = ("data", "model", "training", "sampling")
# Entries of the section `data` that do not locate images.
_DATA = ("augmentation", "cache", "workers", "scan", "duplicates", "split_seed")


class DiffMICClassifier(_base.ClassifierMixin, _base.BaseEstimator):  # type: ignore[misc, name-defined]
    """A classifier of image files with the interface of scikit-learn.

        classifier = DiffMICClassifier("aptos2019_small", training__feature_epochs=50)
        classifier.fit(paths, grades).predict_proba(others)

    An input X is a sequence of paths, or an array or data frame with one column of them; labels may be text or whole
    numbers. Supports `sklearn.base.clone`, `cross_val_score`, `GridSearchCV` and `Pipeline`. The model is that of the
    last epoch; predictions use the sampling options of the configuration.

    Attributes:
        classes_: [C], the labels, sorted; columns of `predict_proba` are in this order.
        model_: the trained `DiffMIC`, with its calibration if there were enough validation images.
        config_: the `RunConfig` of the training.
    """

    def __init__(
        self,
        preset: str | Path = "demo",
        *,
        out: str | Path | None = None,
        validation_fraction: float = 0.1,
        device: str = "auto",
        verbose: bool = False,
        **overrides: Any,
    ) -> None:
        """Set parameters, which `fit` checks.

        Args:
            preset: a preset, or the path of a YAML file. Of its section `data` the entries for augmentation, reading
                and caching apply.
            out: folder of the run, which must not contain one; by default a temporary folder, which is removed.
            validation_fraction: share of the images of every class that are held out to select the best epoch and to
                calibrate the probabilities, which requires 20 images; 0 for none.
            device: "auto", "cpu", "cuda", "cuda:1".
            verbose: print the progress of the training to standard error.
            **overrides: `seed`, and entries of the configuration as section__key, such as training__epochs=5 or
                data__augmentation__bit_depth=12.

        Raises:
            TypeError: a name is not of this form.
        """
        _check_names(overrides)
        self.preset = preset
        self.out = out
        self.validation_fraction = validation_fraction
        self.device = device
        self.verbose = verbose
        self.overrides = overrides

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """All parameters by name, the overrides among them; `deep` has no effect."""
        return {name: getattr(self, name) for name in _named()} | self.overrides

    def set_params(self, **params: Any) -> DiffMICClassifier:
        """Set parameters, the overrides among them.

        Raises:
            TypeError: a name is neither that of a parameter nor section__key.
        """
        named = _named()
        others = {name: value for name, value in params.items() if name not in named}
        _check_names(others)
        for name in params.keys() - others.keys():
            setattr(self, name, params[name])
        self.overrides = self.overrides | others
        return self

    def __sklearn_tags__(self) -> Any:
        """Tags: X is a sequence of text."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.one_d_array = True
        tags.input_tags.string = True
        return tags

    def fit(self, X: ArrayLike, y: ArrayLike) -> DiffMICClassifier:
        """Train a new model.

        Args:
            X: [N] paths.
            y: [N] labels, text or whole numbers, of at least two classes.

        Raises:
            ValueError: an argument or the configuration is invalid, an image is unreadable, or `out` contains a run.
            TrainingError: a loss is not finite.
            KeyboardInterrupt: a signal has stopped the training.
        """
        if y is None:
            raise ValueError("DiffMICClassifier requires y to be passed, but the target y is None")
        paths = _paths(X)
        labels = _validation.column_or_1d(y, warn=True)
        _multiclass.check_classification_targets(labels)
        _validation.check_consistent_length(paths, labels)
        classes, numbers = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(
                f"DiffMICClassifier: y must have at least 2 classes, got {len(classes)} class"
            )
        names = tuple(str(name) for name in classes)
        config = self._config(names)
        entries = [
            ImageEntry(str(path), int(number), path)
            for path, number in zip(paths, numbers, strict=True)
        ]
        train, validation = ImageTable(names, tuple(entries)), None
        if self.validation_fraction:
            train, validation = train.random_split(self.validation_fraction, config.data.split_seed)
        self.model_ = self._train(config, train, validation)
        self.classes_, self.config_ = classes, config
        return self

    def _config(self, names: tuple[str, ...]) -> RunConfig:
        overrides = [_tree(name, value) for name, value in self.overrides.items()]
        given = read_config(self.preset, [{"model": {"classes": len(names)}}, *overrides])
        if given.model.classes != len(names):
            raise ValueError(
                f"DiffMICClassifier: model__classes must be that of y, {len(names)}, got {given.model.classes}"
            )
        data = DataConfig(class_names=names, **{name: getattr(given.data, name) for name in _DATA})
        training = given.training
        if self.out is None:  # the logs are removed with the folder
            training = dataclasses.replace(training, tensorboard=False)
        return RunConfig(data, given.model, training, given.sampling, given.seed)

    def _train(
        self, config: RunConfig, train: ImageTable, validation: ImageTable | None
    ) -> DiffMIC:
        with contextlib.ExitStack() as stack:
            stack.enter_context(keep_random_states())
            out = self.out
            if out is None:
                out = stack.enter_context(tempfile.TemporaryDirectory(prefix="diffmic_fast_"))
            trainer = Trainer(
                config,
                out,
                device=self.device,
                train=train,
                validation=validation,
                quiet=not self.verbose,
            )
            try:
                path = trainer.fit()
            except Interrupted as interrupted:  # GridSearchCV treats an Exception as a failed fit
                raise KeyboardInterrupt(str(interrupted)) from interrupted
            return load_model(path)[0]

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float32]:
        """Class probabilities [N, C] float32, calibrated where the model is.

        Args:
            X: [N] paths.

        Raises:
            NotFittedError: `fit` has not been called.
            ValueError: X is invalid, or an image is unreadable.
        """
        _validation.check_is_fitted(self, "model_")
        paths, size = _paths(X), self.config_.sampling.batch_size
        model = self.model_.to(choose_device(self.device))
        parts = []
        for start in range(0, len(paths), size):
            prediction = model.predict(paths[start : start + size])
            prediction.check()
            parts.append(prediction.probabilities.cpu().numpy())
        return np.concatenate(parts)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Labels [N] of `classes_`; arguments and errors as in `predict_proba`."""
        probabilities = self.predict_proba(X)
        labels: NDArray[Any] = self.classes_[probabilities.argmax(axis=1)]
        return labels


def _named() -> list[str]:
    """Names of the parameters other than the overrides."""
    parameters = inspect.signature(DiffMICClassifier.__init__).parameters.values()
    return [p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD]


def _check_names(overrides: Iterable[str]) -> None:
    for name in overrides:
        section, *keys = name.split("__")
        known = name == "seed" or (section in _SECTIONS and keys and all(keys))
        if not known or (section == "data" and keys[0] not in _DATA):
            raise TypeError(
                f"DiffMICClassifier: parameters must be {', '.join(_named())}, seed, or section__key with a section of "
                f"{', '.join(_SECTIONS)} (of data: {', '.join(_DATA)}), got {name}"
            )


def _tree(name: str, value: Any) -> Mapping[str, Any]:
    """'training__epochs' and 3 as {'training': {'epochs': 3}}."""
    if isinstance(value, np.generic):  # a NumPy scalar of a parameter grid
        value = value.item()
    for key in reversed(name.split("__")):
        value = {key: value}
    tree: Mapping[str, Any] = value
    return tree


def _paths(X: ArrayLike) -> list[Path]:
    """X as a list of paths."""
    if isinstance(X, (str, os.PathLike)):
        raise ValueError(
            f"DiffMICClassifier: X must be a sequence of paths, got one path {str(X)!r}"
        )
    values = np.asarray(X, dtype=object)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(
            f"DiffMICClassifier: X must be paths [N] or [N, 1] with N >= 1, got an array of shape {values.shape}"
        )
    for value in values:
        if not isinstance(value, (str, os.PathLike)):
            raise ValueError(
                f"DiffMICClassifier: X must be paths of images, got {type(value).__name__} {value!r:.40}"
            )
    return [Path(value) for value in values]
