"""Folders of save_pretrained: the same bits back, what is rejected, and interruptions; the hub's download is a fake."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from calibrated_models import NAMES, SAMPLING, calibrated_model, redigest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from training_runs import MODEL, flat

from diffmic_fast import DiffMIC, Preprocessing
from diffmic_fast.checkpoint import Checkpoint, load_model, read_checkpoint
from diffmic_fast.cli import main
from diffmic_fast.pretrained_folder import NAMES as FILES

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> DiffMIC:
    return calibrated_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "retina"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_everything_comes_back_bit_by_bit(model, saved):
    loaded = DiffMIC.from_pretrained(saved)
    assert not loaded.training and loaded.config == model.config
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) and tensor.dtype == state[name].dtype, name
    assert (loaded.class_names, loaded.preprocessing, loaded.sampling) == (
        NAMES, model.preprocessing, SAMPLING,
    )  # fmt: skip
    own, theirs = (flat(each.calibration.to_state()) for each in (model, loaded))
    assert own.keys() == theirs.keys()
    for key, value in own.items():
        same = torch.equal(value, theirs[key]) if torch.is_tensor(value) else value == theirs[key]
        assert same, key
    before, after = model.predict(IMAGES), loaded.predict(IMAGES)
    assert before.calibrated and after.calibrated
    assert torch.equal(before.probabilities, after.probabilities)
    assert torch.equal(before.label, after.label)


def test_files(saved):
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    assert [path.name for path in saved.parent.iterdir()] == ["retina"]
    weights = load_file(saved / "model.safetensors")
    assert DiffMIC(MODEL).load_state_dict(weights)  # other programs read them
    tree = json.loads((saved / "config.json").read_text())
    assert tree["description"]["class_names"] == list(NAMES)
    assert not any(torch.is_tensor(value) for value in flat(tree).values())


def test_a_model_without_settings(tmp_path):
    torch.manual_seed(0)
    model = DiffMIC(MODEL)
    model.save_pretrained(tmp_path / "a")
    loaded = DiffMIC.from_pretrained(tmp_path / "a")
    for name in ("preprocessing", "class_names", "sampling", "calibration"):
        assert getattr(loaded, name) is None
    assert torch.equal(model.denoiser.lin4.weight, loaded.denoiser.lin4.weight)
    with pytest.raises(ValueError, match=r"model\.preprocessing must be set"):
        loaded.preprocess("x.png")
    assert read_checkpoint(tmp_path / "a").config is None
    card = (tmp_path / "a" / "README.md").read_text()
    for sentence in ("preprocessing of the images is not known", "not calibrated", "No evaluation"):
        assert sentence in card


def test_names_of_initial_weights_are_left_out(tmp_path):
    """They may be paths of the machine."""
    model = DiffMIC(MODEL)
    model.config = dataclasses.replace(
        MODEL, encoder_weights="/data/x.pth", guidance_weights="/data/y.pth"
    )
    model.save_pretrained(tmp_path / "a")
    assert "/data" not in (tmp_path / "a" / "config.json").read_text()
    config = DiffMIC.from_pretrained(tmp_path / "a").config
    assert config.encoder_weights is config.guidance_weights is None


def test_numbers_do_not_depend_on_the_default_dtype(saved):
    torch.set_default_dtype(torch.float64)
    try:
        loaded = DiffMIC.from_pretrained(saved)
    finally:
        torch.set_default_dtype(torch.float32)
    assert loaded.denoiser.lin4.weight.dtype == torch.float32


def test_the_command_line_reads_the_folder(model, saved, images, tmp_path):
    file = images / "test" / "red" / "red_00.png"
    out = tmp_path / "out.json"
    assert main(["predict", str(saved), str(file), "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["predictions"]
    found = model.predict(file)
    assert row["calibrated"] and row["class"] == NAMES[int(found.label)]
    assert list(row["probabilities"].values()) == found.probabilities[0].tolist()


def test_calibrate_requires_a_checkpoint(saved, capsys):
    assert main(["calibrate", str(saved)]) == 2
    assert "must be a checkpoint file to take a calibration" in capsys.readouterr().err


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "calibration.safetensors"])
def test_a_changed_byte_is_found(folder, name):
    path = folder / name
    whole = path.read_bytes()
    for position in (0, 9, len(whole) // 3, len(whole) // 2, len(whole) - 3):
        content = bytearray(whole)
        content[position] ^= 4
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            Checkpoint.from_folder(folder)
    path.write_bytes(whole)
    Checkpoint.from_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "calibration.safetensors"])
def test_truncated_and_missing_files(folder, name):
    path = folder / name
    whole = path.read_bytes()
    for length in (len(whole) // 2, 5, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{name} .*(truncated|damaged)"):
            Checkpoint.from_folder(folder)
    path.unlink()
    with pytest.raises(ValueError, match=name):
        Checkpoint.from_folder(folder)


def test_files_of_another_model(folder, tmp_path):
    DiffMIC(MODEL).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or of another model"):
        Checkpoint.from_folder(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.25", "0.26", "changed since it was written"),
        ('"steps": 2', '"steps": 3', "changed since it was written"),
        ('"format_version": 1', '"format_version": 2', "must be 1, got 2; .* a later version"),
        ('"format": "diffmic_fast"', '"format": "other"', "format must be 'diffmic_fast', got 'other'"),
        ('"versions"', '"version"', "missing or unknown: version, versions"),
        ('"steps": 2', '"steps": NaN', "NaN is not a number of JSON"),
        ('"classes": 3', '"classes": 3, "classes": 4', "a key is given twice"),
    ],
)  # fmt: skip
def test_changes_of_the_description_are_found(folder, old, new, message):
    path = folder / "config.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        Checkpoint.from_folder(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.clases", 3, "unknown key 'clases' in section 'model'; .*'classes'"),
        ("model.classes", 4, "class_names must be 4 names"),
        ("model.encoder", "resnet_0", "resnet_0"),
        ("model.feature_dim", 33, "trained with feature_dim 32, the configuration says 33"),
        ("preprocessing.bit_depth", 17, "bit_depth"),
        ("preprocessing.mean", [0.1], "mean"),
        ("sampling.steps", 13, "steps must be in"),
        ("sampling", 1, "sampling"),
    ],
)
def test_descriptions_of_other_programs_are_checked(folder, path, value, message):
    tree = json.loads((folder / "config.json").read_text())["description"]
    *sections, key = path.split(".")
    target = tree
    for name in sections:
        target = target[name]
    target[key] = value
    redigest(folder, description=tree)
    with pytest.raises(ValueError, match=message):
        DiffMIC.from_pretrained(folder)


def test_a_calibration_of_other_classes_and_further_files_are_rejected(folder):
    tree = json.loads((folder / "config.json").read_text())
    redigest(folder, files={**tree["files"], "README.md": {}})
    with pytest.raises(ValueError, match=r"files must be .*, got .*README\.md"):
        Checkpoint.from_folder(folder)
    description = tree["description"]
    description["model"]["classes"], description["class_names"] = 4, None
    redigest(folder, description=description, files=tree["files"])
    with pytest.raises(ValueError, match="calibration"):
        Checkpoint.from_folder(folder)


def test_tensors_of_other_programs_are_checked(folder):
    weights = load_file(folder / "model.safetensors")
    first = "denoiser.lin2.lin.weight"
    for change, message in (
        ({first: None}, r"1 missing \(lin2\.lin\.weight\)"),
        ({first: weights[first][:-1].clone()}, r"1 of another shape \(lin2\.lin\.weight"),
        ({"denoiser.more": torch.ones(2)}, r"1 unexpected \(more\)"),
        ({"more": torch.ones(2)}, r"must begin with denoiser\. or guidance\., got more"),
        ({first: weights[first].half()}, f"got torch.float16 for {first}"),
    ):
        changed = {key: value for key, value in (weights | change).items() if value is not None}
        save_file(changed, folder / "model.safetensors")
        redigest(folder)
        with pytest.raises(ValueError, match=message):
            DiffMIC.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    redigest(folder)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        DiffMIC.from_pretrained(folder)


def test_calibrations_of_other_programs_are_checked(folder):
    arrays = load_file(folder / "calibration.safetensors")
    for change, message in (
        ({"scores": None}, "entries are missing or unknown: scores"),
        ({"novelty.basis": arrays["novelty.basis"][:, :-1].clone()}, r"novelty\.basis must be"),
        ({"novelty.more": torch.ones(1)}, "novelty must have the entries"),
        ({"images": torch.ones(1)}, "there must be no array images"),
        ({"diffusion.bias": torch.full((3,), torch.nan)}, r"diffusion\.bias must be finite"),
    ):
        changed = {key: value for key, value in (arrays | change).items() if value is not None}
        save_file(changed, folder / "calibration.safetensors")
        redigest(folder)
        with pytest.raises(ValueError, match=message):
            Checkpoint.from_folder(folder)


# -- writing ---------------------------------------------------------------------------------------


def test_an_existing_folder_is_replaced_only_with_overwrite(model, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"must be a new or empty folder.*overwrite=True"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"files of save_pretrained alone .* got notes\.txt"):
        model.save_pretrained(folder, overwrite=True)
    (folder / "notes.txt").unlink()
    model.save_pretrained(folder, overwrite=True)
    assert DiffMIC.from_pretrained(folder).class_names == NAMES
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_other_targets(model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="must be a folder, got a file"):
        model.save_pretrained(tmp_path / "file", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"got another config\.json or none"):
        model.save_pretrained(tmp_path / "other", overwrite=True)
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    model.save_pretrained(tmp_path / "new" / "deep")
    for name in ("empty", "new/deep"):
        assert DiffMIC.from_pretrained(tmp_path / name).class_names == NAMES


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left on device")])
def test_an_interruption_leaves_nothing_or_the_old_folder(model, folder, monkeypatch, error):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(Path, "write_text", fail)  # after the weights
    new = folder.parent / "new"
    with pytest.raises((KeyboardInterrupt, OSError)):
        model.save_pretrained(new)
    with pytest.raises((KeyboardInterrupt, OSError)):
        model.save_pretrained(folder, overwrite=True)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_models_that_could_not_be_loaded_are_rejected(model, tmp_path):
    other = copy.deepcopy(model)
    other.denoiser.lin4.bias.data += 1
    with pytest.raises(ValueError, match="calibration must be fitted for the model's weights"):
        other.save_pretrained(tmp_path / "a")
    other.calibration = None
    other.save_pretrained(tmp_path / "b")
    for change in (torch.nn.Module.half, replace_encoder):
        changed = copy.deepcopy(other)
        change(changed)
        with pytest.raises(ValueError, match="tensors of one built from its configuration"):
            changed.save_pretrained(tmp_path / "c")
    assert not (tmp_path / "a").exists() and not (tmp_path / "c").exists()


def replace_encoder(model: DiffMIC) -> None:
    model.denoiser.encoder_x = torch.nn.Linear(2, 2)


def test_views_of_shared_memory_are_saved(tmp_path):
    """As layers whose weights are slices of one buffer have them."""
    model = DiffMIC(MODEL)
    whole = torch.randn(64, 32)
    model.denoiser.lin2.lin.weight.data = whole[::2]
    model.denoiser.lin3.lin.weight.data = whole[1::2]
    model.save_pretrained(tmp_path / "a")
    loaded = DiffMIC.from_pretrained(tmp_path / "a")
    assert torch.equal(loaded.denoiser.lin2.lin.weight, whole[::2])


# -- the hub ---------------------------------------------------------------------------------------


def test_models_of_the_hub(model, saved, monkeypatch):
    calls = []

    def download(repo_id: str, **options: object) -> str:
        calls.append((repo_id, options))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = DiffMIC.from_pretrained("clinic/retina", revision="v1", cache_dir="cache")
    assert torch.equal(loaded.predict(IMAGES).probabilities, model.predict(IMAGES).probabilities)
    ((name, options),) = calls
    assert name == "clinic/retina" and options["revision"] == "v1"
    assert options["cache_dir"] == "cache" and options["local_files_only"] is False
    assert set(options["allow_patterns"]) == set(FILES)
    DiffMIC.from_pretrained(saved)
    assert len(calls) == 1
    DiffMIC.from_pretrained("retina", local_files_only=True)
    assert calls[1][0] == "retina" and calls[1][1]["local_files_only"] is True


def test_errors_of_the_hub_are_one_sentence(monkeypatch):
    for error in (
        OSError("no route to host\nlong text"),
        LocalEntryNotFoundError("not in the cache"),
    ):

        def fail(*args: object, error: Exception = error, **options: object) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(
            ValueError, match=r"no folder clinic/retina, and it cannot be down"
        ) as found:
            DiffMIC.from_pretrained("clinic/retina")
        assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["a/b/c", "./a", "/nowhere/a", Path("a"), "../a", "a/b.c/", ""])
def test_paths_are_not_requested_from_the_hub(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **o: pytest.fail("asked"))
    with pytest.raises(ValueError, match=r"from_pretrained: there is no folder|without config"):
        DiffMIC.from_pretrained(name)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(ValueError, match=r"must be a folder of save_pretrained, got one without"):
        DiffMIC.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"format must be 'diffmic_fast', got None"):
        DiffMIC.from_pretrained(tmp_path)


def test_load_model_reads_a_folder(model, saved):
    loaded, names = load_model(saved)
    assert names == NAMES and loaded.preprocessing == model.preprocessing


# -- the model card --------------------------------------------------------------------------------

EVALUATION = {
    "images": 352, "classes": list(NAMES), "samples": 3, "notes": ["a <note>"],
    "results": [
        {"method": "guidance alone", "accuracy": 0.8239, "macro_f1": None, "intervals": {}},
        {"method": "ddim 2 eta 0.25, calibrated", "accuracy": 0.8324, "nll": 0.50286,
         "intervals": {"accuracy": {"low": 0.7926, "high": 0.8693, "resamples": 1000}}},
    ],
}  # fmt: skip


def test_the_card_shows_the_measures(model, tmp_path):
    (tmp_path / "e.json").write_text(json.dumps(EVALUATION))
    cards = []
    for number, evaluation in enumerate(
        (EVALUATION, tmp_path / "e.json", str(tmp_path / "e.json"))
    ):
        model.save_pretrained(tmp_path / str(number) / "retina", evaluation=evaluation)
        cards.append((tmp_path / str(number) / "retina" / "README.md").read_text())
    assert cards[0] == cards[1] == cards[2]
    for part in (
        "# retina\n",
        "not a medical device",
        "352 images",
        r"| ddim 2 eta 0.25, calibrated | 0.832 [0.793, 0.869] |  |  |  |  |  | 0.503 |",
        "| guidance alone | 0.824 |",
        r"| 1 | mild &lt;b&gt;\|\* |",
        "| 2 | sévère NPDR |",
        "a &lt;note&gt;",
        "statistics of single training images",
        "fitted on 60 validation images",
        "ddim 2 eta 0.25, 3 per image, views 2, seed 5",
        "have 12 bits",
    ):
        assert part in cards[0], part
    front_matter = yaml.safe_load(cards[0].split("---\n")[1])
    assert front_matter["library_name"] == "diffmic_fast"
    assert "<b>" not in cards[0]


def test_the_card_is_of_this_model_and_its_names_are_text(model, tmp_path):
    folder = tmp_path / "<b>retina_1"
    evaluation = {**EVALUATION, "results": [{"method": "own | <i>", "accuracy": 0.5}]}
    model.save_pretrained(folder, evaluation=evaluation)
    card = (folder / "README.md").read_text()
    for part in (
        "# &lt;b&gt;retina\\_1\n",
        r"| own \| &lt;i&gt; | 0.500 |",
        "32 x 32 pixels, RGB; the image is resized.",
        f"Mean {[0.1, 0.2, 1 / 3]}, standard deviation {[0.5, 0.25, 0.7]}",
        "Calibrated for ddim, steps 2, eta 0.25, samples 3, views 2: ",
    ):
        assert part in card, part
    plain = DiffMIC(dataclasses.replace(MODEL, classes=203))
    plain.class_names = tuple(f"grade {c}" for c in range(203))
    plain.preprocessing = Preprocessing()
    plain.save_pretrained(tmp_path / "plain")
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "| 199 | grade 199 |\n\n3 more." in card and "grade 200" not in card
    assert "the largest centred square is resized" in card
    assert "statistics of single training images" not in card


def test_evaluations_that_do_not_fit(model, tmp_path):
    (tmp_path / "e.json").write_text("{")
    for evaluation, message in (
        (tmp_path / "nothere.json", "cannot be read: No such file"),
        (tmp_path / "e.json", "is not JSON"),
        ({"results": []}, "must be the JSON of diffmic-fast evaluate --json"),
        (EVALUATION | {"classes": ["a", "b", "c"]}, "classes must be those of the model"),
    ):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "a", evaluation=evaluation)
    assert not (tmp_path / "a").exists()


def test_preprocessing_that_was_stated_later_is_saved(tmp_path):
    model = DiffMIC(MODEL)
    model.preprocessing = Preprocessing(bit_depth=10)
    model.save_pretrained(tmp_path / "a")
    assert DiffMIC.from_pretrained(tmp_path / "a").preprocessing == Preprocessing(bit_depth=10)
