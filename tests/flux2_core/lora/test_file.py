"""LoRA files against diffusers' own readers, on a small random transformer of FLUX.2's structure."""

from __future__ import annotations

import copy
import json
import logging
import re

import pytest
import torch
from diffusers import Flux2Pipeline
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flux2_core.config.adapter import Lora
from flux2_core.config.reading import parse
from flux2_core.embedded import tiny_model
from flux2_core.errors import DataError
from flux2_core.lora import targets as lora_targets
from flux2_core.lora.adapter import inject, load
from flux2_core.lora.file import to_comfyui, to_diffusers, write
from flux2_core.lora.metadata import describe
from flux2_core.lora.reading import from_file
from flux2_core.lora.targets import match
from flux2_core.model.families import DEV
from flux2_core.model.transformer import linear_names
from tests.random_adapter import state

RANK, SCALE = 4, 2.5 / 4
TARGETS = {
    "all": "all",
    "attention": "attention",
    "q only": r"transformer_blocks\.\d+\.attn\.to_q",
    "text k and v, one block": r"transformer_blocks\.1\.attn\.add_[kv]_proj",
    "single blocks": r"single_transformer_blocks\.\d+\.attn\.to_out",
}


@pytest.fixture(scope="module")
def base():
    model = tiny_model.transformer(tiny_model.RANDOM_SHAPE)
    tiny_model.randomize(model, torch.Generator().manual_seed(1))
    return model.eval()


def adapter_for(base, targets, *, rank=RANK, seed=0):
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for module in match(Lora(targets=targets), linear_names(base)):
        out, width = base.get_submodule(module).weight.shape
        adapter[f"{module}.lora_A.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
        adapter[f"{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator) / rank**0.5
    return adapter


def forward(model, *sigmas, grad=False):
    """Its prediction of a sample at each noise level, all of the same noise and text."""
    generator = torch.Generator().manual_seed(9)
    many = len(sigmas) or 1
    config = model.config
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(2), torch.arange(3), torch.arange(1))
    text_ids = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(5))
    with torch.set_grad_enabled(grad):
        return model(
            hidden_states=torch.randn(1, 6, config.in_channels, generator=generator).expand(many, -1, -1),
            encoder_hidden_states=torch.randn(1, 5, config.joint_attention_dim, generator=generator).expand(
                many, -1, -1
            ),
            timestep=torch.tensor(sigmas or [0.4]),
            img_ids=ids[None],
            txt_ids=text_ids[None],
            guidance=torch.tensor([3.5] * many),
            return_dict=False,
        )[0]


def merged(base, adapter, scale):
    model = copy.deepcopy(base)
    for key in [key for key in adapter if key.endswith("lora_A.weight")]:
        module = key.removesuffix(".lora_A.weight")
        weight = model.get_submodule(module).weight
        weight.data += scale * adapter[f"{module}.lora_B.weight"] @ adapter[key]
    return model


def loaded(base, source, caplog):
    """The transformer after `load_lora_weights`, with whatever diffusers warned about in `caplog`."""
    logging.getLogger("diffusers").propagate = True
    pipeline = Flux2Pipeline(None, None, None, None, copy.deepcopy(base))
    pipeline.load_lora_weights(source)
    return pipeline.transformer


def strong(adapter, scale=SCALE):
    """The adapter as it is when it is finished: with its strength inside."""
    return {key: tensor * scale if "lora_B" in key else tensor for key, tensor in adapter.items()}


def written(folder, adapter, *, scale=SCALE, dtype="fp32", metadata=None):
    return write(folder / "lora", "run", strong(adapter, scale), dtype=dtype, metadata=metadata or {})


def config(**lora_section):
    return parse(
        {
            "run": "teapot",
            "model": {"path": "black-forest-labs/FLUX.2-dev"},
            "data": [{"path": "pictures", "trigger": "zwx"}],
            "lora": lora_section,
        }
    )


@pytest.mark.parametrize("file", ["diffusers", "comfyui"])
@pytest.mark.parametrize("targets", TARGETS)
def test_diffusers_reads_both_files_as_the_merged_weights(base, tmp_path, caplog, targets, file):
    """Flux2Pipeline.load_lora_weights of either file gives the forward of W + alpha/rank B A and leaves no key over."""
    adapter = adapter_for(base, TARGETS[targets])
    path = getattr(written(tmp_path, adapter), file)
    ours = forward(loaded(base, str(path), caplog))
    reference = forward(merged(base, adapter, SCALE))
    assert (ours - reference).abs().max() <= 1e-5
    assert (ours - reference).norm() <= 1e-6 * reference.norm()
    assert (reference - forward(base)).abs().max() > 1e-2, "the adapter must change something"
    assert "keys" not in caplog.text


@pytest.mark.parametrize("name_as", [to_diffusers, to_comfyui])
def test_weights_alone_carry_the_strength(base, caplog, name_as):
    """A reader that ignores the metadata (here: diffusers, given tensors only) gets the same forward."""
    adapter = adapter_for(base, "all")
    ours = forward(loaded(base, name_as(strong(adapter)), caplog))
    assert (ours - forward(merged(base, adapter, SCALE))).abs().max() <= 1e-5


@pytest.mark.parametrize(("kind", "scale"), [("lora", 0.5), ("rslora", 1.0)])
def test_the_files_mean_what_was_trained(base, tmp_path, caplog, kind, scale):
    """An adapter as it runs in training (alpha 2, rank 4, both kinds) and its exported file agree."""
    section = Lora(rank=4, alpha=2, kind=kind)
    targets = match(section, linear_names(base))
    trained = copy.deepcopy(base)
    inject(trained, section, targets)
    adapter = adapter_for(base, "all")
    load(trained, adapter, device=torch.device("cpu"))
    assert lora_targets.strength(section, 4) == scale
    paths = write(tmp_path / "lora", "run", lora_targets.finished(section, state(trained)), dtype="fp32", metadata={})
    for path in (paths.diffusers, paths.comfyui):
        assert (forward(loaded(base, str(path), caplog)) - forward(trained)).abs().max() <= 1e-5


def test_comfyui_names_are_those_of_bfls_model(base):
    """The key set of one double and one single block, spelled out."""
    adapter = adapter_for(base, r"(single_)?transformer_blocks\.1\..*")
    modules = {key.rpartition(".lora_")[0] for key in to_comfyui(adapter)}
    double = ["img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2"]
    double += [name.replace("img", "txt") for name in double]
    assert modules == {f"diffusion_model.double_blocks.1.{name}" for name in double} | {
        f"diffusion_model.single_blocks.1.linear{n}" for n in (1, 2)
    }


def test_comfyui_update_is_that_of_bfls_weights(base):
    """diffusers' converter for the *model* (not for LoRA) turns B A of each fused Linear into our own three updates."""
    adapter = adapter_for(base, "all")
    named = to_comfyui(strong(adapter))
    updates = {}
    for key in [key for key in named if key.endswith("lora_A.weight")]:
        module = key.removesuffix(".lora_A.weight")
        updates[f"{module.removeprefix('diffusion_model.')}.weight"] = named[f"{module}.lora_B.weight"] @ named[key]
    theirs = convert_flux2_transformer_checkpoint_to_diffusers(updates)
    assert theirs.keys() == {re.sub(r"lora_[AB]\.", "", key) for key in adapter}
    for key, update in theirs.items():
        module = key.removesuffix(".weight")
        ours = SCALE * adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
        assert torch.allclose(update, ours, atol=1e-6)


@pytest.mark.parametrize("targets", TARGETS)
def test_round_trip(base, tmp_path, targets):
    """Both files read back as the adapter with the scale in B, bit for bit, with no module more or less."""
    adapter = adapter_for(base, TARGETS[targets])
    expected = {key: value * SCALE if "lora_B" in key else value for key, value in adapter.items()}
    paths = written(tmp_path, adapter)
    for path in (paths.diffusers, paths.comfyui):
        read = from_file(path)
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[key], expected[key]) for key in expected)


def test_an_update_trained_on_the_fused_linear_is_read(base, tmp_path):
    """ai-toolkit's files adapt BFL's qkv itself: q, k and v then share one A, and each B is a third."""
    fused_a, fused_b = torch.randn(6, 32), torch.randn(96, 6)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file({f"{name}.lora_A.weight": fused_a, f"{name}.lora_B.weight": fused_b}, tmp_path / "x.safetensors")
    read = from_file(tmp_path / "x.safetensors")
    for third, part in enumerate(("to_q", "to_k", "to_v")):
        module = f"transformer_blocks.0.attn.{part}"
        update = read[f"{module}.lora_B.weight"] @ read[f"{module}.lora_A.weight"]
        assert torch.equal(update, fused_b[third * 32 : third * 32 + 32] @ fused_a)


def test_strengths_of_foreign_files_are_folded_in(base, tmp_path):
    """`.alpha` keys and peft metadata (alpha != rank, rsLoRA) end up in B, by module where there is a pattern."""
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    q, k = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"
    pairs = {f"{m}.{kind}.weight": t.clone() for m in (q, k) for kind, t in (("lora_A", a), ("lora_B", b))}
    peft = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn.to_k": 2}}
    file = tmp_path / "metadata.safetensors"
    save_file({f"transformer.{key}": t for key, t in pairs.items()}, file, {"lora_adapter_metadata": json.dumps(peft)})
    read = from_file(file)
    assert torch.equal(read[f"{q}.lora_B.weight"], b * 2)
    assert torch.equal(read[f"{k}.lora_B.weight"], b * 0.5)
    peft |= {"transformer.use_rslora": True}
    save_file({f"transformer.{key}": t for key, t in pairs.items()}, file, {"lora_adapter_metadata": json.dumps(peft)})
    assert torch.equal(from_file(file)[f"{q}.lora_B.weight"], b * 4), "alpha / sqrt(rank)"

    file = tmp_path / "alpha.safetensors"
    down_up = {"lora_down.weight": a, "lora_up.weight": b, "alpha": torch.tensor(1.0)}
    save_file({f"diffusion_model.single_blocks.0.linear2.{key}": t for key, t in down_up.items()}, file)
    read = from_file(file)
    assert torch.equal(read["single_transformer_blocks.0.attn.to_out.lora_B.weight"], b / 4)


def test_equal_runs_write_equal_files(base, tmp_path):
    """Files are the same byte for byte, with twenty metadata keys, and safetensors' own reader accepts them."""
    adapter = adapter_for(base, "all")
    metadata = {f"key{n}": "value" for n in range(20)}
    first = written(tmp_path / "1", adapter, metadata=metadata)
    second = written(tmp_path / "2", dict(reversed(adapter.items())), metadata=dict(reversed(metadata.items())))
    assert first.diffusers.read_bytes() == second.diffusers.read_bytes()
    assert first.comfyui.read_bytes() == second.comfyui.read_bytes()
    tensors = load_file(first.diffusers)
    assert all(torch.equal(tensors[key], value) for key, value in to_diffusers(strong(adapter)).items())


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_low_precision(base, tmp_path, dtype, stored):
    """Weights are cast after the scale went in, to the dtype asked for; no key says alpha."""
    adapter = adapter_for(base, "all")
    tensors = load_file(written(tmp_path, adapter, dtype=dtype).comfyui)
    expected = to_comfyui(strong(adapter))
    assert all(torch.equal(tensors[key], expected[key].to(stored)) for key in expected)
    assert tensors.keys() == expected.keys()
    assert not any("alpha" in key for key in tensors)


def test_metadata_says_what_it_is_and_no_secret(base, tmp_path, monkeypatch):
    """modelspec, ss_ and lineage keys, alpha = rank for peft; nothing of the environment."""
    monkeypatch.setenv("HF_TOKEN", "hf_plantedSecret123")
    run = config(rank=RANK, alpha=2.5)
    lineage = {"config_sha256": "ab" * 32, "text_fingerprint": "cd" * 32}
    metadata = describe(run, base=DEV.published[0], steps=30, lineage=lineage)
    paths = written(tmp_path, adapter_for(base, "all"), metadata=metadata)
    for path in (paths.diffusers, paths.comfyui):
        assert b"plantedSecret" not in path.read_bytes()
        with safe_open(path, "pt") as file:
            found = file.metadata()
        assert found["modelspec.architecture"] == "Flux.2-dev/lora"
        assert found["modelspec.trigger_phrase"] == "zwx"
        assert found["ss_network_alpha"] == found["ss_network_dim"] == str(RANK)
        assert found["cacheloom.lora_alpha"] == "2.5"
        assert found["cacheloom.text_fingerprint"] == "cd" * 32
        peft = json.loads(found["lora_adapter_metadata"])
        assert peft["transformer.lora_alpha"] == peft["transformer.r"]
        assert peft["transformer.alpha_pattern"] == peft["transformer.rank_pattern"]


def test_what_cannot_be_written_leaves_the_old_file(base, tmp_path):
    """NaN and modules outside the blocks are refused; the earlier files stay, and no temporary one is left."""
    adapter = adapter_for(base, "all")
    paths = written(tmp_path, adapter)
    before = paths.comfyui.read_bytes()
    key = next(iter(adapter))
    with pytest.raises(DataError, match=r"NaN.*learning_rate"):
        written(tmp_path, adapter | {key: torch.full_like(adapter[key], torch.nan)})
    outside = {"proj_out.lora_A.weight": torch.ones(1, 2), "proj_out.lora_B.weight": torch.ones(2, 1)}
    with pytest.raises(DataError, match="proj_out"):
        to_comfyui(outside)
    assert paths.comfyui.read_bytes() == before
    assert len(list(paths.comfyui.parent.iterdir())) == 2


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_A.weight", "not a Linear"),
        ("diffusion_model.double_blocks.0.img_mod.lin.lora_A.weight", "another model"),
        ("transformer.transformer_blocks.0.attn.to_q.magnitude", "nothing else"),
    ],
)
def test_foreign_keys_are_refused_by_name(tmp_path, key, said):
    """Nothing in a file is skipped in silence."""
    file = tmp_path / "x.safetensors"
    save_file({key: torch.ones(1, 2), key.replace("lora_A", "lora_B"): torch.ones(2, 1)}, file)
    with pytest.raises(DataError, match=said):
        from_file(file)


def test_files_that_are_none_are_refused(tmp_path):
    """A missing, an empty and a text file each get one sentence."""
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({}, tmp_path / "empty.safetensors")
    for name, said in (("none", "no such file"), ("text", "not a safetensors file"), ("empty", "holds no LoRA")):
        with pytest.raises(DataError, match=said):
            from_file(tmp_path / f"{name}.safetensors")
