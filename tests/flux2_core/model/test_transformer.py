"""The transformer: built without weights, sharded, each process reading its own rows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from flux2_core.config.adapter import Lora
from flux2_core.config.sections import Model
from flux2_core.errors import SetupError
from flux2_core.lora import adapter, targets
from flux2_core.model import frozen_linear, transformer
from flux2_core.model.folder import ModelFolder, resolve
from tests.flux2_core import sharded_process
from tests.flux2_core.sharded_process import Counting, CountingFile, frozen, sharded
from tests.in_process import in_ranks

CPU = torch.device("cpu")
FILE = "transformer/diffusion_pytorch_model.safetensors"


def folder(path: Path | str) -> ModelFolder:
    return resolve(Model(path=str(path)), parts=("transformer",))


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    """Only the transformer, to be spoilt."""
    for part in ("transformer",):
        shutil.copytree(tiny_model / part, tmp_path / "copied" / part)
    shutil.copy(tiny_model / "model_index.json", tmp_path / "copied")
    return tmp_path / "copied"


def in_shards(path: Path) -> None:
    """Split the weights over two files with an index, as large models are."""
    tensors = load_file(path / FILE)
    (path / FILE).unlink()
    names, where = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"x-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / "transformer" / file)
        where |= dict.fromkeys(part, file)
    (path / "transformer" / "x.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_built_without_weights(tiny_model: Path) -> None:
    """Building takes no memory for weights: everything is on the meta device, frozen, in the asked precision."""
    built = transformer.build(folder(tiny_model), dtype=torch.bfloat16)
    assert {parameter.device.type for parameter in built.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in built.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in built.parameters())
    assert not list(built.buffers()), "buffers would stay on the meta device"


@pytest.mark.parametrize("shards", [False, True])
def test_weights_equal_the_files(copied: Path, shards: bool) -> None:
    """Every parameter equals the file's, also under an adapter, from one file or several."""
    wanted = Flux2Transformer2DModel.from_pretrained(copied, subfolder="transformer").state_dict()
    if shards:
        in_shards(copied)
    built = transformer.build(folder(copied), dtype=torch.float32)
    adapter.inject(built, Lora(rank=2), targets.match(Lora(), transformer.linear_names(built)))
    transformer.load_weights(built, folder(copied), device=CPU)
    frozen = {n.replace(transformer.BASE_LAYER, ""): p for n, p in built.named_parameters() if not p.requires_grad}
    assert frozen.keys() == wanted.keys()
    assert all(torch.equal(frozen[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("precision", ["int8", "int4", "fp8-matmul"])
def test_rounding_some_rows_at_a_time(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """A weight in few bits has the same bytes however many of its rows are rounded at a time."""
    monkeypatch.setattr(transformer, "AT_ONCE", 5)
    built = transformer.build(folder(tiny_model), dtype=torch.float32)
    frozen_linear.swap(built, precision, dtype=torch.float32, device=CPU)
    transformer.load_weights(built, folder(tiny_model), device=CPU)
    name = "single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    payload, scale = frozen_linear.quantise(load_file(tiny_model / FILE)[f"{name}.weight"], precision)
    assert len(payload) > 2 * 5
    assert torch.equal(built.get_submodule(name).payload, payload)
    assert torch.equal(built.get_submodule(name).scale, scale)


def spoil(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / FILE)
    change(tensors)
    save_file(tensors, path / FILE)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda t: t.pop("transformer_blocks.1.attn.to_q.weight"), r"lack transformer_blocks\.1\.attn\.to_q\.weight"),
        (
            lambda t: t.update({"proj_out.weight": torch.zeros(3, 4)}),
            r"proj_out\.weight is \[3, 4\], the configuration says \[128, 32\]",
        ),
        (
            lambda t: t.update({"transformer_blocks.2.attn.to_q.weight": torch.zeros(1)}),
            r"holds transformer_blocks\.2\.attn\.to_q\.weight, which a model of this configuration does not have",
        ),
    ],
)
def test_files_of_another_model(copied: Path, change: Any, wanted: str) -> None:
    """A missing tensor, another shape, a tensor too many: refused with the file or folder and the tensor's name."""
    spoil(copied, change)
    with pytest.raises(SetupError, match=wanted):
        transformer.load_weights(transformer.build(folder(copied), dtype=torch.float32), folder(copied), device=CPU)


def test_a_cut_file(copied: Path) -> None:
    """A download that broke off is named, with what to do."""
    file = copied / FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SetupError, match=r"not a whole safetensors file .*download the model again"):
        transformer.load_weights(transformer.build(folder(copied), dtype=torch.float32), folder(copied), device=CPU)


def test_projected_rows_need_no_projection(tiny_model: Path) -> None:
    """Without `context_embedder` its weight in the files is passed over, and rows go in as they are."""
    built = transformer.build(folder(tiny_model), dtype=torch.float32)
    transformer.skip_projection(built)
    transformer.load_weights(built, folder(tiny_model), device=CPU)
    rows = torch.randn(1, 3, 32)
    assert built.context_embedder(rows) is rows
    assert "context_embedder" not in transformer.linear_names(built)


@pytest.mark.parametrize(("world", "rank"), [(2, 1), (3, 0), (5, 4), (40, 39)])
def test_a_process_reads_its_own_rows(copied: Path, monkeypatch: pytest.MonkeyPatch, world: int, rank: int) -> None:
    """Of any number of processes, even or not, more than a tensor has rows too, one reads its own rows' bytes only.

    A group that sends nothing stands in for the others (one rank per size: torch remembers offsets by mesh).
    """
    wanted = load_file(copied / FILE)
    in_shards(copied)
    monkeypatch.setattr(transformer, "safe_open", CountingFile)
    monkeypatch.setattr(Counting, "read", 0)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        found = frozen(sharded(folder(copied), world))
        local = {name.replace(transformer.BASE_LAYER, ""): value.to_local() for name, value in found.items()}
    finally:
        dist.destroy_process_group()
    assert local.keys() == wanted.keys()
    for name, value in wanted.items():
        parts = value.chunk(world)
        assert torch.equal(local[name], parts[rank] if rank < len(parts) else value[:0]), name
    assert Counting.read == sum(value.nbytes for value in local.values())


@pytest.mark.slow
def test_two_processes_over_gloo(copied: Path, tmp_path: Path) -> None:
    """Two real processes: each reads half of the bytes, the gathered weights are the files', the adapter stands whole
    in both with the same first weights."""
    wanted = load_file(copied / FILE)
    in_shards(copied)
    in_ranks(2, sharded_process.run, str(copied), str(tmp_path), folder=tmp_path)
    total = sum(value.nbytes for value in wanted.values())
    counts = [json.loads((tmp_path / f"bytes-{rank}").read_text()) for rank in range(2)]
    assert sum(read for read, _ in counts) == total
    assert all(read == local and read <= 0.51 * total for read, local in counts)
    for rank in range(2):
        whole = load_file(tmp_path / f"whole-{rank}")
        assert whole.keys() == wanted.keys()
        assert all(torch.equal(whole[name], wanted[name]) for name in wanted)
    adapters = [load_file(tmp_path / f"adapter-{rank}") for rank in range(2)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
