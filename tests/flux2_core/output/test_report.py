"""The report page and the model card."""

from __future__ import annotations

import ast
import base64
import re
from html.parser import HTMLParser

import pytest
import torch
import yaml

from flux2_core.config.reading import parse
from flux2_core.lora import file
from flux2_core.model import families
from flux2_core.output import report
from tests.hostile import HOSTILE, rendered, unseen

NASTY = '"><script>alert(1)</script><img src=https://example.org/x.png>'


class Page(HTMLParser):
    """Collects the tags and addresses of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        self.text += data


def config(path="black-forest-labs/FLUX.2-dev", **more):
    data = [{"path": "pictures", "trigger": "zwx"}]
    return parse({"run": "teapot", "model": {"path": path}, "data": data} | more)


def paths(folder):
    adapter = {
        "transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1, 2),
        "transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(2, 1),
    }
    return file.write(folder / "lora", "teapot", adapter, metadata={})


def page(folder, **given):
    arguments = {
        "config": config(),
        "metrics": [{"step": n, "loss": 1 / n, "learning_rate": 1e-4, "grad_norm": 0.3} for n in range(1, 30)],
        "validation": [{"step": 0, "loss": 0.5, "sigma 1": 0.6}, {"step": 29, "loss": 0.4, "sigma 1": 0.5}],
        "grid_png": b"\x89PNG pixels",
        "facts": {"Pictures": "28"},
        "quarantine": [],
        "lora_paths": None,
    }
    report.write_html(folder / "report.html", **arguments | given)
    text = (folder / "report.html").read_text()
    found = Page()
    found.feed(text)
    return text, found


DEV = families.DEV.published[0]
KLEIN_4B = families.KLEIN.published[1]


def card(folder, *, base=DEV, settings=None, **given):
    folder.mkdir(exist_ok=True)
    facts = {"Steps": "30", "Loss | raw": "0.4\n<b>"}
    report.write_card(
        folder / "README.md",
        **{
            "config": settings or config(),
            "family": families.DEV,
            "base": base,
            "facts": facts,
            "lora_paths": paths(folder),
        }
        | given,
    )
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_page_shows_the_run(tmp_path):
    """Five charts, the previews' own bytes, facts, both files with their sizes, and the configuration are there."""
    text, found = page(tmp_path, lora_paths=paths(tmp_path))
    assert found.tags.count("svg") == 5
    assert base64.b64encode(b"\x89PNG pixels").decode() in text
    for words in ("Pictures", "lora/teapot-comfyui.safetensors", "kB", "learning_rate = 0.0001", tmp_path.name):
        assert words in found.text


def test_seconds_are_no_loss(tmp_path):
    """What a validation took stands beside its losses in the records and is not drawn among them."""
    text, _ = page(tmp_path, validation=[{"step": 0, "loss": 0.5, "sigma 1": 0.6, "seconds": 41.5}])
    assert ">sigma 1 0.6<" in text
    assert "41.5" not in text


def test_the_page_needs_nothing_else(tmp_path):
    """No address but inline data, no script, and a policy that forbids both."""
    text, found = page(tmp_path)
    assert all(address.startswith("data:") for address in found.addresses)
    assert not {"script", "link", "iframe", "object", "form"} & set(found.tags)
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import|https?://", text)


def test_what_people_typed_is_only_text(tmp_path):
    """File names, reasons, facts, metric names and the configuration cannot become markup."""
    text, found = page(
        tmp_path,
        config=config(data=[{"path": "pictures", "trigger": NASTY}]),
        facts={NASTY: NASTY},
        quarantine=[{"path": NASTY, "reason": NASTY, "dataset": 0}],
        validation=[{"step": 1, "loss": 1.0, NASTY: 2.0}],
    )
    assert "script" not in found.tags
    assert "<script" not in text
    assert found.tags.count("img") == 1
    assert found.text.count("alert(1)") >= 5


def test_a_page_of_nothing(tmp_path):
    """A run of zero steps without previews has a page too, without empty sections."""
    _, found = page(tmp_path, metrics=[], validation=[], grid_png=None, facts={})
    assert "svg" not in found.tags
    assert not {"Curves", "Previews", "Files"} & set(found.text.split())


def test_quarantine_is_counted_and_bounded(tmp_path):
    """All are counted; of more than 200 the rest is named by number."""
    _, found = page(tmp_path, quarantine=[{"path": f"{n}.jpg", "reason": "cut", "dataset": 0} for n in range(205)])
    assert "Left out: 205 pictures" in found.text
    assert "5 more in quarantine.parquet" in found.text
    assert "199.jpg" in found.text
    assert "200.jpg" not in found.text


def test_the_card_of_dev_carries_the_notices(tmp_path):
    """Attribution, statement of modification, a link, a word on the missing licence text; metadata the hub reads."""
    front, body = card(tmp_path)
    assert front["base_model"] == "black-forest-labs/FLUX.2-dev"
    assert (front["license"], front["instance_prompt"]) == ("other", "zwx")
    assert {"lora", "diffusers", "text-to-image"} <= set(front["tags"])
    assert DEV.licence.notice in body
    assert "Statement of modification" in body
    assert DEV.licence.page in body
    assert "has to add it" in body


def test_the_licence_text_travels_where_it_is(tmp_path):
    """A LICENSE in the model folder is put beside the card and linked."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "LICENSE.md").write_text("the terms")
    _, body = card(tmp_path / "run", model_folder=model)
    assert (tmp_path / "run" / "LICENSE.md").read_text() == "the terms"
    assert "[LICENSE.md](LICENSE.md)" in body


@pytest.mark.parametrize(("base", "path"), [(None, "models/tiny"), (KLEIN_4B, "black-forest-labs/FLUX.2-klein-4B")])
def test_other_cards_do_not_claim_devs_licence(tmp_path, base, path):
    """The dev licence is nowhere in the card of another model."""
    front, body = card(tmp_path, base=base, settings=config(path))
    assert front["base_model"] == path
    assert "Non-Commercial" not in body
    assert "licence applies" in body
    assert front.get("license") == (base and "apache-2.0")


@pytest.mark.parametrize("prompt", ['a "[trigger]" \\ teapot', "a\nb: [trigger]", "``` [name]"])
def test_the_cards_code_is_python(tmp_path, prompt):
    """Whatever the prompt, the example parses, loads the file that is there, and asks for the trigger."""
    settings = config(validate={"prompts": [prompt]})
    front, body = card(tmp_path, settings=settings, preview="previews/step-000030.png")
    code = re.search(r"```python\n(.*?)\n```\n", body, re.DOTALL)[1]
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    weights = next(text for text in strings if str(text).endswith(".safetensors"))
    assert (tmp_path / weights).is_file()
    expected = prompt.replace("[trigger]", "zwx").replace("[name]", "zwx")
    assert expected in strings
    assert front["widget"][0] == {"text": expected, "output": {"url": "previews/step-000030.png"}}


def test_the_cards_table_stays_a_table(tmp_path):
    """A bar, a line break or markup in a fact does not break the row."""
    _, body = card(tmp_path)
    assert "| Loss \\| raw | 0.4\\\\n\\<b\\> |" in body


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_only_text(tmp_path, text):
    """R23: in path, reason, fact and configuration of the page, in trigger, prompt, base and fact of the card, it adds
    no tag that harmless text does not have, nothing unseen is in either file, and the card's YAML reads it back."""
    settings = config(text, data=[{"path": "pictures", "trigger": text}], validate={"prompts": [text]})
    written, found = page(tmp_path, config=settings, facts={text: text}, quarantine=[
        {"path": text, "reason": text, "dataset": 0}
    ])  # fmt: skip
    _, plain = page(tmp_path, facts={"a": "b"}, quarantine=[{"path": "a", "reason": "b", "dataset": 0}])
    assert found.tags == plain.tags
    assert not unseen(written)
    front, body = card(tmp_path, base=None, settings=settings, facts={text: text})
    assert (front["instance_prompt"], front["base_model"]) == (text, text)
    harmless = config("models/tiny", validate={"prompts": ["a"]})
    _, other = card(tmp_path, base=None, settings=harmless, facts={"a": "b"})
    assert rendered(body).tags == rendered(other).tags
    assert not unseen((tmp_path / "README.md").read_text())
