"""What `make reproduce` writes, from numbers made by hand; the runs themselves take an hour."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

import reproduce


@pytest.fixture
def write(tmp_path):
    def write(fids):
        """`fids`: {method: fid of each seed}."""
        values = {}
        for method, found in fids.items():
            for seed, fid in enumerate(found):
                name = "base" if method == "base" else f"{reproduce.folder(method)}-{seed}"
                metrics = {"fid": fid, "fdd": 2 * fid, "precision": 0.5, "recall": 0.25, "prompt followed": 0.75}
                values[name] = dict.fromkeys(reproduce.SAMPLERS, metrics)
        args = SimpleNamespace(
            seeds=[0, 1], fine_tuning_steps=600, steps=400, num_images=2048, report=tmp_path / "reproduction.md"
        )
        reproduce.write_report(values, args)
        return (tmp_path / "reproduction.md").read_text()

    return write


def test_report_has_means_spreads_and_the_ordering(write):
    fids = {"base": [30.0], "start": [9.0, 11.0]}
    fids |= {method: [fid - 1, fid + 1] for method, fid in reproduce.PAPER.items()}
    fids["fine-tuning at ADT's rate"] = [1.0, 1.0]  # which the paper does not have
    text = write(fids)
    assert "| start | 10.00 ± 1.41 | 20.00 ± 2.83 | 0.500 ± 0.000 | 0.250 ± 0.000 | 0.750 ± 0.000 |" in text
    assert "| base | 30.00 | 60.00 | 0.500 | 0.250 | 0.750 |" in text
    assert f"| ADT | {reproduce.SAMPLERS[0]} | 18.84 | 20.84 |" in text
    assert text.count("The ordering holds.") == 2 and "does not hold" not in text
    assert "ADT is below fine-tuning in 2 of 2 seeds" in text
    fids["DRTune's path"] = [1.0, 30.0]
    text = write(fids)
    assert text.count("The ordering does not hold.") == 2
    assert "ADT is below DRTune's path in 1 of 2 seeds" in text


def test_ablations_change_one_thing(tmp_path):
    """As the training script reads them; the ablation without a diffusion loss cannot balance the weight by it."""
    import train_adt_sd15

    base = ["--pretrained_model_name_or_path", "base", "--train_data_dir", str(tmp_path), "--resolution", "32"]
    options = {name: vars(train_adt_sd15.parse_args([*base, *more])) for name, more in reproduce.METHODS.items()}
    changes = {
        name: {key for key, value in given.items() if value != options["ADT"][key]} for name, given in options.items()
    }
    assert reproduce.METHODS.keys() - reproduce.PAPER.keys() == {"fine-tuning at ADT's rate"}
    assert changes["projected discriminator"] == {"discriminator_type"}
    assert changes["DRTune's path"] == {"gradient_path"}
    assert changes["no diffusion loss"] == {"diffusion_loss_weight", "adversarial_loss_weight"}
    control, tuned = options["fine-tuning at ADT's rate"], options["fine-tuning"]
    assert {key for key in control if control[key] != tuned[key]} == {"learning_rate", "lr_warmup_steps"}
    assert all(control[key] == options["ADT"][key] for key in ("learning_rate", "lr_warmup_steps"))


def test_features_are_the_evaluators_standardised(tmp_path):
    evaluator = reproduce.load_evaluator(reproduce.DEMO / "assets" / "evaluator" / "model.safetensors")
    pixels, _, _ = reproduce.draw("shaded", 50, seed=5)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    torch.jit.script(reproduce.EvaluatorFeatures(evaluator, images / 255)).save(tmp_path / "evaluator.pt")
    found = torch.jit.load(tmp_path / "evaluator.pt")(images, return_features=True)
    features = evaluator(images / 255)
    assert torch.allclose(found, features / features.std(0), atol=1e-4)
    assert np.allclose(found.std(0), 1, atol=1e-3)
