"""ONNX files: run by onnxruntime, they give the model's numbers, and the documented loop its labels."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrated_models import NAMES, calibrated_model
from torch import nn
from training_runs import MODEL

from diffmic_fast import DiffMIC
from diffmic_fast._optional import MissingPackageError
from diffmic_fast.cli import main
from diffmic_fast.models import DCG
from diffmic_fast.onnx_export import NAMES as FILES
from diffmic_fast.onnx_export import gathered_crops
from diffmic_fast.ops.image_ids import image_ids
from diffmic_fast.reference.philox import normal
from diffmic_fast.reference.rois import cut_crops

USAGE = Path(__file__).resolve().parents[1] / "docs" / "usage.md"
TOLERANCE = 1e-4  # relative to the largest value


def batch(count: int, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, size, size, generator=generator)
    images[0, :, : size // 3] = -1.5  # background, for crop_foreground
    return images


@pytest.fixture(scope="module")
def model() -> DiffMIC:
    return calibrated_model()


def close(found: np.ndarray, expected: torch.Tensor) -> None:
    wanted = expected.numpy()
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def check_graphs(model: DiffMIC, folder: Path, views: int) -> None:
    import onnxruntime

    guidance, encoder, denoiser = (
        onnxruntime.InferenceSession(folder / f"{name}.onnx")
        for name in ("guidance", "encoder", "denoiser")
    )
    for count in (1, 3, 6):
        images = batch(count, model.config.image_size)
        detail, features = model.guide(images, views=views), model.encode(images, views=views)
        found = guidance.run(None, {"images": images.numpy()})
        assert [output.name for output in guidance.get_outputs()] == [
            "fused", "global", "local", "saliency", "boxes",
        ]  # fmt: skip
        for each, expected in zip(found, (*detail.logits, detail.saliency), strict=False):
            close(each, expected)
        corners = (detail.origins, detail.origins + model.config.crop_size)
        assert found[4].tolist() == torch.cat(corners, dim=-1).tolist()
        assert (found[0].argmax(axis=1) == detail.logits.fused.argmax(dim=1).numpy()).all()
        close(encoder.run(None, {"images": images.numpy()})[0], features)
        y, prior = torch.randn(count, 3), detail.logits.fused.softmax(dim=1)
        for timestep in (0, 5, model.config.timesteps - 1):
            at = torch.tensor([timestep])
            with torch.no_grad():
                expected = model.denoiser.denoise_features(features, y, at, prior)
            inputs = {"features": features, "y": y, "guidance": prior, "timestep": at}
            close(denoiser.run(None, {k: v.numpy() for k, v in inputs.items()})[0], expected)


def documented_loop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the code in docs/usage.md defines, run beside the folder."""
    text = USAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"onnx-loop: begin.*?```python\n(.*?)```\n<!-- onnx-loop: end", text, re.S)
    (name,) = re.findall(r'^folder = "(.*)"$', code, re.M)
    folder.rename(folder.with_name(name))
    monkeypatch.chdir(folder.parent)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [True, False])
def test_graphs_and_the_documented_loop(model, tmp_path, monkeypatch, capsys, calibrated):
    """Of a model with two views, through the command line; labels and probabilities as those of predict."""
    own = copy.deepcopy(model)
    if not calibrated:
        own.calibration = None
        own.sampling = dataclasses.replace(own.sampling, views=1, eta=1.0, steps=5)
    own.save_pretrained(tmp_path / "pretrained")
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "pretrained"), str(out)]) == 0
    assert (
        "guidance.onnx, encoder.onnx, denoiser.onnx, sampling.json, opset 18"
        in capsys.readouterr().out
    )
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    check_graphs(own, out, own.sampling.views)
    names = documented_loop(out, monkeypatch)
    sampling = names["sampling"]
    assert sampling["class_names"] == list(NAMES) and sampling["preprocessing"]["bit_depth"] == 12
    assert (sampling["calibration"] is not None) == calibrated
    images, samples = batch(6), own.sampling.samples
    moments = torch.tensor([own.config.timesteps, *sampling["steps"]["timesteps"]])
    noise = normal(
        own.sampling.seed,
        image_ids(images).repeat_interleave(samples),
        torch.arange(samples).repeat(6),
        moments,
        3,
    )
    found = names["predict"](images.numpy(), noise.numpy())
    expected = own.predict(images)
    assert expected.calibrated == calibrated
    close(found, expected.probabilities)
    assert (found.argmax(axis=1) == expected.label.numpy()).all()


@pytest.mark.slow
def test_foreground_and_all_channels(tmp_path):
    """Options of the guidance model, a larger saliency map with patches over its edge, a torchvision network."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        MODEL, image_size=128, crop_size=50, crops=3, guidance_trunk="resnet18",
        crop_foreground=True, crop_channels="all", percent_t=0.4,
    )  # fmt: skip
    model = DiffMIC(config).train()
    model.loss(batch(4, 128), torch.tensor([0, 1, 2, 0]))  # running statistics
    model.export_onnx(tmp_path / "out")
    assert model.training  # as before
    tree = json.loads((tmp_path / "out" / "sampling.json").read_text())
    assert tree["sampler"] == "ddpm" and len(tree["steps"]["timesteps"]) == config.timesteps
    assert tree["preprocessing"] is tree["class_names"] is tree["calibration"] is None
    check_graphs(model.eval(), tmp_path / "out", 1)


@pytest.mark.parametrize("channels", ["first", "all"])
@pytest.mark.parametrize(("size", "image"), [(5, (7, 9)), (9, (7, 9)), (3, (33, 16)), (1, (4, 4))])
def test_gathered_crops_are_those_of_the_reference(channels, size, image):
    generator = torch.Generator().manual_seed(size)
    images = torch.randn(3, 3, *image, generator=generator)
    limits = torch.tensor(image)
    origins = (torch.rand(3, 6, 2, generator=generator) * limits).long()
    origins[0, 0], origins[0, 1] = torch.tensor([0, 0]), limits - 1
    expected = cut_crops(images, origins, (size, size), channels)
    assert torch.equal(gathered_crops(images, origins, size, channels), expected)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Networks and options that `export_onnx` passes to PyTorch, by the name of the file."""
    found = {}

    def keep(module: nn.Module, arguments: Any, path: Path, **options: Any) -> None:
        found[path.stem] = (module, options)
        path.write_bytes(b"graph")

    monkeypatch.setattr(torch.onnx, "export", keep)
    return found


@pytest.mark.parametrize("foreground", [False, True])
def test_exported_networks_are_those_of_the_model(model, tmp_path, graphs, foreground):
    own = model
    if foreground:
        torch.manual_seed(0)
        sizes = {"image_size": 64, "crop_size": 16, "crops": 3}
        own = DiffMIC(dataclasses.replace(MODEL, crop_foreground=True, **sizes)).eval()
        own.sampling = dataclasses.replace(model.sampling, views=4)
    own.export_onnx(tmp_path / "out")
    images, views = batch(5, own.config.image_size), own.sampling.views
    detail, features = own.guide(images, views=views), own.encode(images, views=views)
    for one, several in (
        (own.guide(images).logits.fused, detail.logits.fused),
        (own.encode(images), features),
    ):
        assert not torch.allclose(one, several, rtol=1e-3)
    with torch.no_grad():
        assert detail.origins.any() == foreground  # the smaller images have a single cell
        *found, boxes = graphs["guidance"][0](images)
        for each, expected in zip(found, (*detail.logits, detail.saliency), strict=True):
            close(each.numpy(), expected)
        assert (
            boxes.tolist()
            == torch.cat((detail.origins, detail.origins + own.config.crop_size), -1).tolist()
        )
        close(graphs["encoder"][0](images).numpy(), features)
        y, prior, at = torch.randn(5, 3), detail.logits.fused.softmax(dim=1), torch.tensor([4])
        eps = graphs["denoiser"][0](features, y, prior, at)
        close(eps.numpy(), own.denoiser.denoise_features(features, y, at, prior))
    rows = {
        "guidance": {"images"},
        "encoder": {"images"},
        "denoiser": {"features", "y", "guidance"},
    }
    for name, inputs in rows.items():
        options = graphs[name][1]
        assert {key for key, shape in options["dynamic_shapes"].items() if shape} == inputs
        assert options["opset_version"] == 18


@pytest.mark.usefixtures("graphs")
def test_sampling_json_says_what_the_caller_needs(model, tmp_path):
    model.export_onnx(tmp_path / "a")
    tree = json.loads((tmp_path / "a" / "sampling.json").read_text(encoding="utf-8"))
    table = model.sampling.step_table(model.schedule)
    expected = {
        "sampler": model.sampling.method, "samples": 3, "views": 2, "classes": 3, "class_names": list(NAMES),
        "image_size": 32, "preprocessing": {
            "centre_square": False, "bit_depth": 12, "mean": [0.1, 0.2, 1 / 3], "std": [0.5, 0.25, 0.7],
        },
    }  # fmt: skip
    assert expected.items() <= tree.items()
    assert tree["steps"]["timesteps"] == table.timesteps.tolist()
    fitted = model.calibration.diffusion
    assert tree["calibration"] == {
        "factor": fitted.factor, "prior_factor": fitted.prior_factor, "bias": fitted.bias.tolist(),
    }  # fmt: skip
    assert fitted.factor != fitted.prior_factor
    assert fitted.factor != model.calibration.guidance.factor
    other = copy.deepcopy(model)
    other.sampling = dataclasses.replace(model.sampling, steps=3)  # of which it is no calibration
    other.export_onnx(tmp_path / "b")
    tree = json.loads((tmp_path / "b" / "sampling.json").read_text(encoding="utf-8"))
    assert tree["calibration"] is None and len(tree["steps"]["timesteps"]) == 3


def fake_export(*arguments: Any, **options: Any) -> None:
    Path(arguments[2]).write_bytes(b"graph")


def test_folders_are_replaced_only_with_overwrite(model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", fake_export)
    out = tmp_path / "out"
    model.export_onnx(out)
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        model.export_onnx(out)
    model.export_onnx(out, overwrite=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"files of export_onnx alone .* got notes\.txt"):
        model.export_onnx(out, overwrite=True)
    with pytest.raises(ValueError, match="must be a folder, got a file"):
        model.export_onnx(out / "notes.txt")


def test_networks_that_cannot_be_exported_raise(model, tmp_path, monkeypatch):
    def fail(*arguments: Any, **options: Any) -> None:
        try:
            raise RuntimeError("No decomposition for aten::rot90\nmore")
        except RuntimeError as error:
            raise ValueError("step 1/3") from error

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(
        ValueError, match=r"guidance cannot be exported by torch .*: No decom.*rot90$"
    ):
        model.export_onnx(tmp_path / "out")
    replaced = copy.deepcopy(model)
    replaced.denoiser.lin2 = nn.Identity()
    with pytest.raises(ValueError, match="layers must be as they were built"):
        replaced.export_onnx(tmp_path / "out")
    subclass = copy.deepcopy(model)
    subclass.guidance.__class__ = type("Own", (DCG,), {"detail": lambda *arguments: None})
    with pytest.raises(ValueError, match="must be a DCG, got a subclass"):
        subclass.export_onnx(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages_are_named(model, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingPackageError, match=rf"export_onnx needs {package}.*diffmic_fast\[onnx\]"
    ):
        model.export_onnx(tmp_path / "out")
