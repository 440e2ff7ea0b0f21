"""Tokens are pinned: the real vocabularies of both families, against transformers and Mistral's own library."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from flux2_core.config.sections import Config, Model
from flux2_core.embedded.tiny_model import build_klein_model
from flux2_core.errors import SetupError, UsageError
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.model.tokenizer import GOLDEN_TEXTS, PromptTokenizer
from flux2_core.plan import describe, survey
from tests import real_tokenizers

pytestmark = pytest.mark.slow  # a vocabulary takes seconds to build
ROOT = Path(__file__).parents[3]
PLAIN = [text for text in GOLDEN_TEXTS if "<" not in text and "[" not in text]  # others hold control strings
CAMEL = ("eBay", "mL", "iPhone", "ПриветМир")
MARKED = ("नमस्ते", "বাংলা", "မြန်မာ", "العَرَبِيَّة")  # letters with combining marks
LONG = "zebra crossing at dusk, " * 120
MISTRAL = """
import json, sys
from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
asked = json.load(sys.stdin)
tokenizer = Tekkenizer.from_file(asked["file"])
template = generate_chat_template(
    spm=False, tokenizer_version=TokenizerVersion.v7, image_support=True, audio_support=False, thinking_support=False,
    default_system_prompt=None, plain_thinking_support=False, use_special_token_variables=True,
    model_settings_fields=None, reasoning_effort_values=None, reasoning_effort_default=None,
)
print(json.dumps({"template": template, "ids": [tokenizer.encode(text, False, False) for text in asked["texts"]]}))
"""
OURS = """
import sys
from flux2_core.config.sections import Model
from flux2_core.model.folder import resolve
from flux2_core.model.tokenizer import PromptTokenizer
for path in sys.argv[1:]:
    print(PromptTokenizer(resolve(Model(path=path), parts=("tokenizer",)), max_length=512).golden())
"""
THEIRS = """
import sys
from transformers import AutoTokenizer
for path in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(path + "/tokenizer")
    print(type(tokenizer).__name__, tokenizer("नमस्ते", add_special_tokens=False)["input_ids"])
"""


def said_by(code: str, *arguments: str, given: str = "", near: bool = False, offline: bool = False) -> str:
    """What a process of its own prints, with mistral-common installed or not, offline or not."""
    paths = [str(ROOT), *([str(real_tokenizers.PACKAGES)] if near else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": str(int(offline))}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, input=given, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def mistral_says() -> dict[str, Any]:
    """Mistral's own library: the chat template of Mistral Small 3.2's version, and ids of texts without a template."""
    asked = {"file": str(real_tokenizers.TEKKEN), "texts": [*GOLDEN_TEXTS, *CAMEL, *MARKED]}
    return dict(json.loads(said_by(MISTRAL, given=json.dumps(asked), near=True)))


@pytest.fixture(scope="module")
def dev(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, mistral_says: dict[str, Any]) -> ModelFolder:
    """FLUX.2-dev's structure with its real tokenizer."""
    folder = tmp_path_factory.mktemp("real") / "dev"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("tokenizer"))
    real_tokenizers.mistral(folder / "tokenizer", mistral_says["template"])
    return resolve(Model(path=str(folder)), parts=("tokenizer",))


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """FLUX.2-klein's structure with its real tokenizer."""
    folder = build_klein_model(tmp_path_factory.mktemp("real") / "klein")
    shutil.rmtree(folder / "tokenizer")
    real_tokenizers.qwen(folder / "tokenizer")
    return resolve(Model(path=str(folder)), parts=("tokenizer",))


@pytest.fixture(scope="module")
def ours(dev: ModelFolder) -> PromptTokenizer:
    return PromptTokenizer(dev, max_length=512)


def reference(model: ModelFolder, texts: list[str], **how: Any) -> list[list[int]]:
    """The tokens that diffusers' pipelines hand to the encoder: 512, pads included."""
    theirs = AutoTokenizer.from_pretrained(model.path / "tokenizer", **how)
    chats = [model.family.messages(text) for text in texts]
    rendered = [theirs.apply_chat_template(chat, tokenize=False, **model.family.chat) for chat in chats]
    cut = {"padding": "max_length", "truncation": True, "max_length": 512, "add_special_tokens": False}
    return list(theirs(rendered, **cut)["input_ids"])


def padded(tokenizer: PromptTokenizer, texts: list[str]) -> list[list[int]]:
    left = tokenizer.family.padding_side == "left"
    kept = [(own, [tokenizer.pad_id] * (512 - len(own))) for own in tokenizer.kept(texts)]
    return [[*pads, *own] if left else [*own, *pads] for own, pads in kept]


@pytest.mark.parametrize("family", ["dev", "klein"])
def test_tokens_are_the_references(request: pytest.FixtureRequest, family: str) -> None:
    """With the real vocabularies our tokens are those of transformers' unpatched tokenizer in its chat template, id
    for id: in many scripts, at 512 after truncation, and with the pads where FLUX.2 has them.
    """
    model = request.getfixturevalue(family)
    texts = [*PLAIN, *CAMEL, *MARKED, LONG]
    tokenizer = PromptTokenizer(model, max_length=512)
    assert padded(tokenizer, texts) == reference(model, texts)
    assert tokenizer.counts([LONG])[0] > 512
    assert tokenizer.pad_id == {"dev": 11, "klein": 151_643}[family]


def test_the_other_pattern_is_mistrals(dev: ModelFolder, ours: PromptTokenizer, mistral_says: dict[str, Any]) -> None:
    """`text.tokens = "mistral-common"` gives the ids of Mistral's own library, for control strings too. With the real
    vocabulary the reference differs from it where letters carry marks, and not in camel case: both patterns cut
    "eBay" otherwise, and no token of the vocabulary joins "e" and "B".
    """
    other = PromptTokenizer(dev, max_length=512, tokens="mistral-common")
    texts = [*GOLDEN_TEXTS, *CAMEL, *MARKED]
    bodies = [ids[len(other.prefix) : -len(other.suffix)] for ids in other.ids(texts)]
    assert bodies == mistral_says["ids"]
    differing = [text for text, a, b in zip(texts, ours.ids(texts), other.ids(texts), strict=True) if a != b]
    assert set(MARKED) <= set(differing)
    assert not {"a red square", *CAMEL} & set(differing)
    assert ours.golden() != other.golden()


def test_the_other_pattern_is_what_transformers_puts_there(dev: ModelFolder, tmp_path: Path) -> None:
    """The same as `fix_mistral_regex=True` makes of the file, which transformers does beside a config.json only."""
    shutil.copytree(dev.path / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "mistral3", "transformers_version": "4.57.0"}')
    texts = [*PLAIN, *CAMEL, *MARKED]
    swapped = reference(ModelFolder(tmp_path, dev.family), texts, fix_mistral_regex=True)
    assert padded(PromptTokenizer(dev, max_length=512, tokens="mistral-common"), texts) == swapped


@pytest.fixture(scope="module")
def near(dev: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer with everything beside it that makes transformers decide otherwise."""
    folder = Path(shutil.copytree(dev.path, tmp_path_factory.mktemp("near") / "dev"))
    place = folder / "tokenizer"
    (place / "config.json").write_text('{"model_type": "mistral3", "transformers_version": "4.57.0"}')
    shutil.copy(real_tokenizers.TEKKEN, place / "tekken.json")
    said = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(json.dumps({**said, "fix_mistral_regex": True}))
    return folder


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("installed", [True, False])
def test_nothing_near_changes_a_token(
    dev: ModelFolder, ours: PromptTokenizer, near: Path, installed: bool, offline: bool
) -> None:
    """mistral-common installed or not, offline or on, a config.json and Mistral's own file there or not: same ids."""
    said = said_by(OURS, str(dev.path), str(near), near=installed, offline=offline)
    assert set(said.split()) == {ours.golden()}


def test_the_surroundings_have_teeth(dev: ModelFolder, near: Path) -> None:
    """In these surroundings transformers' `AutoTokenizer` does give other tokens than the reference pipeline's."""
    here, there = (said_by(THEIRS, str(near), near=installed, offline=True).strip() for installed in (False, True))
    plain = AutoTokenizer.from_pretrained(dev.path / "tokenizer")(MARKED[0], add_special_tokens=False)["input_ids"]
    assert str(plain) not in here
    assert str(plain) not in there


@pytest.mark.parametrize(("family", "text"), [("dev", "x [INST] </s> [/INST] [IMG]"), ("klein", "x <|im_end|> y")])
def test_control_strings_are_text(request: pytest.FixtureRequest, family: str, text: str) -> None:
    """`[INST]`, `</s>`, `<|im_end|>` in a caption become words; the prompt has the control tokens of its frame alone,
    and `[IMG]` is dropped as in the reference.
    """
    tokenizer = PromptTokenizer(request.getfixturevalue(family), max_length=512)
    added = tokenizer.tokenizer.get_added_tokens_decoder()
    plain, nasty = tokenizer.ids(["x", text])
    assert [one for one in nasty if one in added] == [one for one in plain if one in added]
    body = nasty[len(tokenizer.prefix) : -len(tokenizer.suffix)]
    assert tokenizer.tokenizer.decode(body, skip_special_tokens=False) == text.replace("[IMG]", "")


@pytest.mark.parametrize("tokens", ["reference", "mistral-common"])
def test_plan_counts_real_tokens(
    make_config: Callable[..., Config], dev: ModelFolder, photos: Path, tmp_path: Path, tokens: str
) -> None:
    """A caption of 163 tokens is one of 163 in `plan`, and one of more than 512 is named as cut."""
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    tokenizer = PromptTokenizer(dev, max_length=512, tokens=tokens)
    text = "नमस्ते, an eBay listing"
    while tokenizer.counts([text])[0] < 163:
        text += " of"
    (folder / "p0.txt").write_text(text)
    config = make_config(
        model={"path": str(dev.path)},
        data=[{"path": str(folder), "resolutions": [64]}],
        text={"max_length": 512, "tokens": tokens},
    )
    planned = describe.describe(config, dev, survey.survey(config, dev))
    assert planned["tokens"]["longest"] == 163
    assert not planned["tokens"]["truncated"]
    if tokens == "reference":
        assert sum(one != tokenizer.pad_id for one in reference(dev, [text])[0]) == 163
    (folder / "p1.txt").write_text(LONG)
    cut = describe.describe(config, dev, survey.survey(config, dev))["tokens"]["truncated"]
    assert cut == [{"id": "p1", "tokens": tokenizer.counts([LONG.strip()])[0]}]


def test_klein_has_one_pattern(klein: ModelFolder) -> None:
    """Mistral's pattern is refused for Qwen's tokenizer."""
    with pytest.raises(UsageError, match=r'text\.tokens="mistral-common": .* family "klein" knows reference'):
        PromptTokenizer(klein, max_length=512, tokens="mistral-common")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", None, r"tokenizer\.json on .*: cannot be loaded"),
        ("tokenizer.json", '{"version"', r"tokenizer\.json on .*: cannot be loaded"),
        ("tokenizer_config.json", '{"pad_token": "<nothing>"}', "pad_token is '<nothing>', which tokenizer.json does"),
        ("tokenizer_config.json", "{}", "pad_token is None"),
        ("chat_template.jinja", None, r"chat_template\.jinja: missing"),
        ("chat_template.jinja", "{% if %}", r"chat_template\.jinja: not a chat template"),
        ("chat_template.jinja", "{{ raise_exception('no') }}", "refuses a prompt of its family: no"),
    ],
)
def test_damaged_folders_are_named(
    tiny_model: Path, tmp_path: Path, file: str, content: str | None, words: str
) -> None:
    """A missing or torn file of the tokenizer is one clear error with its path."""
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    place = copy / "tokenizer" / file
    place.unlink() if content is None else place.write_text(content)
    with pytest.raises(SetupError, match=words):
        PromptTokenizer(resolve(Model(path=str(copy)), parts=("tokenizer",)), max_length=512)


def test_a_template_may_stand_in_the_configuration(tiny_model: Path, tmp_path: Path) -> None:
    """Older folders have the template in tokenizer_config.json: the tokens are the same."""
    copy = Path(shutil.copytree(tiny_model, tmp_path / "copy")) / "tokenizer"
    said = json.loads((copy / "tokenizer_config.json").read_text())
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    tokens = [{"content": token} if isinstance(token, str) else token for token in (said["bos_token"],)]
    (copy / "tokenizer_config.json").write_text(json.dumps({**said, "chat_template": template, "bos_token": tokens[0]}))
    models = [resolve(Model(path=str(path)), parts=("tokenizer",)) for path in (tiny_model, copy.parent)]
    before, after = (PromptTokenizer(model, max_length=512).golden() for model in models)
    assert before == after
