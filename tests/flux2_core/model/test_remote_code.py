"""A model's folder brings weights and settings; code that it brings is never run."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from flux2_core.config.sections import Model
from flux2_core.errors import SetupError
from flux2_core.model.folder import resolve
from flux2_core.model.text_encoder import PromptTokenizer, load_language_model

PARTS = ("text_encoder", "tokenizer")
CODE = "from pathlib import Path\nPath({ran!r}).touch()\nfrom transformers import PretrainedConfig as Evil\n"


def refuse_to_answer(_: str) -> str:
    pytest.fail("asked at the terminal whether to run the model's code")


@pytest.mark.parametrize("named", ["evil.Evil", "someone/else--evil.Evil"])
def test_code_of_a_model_is_never_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """Tokenizer and encoder whose files name code of their own, beside them or elsewhere: it is not run, and
    nobody is asked for a yes."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_model, folder)
    for file, kind in (
        ("tokenizer/tokenizer_config.json", "AutoTokenizer"),
        ("text_encoder/config.json", "AutoConfig"),
    ):
        told = json.loads((folder / file).read_text())
        entry = [named, None] if kind == "AutoTokenizer" else named
        told |= {"auto_map": {kind: entry, "AutoModel": named}, "tokenizer_class": "Evil"}
        (folder / file).write_text(json.dumps(told))
        (folder / file).with_name("evil.py").write_text(CODE.format(ran=str(ran)))
    monkeypatch.setattr("builtins.input", refuse_to_answer)
    model = resolve(Model(path=str(folder)), parts=PARTS)
    with suppress(SetupError):
        PromptTokenizer(model, max_length=96)
    load_language_model(model, dtype=torch.float32, device=torch.device("cpu"))
    assert not ran.exists()
