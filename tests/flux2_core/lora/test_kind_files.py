"""Files of every kind of adapter, against diffusers' own loader, ComfyUI's formulas and our reader."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux2_core.accelerator import CPU
from flux2_core.config.adapter import Lora
from flux2_core.errors import DataError, UsageError
from flux2_core.lora import adapter, file, names, reading, targets, whole
from flux2_core.lora.kinds import KINDS
from tests.flux2_core.lora.test_file import forward, loaded
from tests.flux2_core.lora.test_kinds import GIVEN, adapted, base, merged, moved
from tests.random_adapter import state

__all__ = ["base"]  # a fixture
CLEAN = 0.0  # noise level at which t-lora has all its ranks, as every other loader gives it
RANKS = {"ranks": {"mlp": 3, "transformer_blocks.[0-0]": 8}}


def weight_of(base: Any) -> Any:
    return lambda module: base.get_submodule(module).weight.detach().clone()


def finished(base: Any, **given: Any) -> dict[str, torch.Tensor]:
    """What a run that learned something exports."""
    return targets.finished(Lora(**given), state(moved(adapted(base, **given))))


def written(base: Any, folder: Path, **given: Any) -> tuple[file.Paths, dict[str, torch.Tensor]]:
    done = finished(base, **given)
    comfyui = whole.for_comfyui(done, weight_of(base))
    return file.write(folder, "run", done, metadata={}, dtype="fp32", comfyui=comfyui), done


@pytest.mark.parametrize("ranks", [{}, RANKS], ids=["one rank", "ranks by pattern"])
@pytest.mark.parametrize("name", [name for name, given in GIVEN.items() if KINDS[given["kind"]].diffusers])
def test_diffusers_loads_it(base: Any, tmp_path: Path, caplog: Any, name: str, ranks: dict[str, Any]) -> None:
    """Flux2Pipeline.load_lora_weights gives the forward of the merged differences, alpha != rank, without a key left
    over: of each kind that the table says diffusers loads; and again without looking at the metadata."""
    paths, done = written(base, tmp_path, **GIVEN[name] | ranks)
    wanted = forward(merged(base, done), CLEAN)
    for source in (str(paths.diffusers), *([load_file(paths.diffusers)] if name != "whole lokr" else [])):
        found = forward(loaded(base, source, caplog), CLEAN)
        assert (found - wanted).norm() <= 3e-6 * wanted.norm()
    assert (wanted - forward(base, CLEAN)).norm() > 5e-3 * wanted.norm()
    assert "keys" not in caplog.text


@pytest.mark.parametrize("name", ["loha", "oft"])
def test_what_diffusers_refuses(base: Any, tmp_path: Path, caplog: Any, name: str) -> None:
    """Of the other kinds diffusers loads no file, so its file has to be a plain LoRA."""
    paths, _ = written(base, tmp_path, **GIVEN[name])
    with pytest.raises(ValueError, match="Invalid adapter checkpoint"):
        loaded(base, str(paths.diffusers), caplog)


def comfyui(tensors: dict[str, torch.Tensor], base: Any) -> Any:
    """The base patched as ComfyUI patches it (comfy/weight_adapter/*.py of v0.3.77, in a line each)."""
    model = copy.deepcopy(base)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, leaf = names.parted(key.removeprefix("transformer.").replace("dora_scale", names.MAGNITUDE))
        found.setdefault(module, {})[leaf] = tensor
    for module, own in found.items():
        weight = model.get_submodule(module).weight.data
        if names.MAGNITUDE in own:
            changed = weight + own["lora_B.weight"] @ own["lora_A.weight"]
            weight[:] = (
                changed * own[names.MAGNITUDE] / (weight.norm(dim=1, keepdim=True) + torch.finfo(weight.dtype).eps)
            )
        elif "lokr_w1" in own:
            right = own["lokr_w2"] if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
            weight += torch.kron(own["lokr_w1"], right)
        elif "hada_w1_a" in own:
            weight += (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
        else:
            skew, one = own["oft_blocks"] - own["oft_blocks"].transpose(1, 2), torch.eye(own["oft_blocks"].shape[1])
            turn = (one + skew) @ (one - skew).inverse() - one
            weight += torch.einsum("k n m, k n ... -> k m ...", turn, weight.view(*turn.shape[:2], -1)).flatten(0, 1)
    return model


@pytest.mark.parametrize("name", ["dora", "lokr", "whole lokr", "loha", "oft"])
def test_comfyui_loads_it(base: Any, tmp_path: Path, name: str) -> None:
    """ComfyUI's own formulas on the file that is written for it give the merged differences, under diffusers' names,
    which it maps to slices of BFL's weights."""
    paths, done = written(base, tmp_path, **GIVEN[name])
    tensors = load_file(paths.comfyui)
    assert not any(key.endswith(".alpha") for key in tensors), "it would be taken as a strength, or as a constraint"
    wanted = forward(merged(base, done), CLEAN)
    assert (forward(comfyui(tensors, base), CLEAN) - wanted).norm() <= 3e-6 * wanted.norm()


@pytest.mark.parametrize("name", GIVEN)
def test_our_reader_reads_what_we_write(base: Any, tmp_path: Path, name: str) -> None:
    """Each file comes back bit for bit, q, k and v apart again; dora is read from the file for diffusers alone, since
    ComfyUI's has a norm of the base in it."""
    paths, done = written(base, tmp_path, **GIVEN[name])
    for path in (paths.diffusers, paths.comfyui):
        if name == "dora" and path == paths.comfyui:
            with pytest.raises(DataError, match=r"dora_scale.*file for diffusers"):
                reading.from_file(path)
            continue
        read = reading.from_file(path)
        assert read.keys() == done.keys()
        assert all(torch.equal(read[key], done[key]) for key in done)


def test_magnitudes_are_kept_whole(base: Any, tmp_path: Path) -> None:
    """In a file in bf16 a magnitude is fp32: 0.4 % of a row's size is more than many a run learns."""
    done = finished(base, **GIVEN["dora"])
    tensors = load_file(file.write(tmp_path, "run", done, metadata={}).diffusers)
    for key, tensor in tensors.items():
        plain = key.removeprefix("transformer.")
        assert tensor.dtype == (torch.float32 if key.endswith(names.MAGNITUDE) else torch.bfloat16)
        assert not key.endswith(names.MAGNITUDE) or torch.equal(tensor, done[plain])


@pytest.mark.parametrize("name", GIVEN)
def test_warm_start(base: Any, tmp_path: Path, name: str) -> None:
    """`lora.init` brings a run of the same kind to the weights that were exported, whatever the strength."""
    paths, _ = written(base, tmp_path, **GIVEN[name])
    lora = Lora(**GIVEN[name], init=str(paths.diffusers))
    model = adapted(base, **GIVEN[name])
    adapter.warm_start(model, lora, device=CPU)
    before = state(moved(adapted(base, **GIVEN[name])))
    assert all(torch.allclose(value, before[key], rtol=1e-6, atol=0) for key, value in state(model).items())
    with pytest.raises(UsageError, match=r"lora\.init=.*set lora\.targets, kind and rank"):
        adapter.warm_start(adapted(base, rank=5), Lora(rank=5, init=str(paths.diffusers)), device=CPU)


@pytest.mark.parametrize("name", GIVEN)
def test_the_nearest_plain_lora(base: Any, tmp_path: Path, caplog: Any, name: str) -> None:
    """With all ranks it is exact, with fewer its error is the root of what the smaller singular values hold, and its
    files do in diffusers what is said."""
    done = finished(base, **GIVEN[name])
    exact, error = whole.plain(done, 64, weight_of(base))
    assert error <= 1e-5
    wanted = forward(merged(base, done), CLEAN)
    assert (forward(merged(base, exact), CLEAN) - wanted).norm() <= 1e-5 * wanted.norm()
    near, error = whole.plain(done, 2, weight_of(base))
    left = total = 0.0
    for module, weights in names.modules(done).items():
        values = torch.linalg.svdvals(whole.difference(weights, lambda m=module: weight_of(base)(m)).double())
        left, total = left + float(values[2:].square().sum()), total + float(values.square().sum())
    assert error == pytest.approx((left / total) ** 0.5, rel=0.02)
    assert error >= 0.999 * (left / total) ** 0.5
    torch.manual_seed(5)
    again, _ = whole.plain(done, 2, weight_of(base))
    assert all(torch.equal(near[key], again[key]) for key in near), "equal runs give equal files"
    paths = file.write(tmp_path, "run", near, metadata={}, dtype="fp32")
    for path in (paths.diffusers, paths.comfyui):
        found = forward(loaded(base, str(path), caplog), CLEAN)
        assert (found - forward(merged(base, near), CLEAN)).norm() <= 3e-6 * wanted.norm()


def test_a_t_lora_of_ours_is_drawn_as_it_was_trained(base: Any, tmp_path: Path) -> None:
    """Its file says how many ranks work in pure noise, and drawing keeps to it; other readers see a plain LoRA."""
    given = {"kind": "t-lora", "rank": 4, "min_rank": 1}
    trained = moved(adapted(base, **given))
    said = {"cacheloom.lora_kind": "t-lora", "cacheloom.min_rank": "1"}
    done = targets.finished(Lora(**given), state(trained))
    paths = file.write(tmp_path, "run", done, metadata=said, dtype="fp32")
    for path in (paths.diffusers, paths.comfyui):
        drawing = copy.deepcopy(base)
        adapter.attach(drawing, reading.to_draw(path), device=CPU)
        for sigma in (0.1, 0.6, 1.0):
            assert (forward(drawing, sigma) - forward(trained, sigma)).abs().max() <= 1e-5
    assert not any(key.endswith(reading.LEAST) for key in reading.from_file(paths.diffusers))


@pytest.mark.parametrize("name", ["dora", "lokr", "oft"])
def test_presets_that_are_no_product(base: Any, tmp_path: Path, name: str) -> None:
    """A preset of a kind without thin factors is refused by name, with the way out; loha is added as what it is."""
    paths, _ = written(base, tmp_path, **GIVEN[name])
    with pytest.raises(UsageError, match=rf"lora\.preset=.*{name}.*output\.as_lora"):
        reading.presets(Lora(preset=(str(paths.diffusers),)))
    paths, done = written(base, tmp_path, **GIVEN["loha"])
    for module, (a_RK, b_NR) in reading.presets(Lora(preset=(str(paths.diffusers),))).items():
        wanted = whole.difference(names.modules(done)[module], lambda: torch.zeros(()))
        assert torch.allclose(b_NR @ a_RK, wanted, atol=1e-6)


HOSTILE: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], str]] = {
    "sizes of lora": ({"lora_A.weight": (4, 32), "lora_B.weight": (32, 5)}, {}, "do not fit each other"),
    "a line for a matrix": ({"lora_A.weight": (4,), "lora_B.weight": (32, 4)}, {}, "do not fit each other"),
    "no rank": ({"lora_A.weight": (0, 32), "lora_B.weight": (32, 0)}, {"lora_alpha": 4}, "strengths|do not fit"),
    "magnitude": (
        {"lora_A.weight": (4, 32), "lora_B.weight": (32, 4), "lora_magnitude_vector": (31,)}, {}, "do not fit"
    ),
    "lokr": ({"lokr_w1": (2, 2), "lokr_w2_a": (16, 4), "lokr_w2_b": (5, 16)}, {}, "do not fit each other"),
    "half of lokr": ({"lokr_w1": (2, 2), "lokr_w2_a": (16, 4)}, {}, "weights of no kind"),
    "loha": ({"hada_w1_a": (32, 4), "hada_w1_b": (4, 32), "hada_w2_a": (32, 4), "hada_w2_b": (3, 32)}, {}, "not fit"),
    "oft": ({"oft_blocks": (4, 8, 7)}, {}, "do not fit each other"),
    "two kinds": ({"oft_blocks": (4, 8, 8), "lokr_w1": (2, 2)}, {}, "weights of no kind"),
    "a pattern without end": (
        {"lora_A.weight": (4, 32), "lora_B.weight": (32, 4)},
        {"lora_alpha": 4, "alpha_pattern": {"(.*.*.*.*.*.*)*x": 2}}, "only names of modules are read",
    ),
    "a list of patterns": (
        {"lora_A.weight": (4, 32), "lora_B.weight": (32, 4)}, {"lora_alpha": 4, "alpha_pattern": [1]}, "strengths"
    ),
    "a word for a strength": (
        {"lora_A.weight": (4, 32), "lora_B.weight": (32, 4)}, {"lora_alpha": "much"}, "strengths cannot be read"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_cleanly(tmp_path: Path, name: str) -> None:
    """Weights that do not fit each other, strengths that are none and expressions without end: one sentence."""
    shapes, peft, said = HOSTILE[name]
    tensors = {
        f"transformer.transformer_blocks.0.attn.to_q.{leaf}": torch.zeros(shape) for leaf, shape in shapes.items()
    }
    note = {names.PEFT_KEY: json.dumps({f"transformer.{key}": value for key, value in peft.items()})}
    save_file(tensors, tmp_path / "x.safetensors", note if peft else None)
    with pytest.raises(DataError, match=said):
        reading.from_file(tmp_path / "x.safetensors")
