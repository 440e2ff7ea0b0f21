"""Latents against diffusers' own encode path."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Pipeline
from safetensors.torch import load_file, save_file

from flux2_core import embedded as embedded_package
from flux2_core.cache import proofs
from flux2_core.config.sections import Latents, Model
from flux2_core.data.pictures.load import load
from flux2_core.data.pictures.transform import Transform
from flux2_core.errors import DataError, SetupError
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.model.latents import (
    from_tokens,
    image_ids,
    patchify,
    reference_ids,
    text_ids,
    to_model,
    to_tokens,
    unpatchify,
)
from flux2_core.model.vae import Vae

SQUARE = Transform(96, 96, 96, 96, 0, 0)


def test_latents_equal_the_pipelines(tiny_model: Path) -> None:
    """Our latents equal the mode of diffusers' VAE, patchified and normalised by the pipeline's own functions."""
    stored = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8))
    pixels = (stored.permute(0, 3, 1, 2).contiguous().float() / 255 - 0.5) / 0.5
    vae = AutoencoderKLFlux2.from_pretrained(tiny_model / "vae")
    with torch.no_grad():
        latents = Flux2Pipeline._patchify_latents(vae.encode(pixels).latent_dist.mode())
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    ours = Vae(resolve(Model(path=str(tiny_model)), parts=("vae",))).encode(stored)
    assert ours.shape == (2, 128, 4, 6)
    assert (ours - (latents - mean) / std).abs().max() <= 2e-6
    assert std.std() > 0.01, "the statistics must not be trivial, or this test shows nothing"


def embedded() -> ModelFolder:
    """The trained small model."""
    return resolve(Model(path=str(Path(embedded_package.__file__).parent / "model")), parts=("vae",))


def test_in_bf16_it_encodes_nearly_the_same() -> None:
    """The embedded VAE in bf16, on pictures of each format that the self-test has: latents under 1 % apart, and decoded
    pixels a fifth of one of 255 levels on average, two at most; decoding is fp32's to the bit."""
    exact, half = Vae(embedded()), Vae(embedded(), precision="bf16")
    files = [file for file in sorted(proofs.FILES.iterdir()) if file.name != proofs.BEFORE]
    pixels = torch.stack([torch.from_numpy(load(str(file), SQUARE, latents=Latents())) for file in files])
    ours, theirs = half.encode(pixels), exact.encode(pixels)
    off = (ours - theirs).abs()
    assert ours.dtype == torch.float32
    assert 1e-4 < (ours - theirs).norm() / theirs.norm() < 0.01
    assert (float(off.mean()), float(off.max())) < (0.008, 0.1)
    assert torch.equal(half.decode(theirs), exact.decode(theirs))
    moved = (exact.decode(ours).float() - exact.decode(theirs).float()).abs()
    assert float(moved.mean()) < 0.2
    assert float(moved.max()) <= 2


def test_bf16_is_refused_where_it_changes_latents(tmp_path: Path, tiny_model: Path) -> None:
    """A VAE whose first maps are small beside their mean loses them in bf16: refused with the figure and the way out,
    where fp32 goes on."""

    def lifted(tensors: dict[str, torch.Tensor]) -> None:
        tensors["encoder.conv_in.bias"] += 300

    model = resolve(Model(path=str(spoilt(tiny_model, tmp_path, lifted))), parts=("vae",))
    Vae(model)
    with pytest.raises(
        DataError, match=r'latents\.precision="bf16" moves its latents by \d+\.\d+%.* 2% are allowed'
    ) as told:
        Vae(model, precision="bf16")
    assert 'set latents.precision="fp32"' in str(told.value)


def test_one_compiled_graph_for_all_buckets(tiny_model: Path) -> None:
    """Compiled, the encoder makes the latents that it makes uncompiled, of every size from the same graph."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    model = resolve(Model(path=str(tiny_model)), parts=("vae",))
    plain, compiled = Vae(model), Vae(model, compiler=backend)  # type: ignore[arg-type]
    for batch, height, width in ((2, 64, 96), (1, 96, 64), (3, 48, 48), (2, 64, 64)):
        pixels = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8)
        assert (compiled.encode(pixels) - plain.encode(pixels)).abs().max() <= 1e-5
    assert len(graphs) <= 2, "a graph for each size costs a minute each"
    assert graphs, "nothing was compiled"


def test_a_picture_is_never_cut_into_tiles(tiny_model: Path) -> None:
    """diffusers' tiles are other latents and other pictures, far beyond a stored value's rounding, since norms and
    attention see a tile alone: so no picture is encoded or decoded in tiles, however large (decisions/0037)."""
    vae = Vae(resolve(Model(path=str(tiny_model)), parts=("vae",)))
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8, generator=generator), size=(256, 256))
    pixels = (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert not vae.vae.use_tiling
    whole, drawn = (latents := vae.encode(pixels)), vae.decode(latents)
    vae.vae.enable_tiling()
    vae.vae.tile_sample_min_size, vae.vae.tile_latent_min_size = 128, 16
    assert (vae.encode(pixels) - whole).norm() > 0.02 * whole.norm() > 20 * (whole.half() - whole).norm()
    assert (vae.decode(whole).int() - drawn.int()).abs().max() > 2


def test_decode_inverts_the_normalisation(tiny_model: Path) -> None:
    """Decoding our latents equals decoding the VAE's own, so that previews show what was cached."""
    vae = Vae(resolve(Model(path=str(tiny_model)), parts=("vae",)))
    pixels = torch.randint(0, 256, (1, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        own = vae.vae.decode(vae.vae.encode(to_model(pixels)).latent_dist.mode()).sample
    expected = ((own / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert (vae.decode(vae.encode(pixels)).int() - expected.int()).abs().max() <= 1


def test_the_value_range_is_torchvisions_bit_for_bit() -> None:
    """0..255 maps by ToTensor then Normalize(0.5, 0.5) in fp32: compared with that arithmetic in numpy."""
    levels = np.arange(256, dtype=np.uint8)
    reference = (levels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    seen = to_model(torch.from_numpy(levels).view(1, 256, 1, 1).expand(1, 256, 1, 3))
    assert seen.shape == (1, 3, 256, 1)
    assert all((channel.flatten().numpy() == reference).all() for channel in seen[0])
    assert (seen.min(), seen.max()) == (-1, 1)


def test_patchify_order_and_inverse() -> None:
    """Channels come in the order (channel, row, column), as in diffusers, and unpatchify undoes it."""
    latents = torch.randn(2, 32, 6, 4)
    assert torch.equal(patchify(latents), Flux2Pipeline._patchify_latents(latents))
    assert torch.equal(unpatchify(patchify(latents)), latents)
    assert torch.equal(from_tokens(to_tokens(latents), height=6, width=4), latents)


def test_position_ids_equal_the_pipelines() -> None:
    """Image and text ids equal diffusers' own."""
    latents = torch.zeros(1, 128, 3, 5)
    assert torch.equal(image_ids(3, 5), Flux2Pipeline._prepare_latent_ids(latents)[0])
    assert torch.equal(text_ids(7), Flux2Pipeline._prepare_text_ids(torch.zeros(1, 7, 4))[0])
    reference = Flux2Pipeline._prepare_image_ids([torch.zeros(1, 128, 3, 5), torch.zeros(1, 128, 3, 5)])[0]
    assert torch.equal(torch.cat([image_ids(3, 5, time=10), image_ids(3, 5, time=20)]), reference)


def spoilt(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a model whose VAE's tensors are changed."""
    copy = Path(shutil.copytree(model, folder / "spoilt"))
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({"bn.running_var": t["bn.running_var"] * -1}), "negative variance"),
        (lambda t: t.update({"bn.running_var": t["bn.running_var"] * 0}), "no variance"),
        (lambda t: t["bn.running_mean"].fill_(float("nan")), "NaN or infinity"),
        (lambda t: t["bn.running_var"].fill_(float("inf")), "NaN or infinity"),
        (lambda t: t.update({"bn.running_mean": torch.zeros(64)}), "cannot be loaded|64"),
        (lambda t: t.pop("bn.running_mean"), "lack bn.running_mean"),
        (lambda t: t.pop("encoder.conv_in.weight"), "lack encoder.conv_in.weight"),
        (lambda t: t.update({"another": torch.zeros(1)}), "holds another, which a VAE of this configuration"),
    ],
)
def test_wrong_statistics_are_refused_at_load(
    tiny_model: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], words: str
) -> None:
    """Batch-norm statistics of another shape, not finite, negative or absent, and missing weights: one clear error."""
    model = resolve(Model(path=str(spoilt(tiny_model, tmp_path, change))), parts=("vae",))
    with pytest.raises(SetupError, match=words) as caught:
        Vae(model)
    assert str(model.path / "vae") in str(caught.value)


def test_what_is_loaded_is_what_is_hashed(tiny_model: Path, tmp_path: Path) -> None:
    """A `.bin` is never read: not beside a decoy either, which then is what the fingerprint and the loader see."""
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    (whole,) = (copy / "vae").glob("*.safetensors")
    tensors = load_file(whole)
    whole.unlink()
    torch.save(tensors, copy / "vae" / "diffusion_pytorch_model.bin")
    save_file({"decoy": torch.zeros(1)}, copy / "vae" / "decoy.safetensors", metadata={"format": "pt"})
    model = resolve(Model(path=str(copy)), parts=("vae",))
    assert [file.name for file in model.weight_files("vae")] == ["decoy.safetensors"]
    with pytest.raises(SetupError, match=r"the files lack bn.running_mean"):
        Vae(model)


def test_a_file_of_another_name_is_loaded_too(tiny_model: Path, tmp_path: Path) -> None:
    """Any safetensors file of the folder counts, since any is hashed: the name is no reason to load another one."""
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    (whole,) = (copy / "vae").glob("*.safetensors")
    whole.rename(whole.with_name("ae.safetensors"))
    pixels = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    ours, before = (Vae(resolve(Model(path=str(path)), parts=("vae",))).encode(pixels) for path in (copy, tiny_model))
    assert torch.equal(ours, before)


def test_reference_ids_are_the_pipelines() -> None:
    """Reference pictures have times 10, 20, ..."""
    reference = Flux2Pipeline._prepare_image_ids([torch.zeros(1, 128, 3, 5), torch.zeros(1, 128, 2, 2)])[0]
    assert torch.equal(torch.cat([reference_ids(3, 5, 0), reference_ids(2, 2, 1)]), reference)
