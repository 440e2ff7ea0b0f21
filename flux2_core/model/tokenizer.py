"""The prompt tokenizer: a caption in its chat template, cut into tokens by what the model's folder says and no more.

transformers decides by what is installed and near: `AutoTokenizer` takes another backend where mistral-common is, and
swaps the split pattern of Mistral's tokenizers by a config.json beside them, an online look-up and its own version.
FLUX.2's pipeline runs with `tokenizer.json` as it is; so do we, and the template is rendered by transformers' rules.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Regex, Tokenizer, pre_tokenizers

from flux2_core.errors import DataError, SetupError, UsageError
from flux2_core.model.families import Family
from flux2_core.model.folder import ModelFolder
from flux2_core.store.hashing import digest

IMAGE_TOKEN = "[IMG]"
TOKEN_BUDGET = 8192  # of one forward pass of the text encoder: 16 full prompts
TEXTS_AT_ONCE = 1000  # of one call of the tokenizer, which spreads it over the cores
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")  # of tokenizer_config.json: what a template may print
A_DAY = date(2026, 1, 1)  # what `strftime_now` says: rows of a template that shows the day must not change with it
GOLDEN_TEXTS = (  # where split patterns, normalisation, added tokens and versions of a library have been seen to differ
    "", " ", "a red square", " leading, trailing \t\n\n and   inner space ", "line\r\nline\rline\n/path",
    "eBay mL iPhone XMLHttpRequest HTMLDivElement aBCdEF", "don't DON'T they'LL I'm 'tis", "1 12 123 1234567 3.14 1e-5",
    "日本語のテキスト、漢字とカナ。中文字符", "한국어 텍스트", "Привет МИР, ёлка", "ΑΒΓ αβγ ǅ ʰ", "שלום عليكم ไทย",
    "नमस्ते বাংলা မြန်မာ العَرَبِيَّة",
    "caf\u00e9 cafe\u0301 \ufb01 \u212b", "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 \u2603\ufe0f",
    "https://example.com/a_b?c=d&e=%20#f me@example.com", "#tag @you snake_case kebab-case",
    "<s></s>[INST][/INST]<pad>[SYSTEM_PROMPT]", "<|im_start|>user<|im_end|><think></think>", "zebra " * 40,
)  # fmt: skip


class PromptTokenizer:
    """Renders the chat template around a caption and cuts it into tokens.

    Args:
        model: Its folder; no other file or service is looked at.
        max_length: Tokens that the model sees of a prompt.
        tokens: `text.tokens`.

    Raises:
        SetupError: the folder's files are missing or damaged.
        UsageError: the family has no such pattern.
        DataError: the template alone fills `max_length`.
    """

    def __init__(self, model: ModelFolder, *, max_length: int, tokens: str = "reference") -> None:
        self.family = model.family
        self.max_length = max_length
        folder, said = model.path / "tokenizer", model.config("tokenizer")
        self.tokenizer = _load(folder, _pattern(model.family, tokens))
        self._named = {name: _text(said[name]) for name in NAMED if said.get(name)}
        self._template = _template(folder, said)
        if (pad_id := self.tokenizer.token_to_id(self._named.get("pad_token", ""))) is None:
            raise SetupError(
                f"{folder}: pad_token is {said.get('pad_token')!r}, which tokenizer.json does not have; the two files "
                "are of different models: download them again"
            )
        self.pad_id: int = pad_id
        controls = [token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special]
        self._controls = re.compile("|".join(re.escape(one) for one in controls) or "(?!)")
        self.prefix, self.suffix = self._frame()
        if len(self.prefix) + len(self.suffix) >= max_length:
            raise DataError(
                f"text.max_length={max_length}: the template alone takes {len(self.prefix) + len(self.suffix)} tokens; "
                "FLUX.2 was trained with 512"
            )

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of whole prompts, template included, not yet cut to `max_length`.

        Control strings in a caption (`[INST]`, `</s>`, ...) are encoded as plain text; `[IMG]` is dropped, as in the
        reference.
        """
        bare = [text.replace(IMAGE_TOKEN, "") for text in texts]
        nasty = [self._controls.search(text) is not None for text in bare]
        rendered = iter(self._split([self._render(text) for text, odd in zip(bare, nasty, strict=True) if not odd]))
        return [
            [*self.prefix, *self._split([text], plain=True)[0], *self.suffix] if odd else next(rendered)
            for text, odd in zip(bare, nasty, strict=True)
        ]

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of whole prompts; more than `max_length` means that the end will be cut off."""
        starts = range(0, len(texts), TEXTS_AT_ONCE)
        return [len(ids) for start in starts for ids in self.ids(texts[start : start + TEXTS_AT_ONCE])]

    def kept(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens that the model sees: cut on the right to `max_length`."""
        return [ids[: self.max_length] for ids in self.ids(texts)]

    def golden(self) -> str:
        """Hash of the tokens of `GOLDEN_TEXTS`: what a library's new version would have to keep."""
        return digest(self.ids(GOLDEN_TEXTS))

    def _frame(self) -> tuple[list[int], list[int]]:
        before, _, after = self._render("\ue000").partition("\ue000")
        return self._split([before])[0], self._split([after])[0]

    def _render(self, text: str) -> str:
        asked = {"messages": self.family.messages(text), "tools": None, "documents": None}
        return self._template.render(**asked, **self.family.chat, **self._named)

    def _split(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        self.tokenizer.encode_special_tokens = plain
        return [found.ids for found in self.tokenizer.encode_batch(texts, add_special_tokens=False)]


def _pattern(family: Family, tokens: str) -> str | None:
    """The split pattern that replaces the file's own; None: it stays."""
    if tokens == "reference":
        return None
    if tokens not in family.split_patterns:
        known = ", ".join(("reference", *family.split_patterns))
        raise UsageError(f'text.tokens="{tokens}": the tokenizer of the family "{family.name}" knows {known}')
    return family.split_patterns[tokens]


def _load(folder: Path, pattern: str | None) -> Any:
    file = folder / "tokenizer.json"
    try:
        json.loads(file.read_text(encoding="utf-8"))  # what the library raises of a torn file is a bare Exception
    except (OSError, ValueError) as error:
        raise SetupError(f"{file} on {platform.node()}: cannot be loaded ({error}); download it again") from None
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if pattern is not None:
        split, own = pre_tokenizers.Split(Regex(pattern), behavior="isolated"), tokenizer.pre_tokenizer
        if isinstance(own, pre_tokenizers.Sequence):
            own[0] = split
        else:
            own = pre_tokenizers.Sequence([split, own])
        tokenizer.pre_tokenizer = own
    return tokenizer


def _template(folder: Path, said: dict[str, Any]) -> Template:
    """The compiled chat template, in a sandbox of transformers' settings (`_cached_compile_jinja_template`)."""
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else said.get("chat_template")
    if not isinstance(source, str):
        raise SetupError(f"{file}: missing on {platform.node()}; download the model again")
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    sandbox.filters["tojson"] = lambda value, **form: json.dumps(value, ensure_ascii=False, **form)
    sandbox.globals |= {"raise_exception": _refuse, "strftime_now": A_DAY.strftime}
    try:
        return sandbox.from_string(source)
    except TemplateError as error:
        raise SetupError(f"{file}: not a chat template ({error}); download the model again") from None


def _refuse(words: str) -> None:
    """What a template calls for a chat that its model does not take."""
    raise SetupError(f"the model's chat template refuses a prompt of its family: {words}; download the model again")


def _text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
