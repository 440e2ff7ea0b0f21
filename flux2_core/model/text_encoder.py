"""The text encoder: prompts to rows, with the language model's first layers only (the one home of transformers).

Legend: B prompts, N tokens of the longest of them, L = max_length, H hidden width, D = taps * H.

Of Mistral Small's 40 layers FLUX.2 uses the states after 10, 20 and 30: we load 30 layers, without vision tower and
head, and put an identity where the final norm was, because transformers would norm the last state that it returns.
Reference: diffusers `Flux2Pipeline._get_mistral_3_small_prompt_embeds`, `Flux2KleinPipeline._get_qwen3_prompt_embeds`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModel

from flux2_core import accelerator
from flux2_core.config.sections import Text
from flux2_core.errors import DataError, SetupError
from flux2_core.model.families import Family
from flux2_core.model.folder import PROJECTION, ModelFolder
from flux2_core.model.seeded import fixed
from flux2_core.model.tensor_bytes import DTYPES
from flux2_core.model.tokenizer import TOKEN_BUDGET, PromptTokenizer

ALIKE = 0.8  # shortest length of a batch over its longest
MIN_PROJECTED_ROWS = 8  # below it CPU matmuls take another kernel and the bits differ
MASKED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # a fully masked row (a pad's) is finite with both
LOG = logging.getLogger(__name__)


class TextEncoder:
    """The language model on one device, and the layout of what is kept of its states.

    With `streamed` its layers are left in the host's memory, for `placement.stream` to bring.
    """

    def __init__(self, model: ModelFolder, text: Text, *, device: str = "cpu", streamed: bool = False) -> None:
        self.text = text
        self.device = torch.device(device)
        self.tokenizer = PromptTokenizer(model, max_length=text.max_length, tokens=text.tokens)
        self.taps = model.family.taps
        dtype = DTYPES[text.dtype]
        self.language_model = load_language_model(
            model, dtype=dtype, device=self.device, quantize=text.quantize, streamed=streamed
        )
        projected = text.stored == "projected"
        self.projection_ID = load_projection(model, dtype=dtype, device=self.device) if projected else None
        self.ragged = model.family.ragged and text.pads != "stored"
        self.attention = " or ".join(backend.name.lower() for backend in attention(self.device))
        LOG.info("torch %s, %s: attention of the text encoder: %s", torch.__version__, device, self.attention)

    def pad_row(self) -> torch.Tensor | None:
        """The pad row (1, D) of a ragged table, after the self-test that all pad rows are that one vector.

        Raises:
            DataError: pad rows depend on the caption here, so that a ragged table would be wrong.
        """
        if not self.ragged:
            return None
        probes = self.tokenizer.kept(["", "a red square", "Ein Haus am See, " * 3])
        padded_BLD = self._padded(probes)
        pad_1D = padded_BLD[0, :1]
        for ids, rows_LD in zip(probes, padded_BLD, strict=True):
            pads = self.text.max_length - len(ids)
            if not torch.equal(rows_LD[:pads], pad_1D.expand(pads, -1)):
                raise DataError(
                    f"the encoder's pad rows differ between captions ({self.device}, torch {torch.__version__}, "
                    f'{self.attention}); set text.pads = "stored" to keep every row'
                )
        return self._project(pad_1D)

    def encode(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Encode prompts to the rows that are stored, each (n, D) when ragged and (L, D) when not."""
        ids = self.tokenizer.kept(texts)
        if not self.ragged:
            rows = list(self._padded(ids))
        elif self.text.pads == "computed":
            rows = [full[-len(own) :] for full, own in zip(self._padded(ids), ids, strict=True)]
        else:
            rows = self._trimmed(ids)
        sizes = [own.shape[0] for own in rows]
        return list(self._project(torch.cat(rows)).split(sizes))

    def _padded(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """All L rows of each prompt, pads computed: (B, L, D)."""
        return self._states(ids, length=self.text.max_length)

    def _trimmed(self, ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Real rows only, at the positions that they have behind left padding: B tensors (n, D)."""
        states_BND = self._states(ids, length=max(len(own) for own in ids))
        return [states[-len(own) :] for states, own in zip(states_BND, ids, strict=True)]

    def _states(self, ids: Sequence[Sequence[int]], *, length: int) -> torch.Tensor:
        """States of the last `length` positions of L, padded to them."""
        ids_BN = torch.full((len(ids), length), self.tokenizer.pad_id)
        mask_BN = torch.zeros_like(ids_BN)
        left = self.tokenizer.family.padding_side == "left"
        for row_N, seen_N, own in zip(ids_BN, mask_BN, ids, strict=True):
            place = slice(length - len(own), length) if left else slice(len(own))
            row_N[place], seen_N[place] = torch.tensor(own), 1
        offset = self.text.max_length - length
        return tapped(self.language_model, self.taps, ids_BN, mask_BN, offset=offset)

    def _project(self, rows_ND: torch.Tensor) -> torch.Tensor:
        if self.projection_ID is None:
            return rows_ND
        count = rows_ND.shape[0]
        if count < MIN_PROJECTED_ROWS:
            rows_ND = torch.cat([rows_ND, rows_ND.new_zeros(MIN_PROJECTED_ROWS - count, rows_ND.shape[1])])
        return torch.nn.functional.linear(rows_ND, self.projection_ID)[:count]


def attention(device: torch.device) -> list[SDPBackend]:
    """The backends that the encoder's attention may use on a device, whatever torch's version prefers.

    torch 2.11 gives masked attention on Hopper to cuDNN, which leaves a fully masked row undefined. Flash attention
    takes no mask on a GPU, so that captions without pads would be computed otherwise than those beside them; a CPU's
    own takes one, and every cache made there was made with it.
    """
    return MASKED if accelerator.is_gpu(device) else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


@torch.inference_mode()
def tapped(
    language_model: Any, taps: Sequence[int], ids_BN: torch.Tensor, mask_BN: torch.Tensor, *, offset: int
) -> torch.Tensor:
    """States after the tapped layers, side by side (B, N, D), of tokens at positions `offset`, `offset` + 1, ...

    Hooks take them: transformers would hold the states of all layers, gigabytes of them.
    """
    states: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    device = language_model.device
    hooks = [language_model.layers[tap - 1].register_forward_hook(keep) for tap in taps]
    try:
        with sdpa_kernel(attention(device)):
            language_model(
                input_ids=ids_BN.to(device),
                attention_mask=mask_BN.to(device),
                position_ids=torch.arange(offset, offset + ids_BN.shape[1], device=device).unsqueeze(0),
                use_cache=False,
            )
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(states, dim=-1)


def golden_rows(family: Family, kind: str, *, quantize: str) -> list[float]:
    """Some values of the rows that a small language model of fixed weights makes of fixed tokens, in fp32 on the CPU.

    A version of torch, transformers or optimum-quanto that keeps them computes as before.

    Args:
        family: Whose layers are taken.
        kind: The language model's `model_type`, as its config.json says.
        quantize: `text.quantize`.
    """
    config = AutoConfig.for_model(
        kind, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_hidden_layers=max(family.taps), vocab_size=64,
    )  # fmt: skip
    language_model = _without_weights(config, torch.float32)
    for number, (name, parameter) in enumerate(list(language_model.named_parameters())):
        _place(language_model, name, fixed(name, parameter.shape, number), quantize=quantize, home=accelerator.CPU)
    ids_BN, mask_BN = torch.arange(24).view(2, 12) * 37 % 64, torch.ones(2, 12, dtype=torch.long)
    mask_BN[1, :5] = 0
    rows_BND = tapped(_finished(language_model, config, torch.device("cpu")), family.taps, ids_BN, mask_BN, offset=7)
    return [round(value, 6) for value in rows_BND[:, 5:].flatten()[::29].tolist()]


def load_language_model(
    model: ModelFolder, *, dtype: torch.dtype, device: torch.device, quantize: str = "none", streamed: bool = False
) -> Any:
    """Build the first max(taps) layers on the meta device and read only their tensors from the files.

    Each Linear is quantised as it arrives, so that the device never holds more than one of them in full; with
    `streamed` it goes on to the host, where exact ones stay files' pages until they are copied.

    Raises:
        SetupError: the files lack a tensor, or the model has fewer layers than the family's taps.
    """
    config = AutoConfig.from_pretrained(model.path / "text_encoder", trust_remote_code=False).get_text_config()
    layers = max(model.family.taps)
    if config.num_hidden_layers < layers:
        raise SetupError(f"{model.path}/text_encoder has {config.num_hidden_layers} layers; {layers} are needed")
    config.num_hidden_layers = layers
    if (types := config.to_dict().get("layer_types")) is not None:
        config.layer_types = types[:layers]
    language_model = _without_weights(config, dtype)
    wanted = {name for name, _ in language_model.named_parameters()}
    for name, tensor in _tensors(model, "text_encoder", wanted, prefixes=model.family.weight_prefixes):
        home = accelerator.CPU if streamed and name.startswith("layers.") else device
        value = tensor.to(device=home if quantize == "none" else device, dtype=dtype)
        _place(language_model, name, value, quantize=quantize, home=home)
        wanted.discard(name)
    if wanted:
        raise SetupError(f"{model.path}/text_encoder lacks {len(wanted)} tensors, for instance {min(wanted)}")
    return _finished(language_model, config, device)


def _without_weights(config: Any, dtype: torch.dtype) -> Any:
    """The language model on the meta device, its final norm left out."""
    with torch.device("meta"):
        language_model = AutoModel.from_config(config, attn_implementation="sdpa", dtype=dtype, trust_remote_code=False)
    language_model.norm = torch.nn.Identity()
    return language_model


def _finished(language_model: Any, config: Any, device: torch.device) -> Any:
    """The language model once its weights are placed: what it computes from its configuration is computed."""
    language_model.rotary_emb = type(language_model.rotary_emb)(config=config).to(device)
    return language_model.eval()


def _place(language_model: Any, name: str, value: torch.Tensor, *, quantize: str, home: torch.device) -> None:
    owner, _, leaf = name.rpartition(".")
    module = language_model.get_submodule(owner)
    if quantize == "none" or leaf != "weight" or not isinstance(module, torch.nn.Linear):
        setattr(module, leaf, torch.nn.Parameter(value.to(home), requires_grad=False))
        return
    from flux2_core.model.quanto import QuantizedLinear  # quanto takes seconds to import

    parent, _, child = owner.rpartition(".")
    setattr(language_model.get_submodule(parent), child, QuantizedLinear(value, module.bias, kind=quantize).to(home))


def load_projection(model: ModelFolder, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The transformer's frozen `context_embedder` weight (inner, D)."""
    for _, tensor in _tensors(model, "transformer", {PROJECTION}):
        return tensor.to(device=device, dtype=dtype)
    raise SetupError(f"{model.path}/transformer has no {PROJECTION}")


def _tensors(
    model: ModelFolder, part: str, wanted: set[str], *, prefixes: Sequence[str] = ("",)
) -> Iterator[tuple[str, torch.Tensor]]:
    open_names = set(wanted)
    for file, entries in groupby(model.tensor_files(part).items(), key=itemgetter(1)):
        with safe_open(file, framework="pt") as tensors:
            for key, _ in entries:
                name = next(
                    (key[len(p) :] for p in prefixes if key.startswith(p) and key[len(p) :] in open_names), None
                )
                if name is not None:
                    open_names.discard(name)
                    yield name, tensors.get_tensor(key)


def passes(texts: Sequence[str], tokenizer: PromptTokenizer, text: Text) -> Iterator[list[str]]:
    """Texts by forward pass: of like length, within the token budget, longest first."""
    skipped = tokenizer.family.ragged and text.pads == "skipped"
    counts = tokenizer.counts(texts) if skipped else [text.max_length] * len(texts)
    for group in batches([min(count, text.max_length) for count in counts], budget=TOKEN_BUDGET):
        yield [texts[place] for place in group]


def batches(lengths: Sequence[int], *, budget: int) -> list[list[int]]:
    """Group indices of like length, longest first.

    A group ends where longest * count would leave the token budget, and where a length falls under `ALIKE` of the
    group's longest: in small sets of captions pads would else be half of the work.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and (len(groups[-1]) + 1) * longest <= budget and lengths[index] >= ALIKE * longest:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
