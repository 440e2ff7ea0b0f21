"""The real tokenizers of FLUX.2's families, built from the vocabularies that two packages of PyPI carry.

`make install` puts them beside the environment, not into it: mistral-common there would change what transformers does.
A folder holds what the models' repositories hold: tokenizer.json with the split pattern that it has there (Llama 3's,
which is not Mistral's own), tokenizer_config.json and the chat template.
"""

import base64
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from flux2_core.embedded.tiny_model import CONTROL_TOKENS, KLEIN_TEMPLATE, KLEIN_TOKENS

PACKAGES = Path(sys.prefix) / "vocabularies"
TEKKEN = PACKAGES / "mistral_common" / "data" / "tekken_240911.json"
QWEN = PACKAGES / "dashscope" / "resources" / "qwen.tiktoken"
MISTRAL_SIZE, MISTRAL_CONTROLS = 131_072, 1000
LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PLAIN = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
OTHERS = [byte for byte in range(256) if byte not in PLAIN]
LETTERS = {byte: chr(256 + place) for place, byte in enumerate(OTHERS)}  # GPT-2's letters for bytes that print badly
QWEN_PATTERN = LLAMA_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")


def mistral(folder: Path, template: str) -> Path:
    """`tokenizer/` of FLUX.2-dev."""
    words = json.loads(TEKKEN.read_text())["vocab"][: MISTRAL_SIZE - MISTRAL_CONTROLS]
    fillers = (f"<SPECIAL_{number}>" for number in range(len(CONTROL_TOKENS), MISTRAL_CONTROLS))
    controls = [*CONTROL_TOKENS, *fillers]
    ids, merges = _bpe((base64.b64decode(word["token_bytes"]) for word in words), first=len(controls))
    ids |= {control: number for number, control in enumerate(controls)}
    tokenizer = _tokenizer(ids, merges, LLAMA_PATTERN, controls)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    extra = [control for control in controls if control not in named.values()]
    return _saved(folder, tokenizer, template, {**named, "extra_special_tokens": extra, "padding_side": "left"})


def qwen(folder: Path) -> Path:
    """`tokenizer/` of FLUX.2-klein."""
    words = [base64.b64decode(line.split()[0]) for line in QWEN.read_bytes().splitlines()]
    ids, merges = _bpe(words, first=0)
    tokenizer = _tokenizer(ids, merges, QWEN_PATTERN, KLEIN_TOKENS)
    tokenizer.normalizer = normalizers.NFC()
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "padding_side": "right"}
    return _saved(folder, tokenizer, KLEIN_TEMPLATE, named)


def _bpe(words: Iterable[bytes], *, first: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids and merges of a vocabulary that is ranked by its merges."""
    ranks = {word.decode("latin-1").translate(LETTERS): rank for rank, word in enumerate(words)}
    pieces = [
        (rank, ranks[word[:cut]], ranks[word[cut:]], word, cut)
        for word, rank in ranks.items()
        for cut in range(1, len(word))
        if word[:cut] in ranks and word[cut:] in ranks
    ]
    merges = [(word[:cut], word[cut:]) for _, _, _, word, cut in sorted(pieces)]
    return {word: rank + first for word, rank in ranks.items()}, merges


def _tokenizer(ids: dict[str, int], merges: list[tuple[str, str]], pattern: str, controls: Iterable[str]) -> Any:
    tokenizer = Tokenizer(models.BPE(ids, merges, fuse_unk=False, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(control, special=True, normalized=False) for control in controls])
    return tokenizer


def _saved(folder: Path, tokenizer: Any, template: str, named: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend", **named}))
    return folder
