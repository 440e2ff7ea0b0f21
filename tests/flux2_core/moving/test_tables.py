"""The tables know every option of five trainers: 1,713, of which 422 cannot concern FLUX.2."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flux2_core.config.reading import keys
from flux2_core.moving import readers, rules
from flux2_core.moving.moved import PARAMETER, move
from flux2_core.moving.tables import systems

FACTS = json.loads((Path(__file__).parents[2] / "peer_configs" / "options.json").read_text(encoding="utf-8"))
COUNTS = {  # options in all, those of other models, those that a setting of ours is made of
    "simpletuner": (865, 224, 122),
    "ai-toolkit": (482, 174, 105),
    "diffsynth": (71, 1, 24),
    "diffusers": (89, 0, 46),
    "musubi": (206, 23, 67),
}
COLUMNS = {  # of files beside the pictures, which are read as they are
    *("image", "prompt", "edit_image", "template_inputs", "file_name", "jsonl.image_path", "jsonl.image_path_<n>"),
    *("jsonl.caption", "jsonl.control_path", "jsonl.control_path_<n>", "jsonl.video_path"),
}
LATER = {  # keys that a table may name before they are there: such an option is answered as not yet
    *("tracking", "slider.target", "slider.positive", "slider.negative", "slider.anchor"),
    *("tread.routes", "validate.prompt"),  # tables, which stand in one key
}


def names(system: str) -> dict[str, Any]:
    """Every option of a trainer with a value of its kind."""
    return {name: value for group in FACTS[system].values() for name, value in group.items()}


@pytest.mark.parametrize("system", COUNTS)
def test_every_option_is_known(system: str) -> None:
    """Each option of a trainer is mapped or answered with a reason, never both, and its table knows no other."""
    table, all_of_them = systems()[system], names(system)
    others = FACTS[system].get("others", {})
    mapped = table.mapped.keys() & all_of_them.keys()
    assert (len(all_of_them), len(others), len(mapped)) == COUNTS[system]
    assert mapped | table.answered.keys() == all_of_them.keys()
    assert not table.mapped.keys() & table.answered.keys()
    assert table.mapped.keys() - all_of_them.keys() <= {"num_processes"}  # of `accelerate launch`
    assert all(len(reason) > 10 for reason in table.answered.values())
    assert {name for name in others if name not in table.mapped} <= {
        name for name, reason in table.answered.items() if "other models" in reason
    }


def test_all_of_them() -> None:
    """Together they are 1,713, of which 422 cannot concern FLUX.2."""
    assert [sum(count[place] for count in COUNTS.values()) for place in (0, 1)] == [1713, 422]


@pytest.mark.parametrize("system", COUNTS)
def test_the_tables_name_what_there_is(system: str) -> None:
    """Each key is one of ours, or announced; each rule a function or a table of choices; each condition an option."""
    table, ours = systems()[system], {*keys()}
    for name, target in table.mapped.items():
        key = PARAMETER.sub("noise.parameters", target.key).replace("data[1]", "data[]")
        assert key in ours or re.sub(r"(?<!data)\[\].*", "", key) in LATER, (name, key)
        assert target.rule is None or target.rule in rules.RULES or target.rule in table.choices, name
        assert target.when is None or target.when in table.mapped, name
    used = {target.rule for target in table.mapped.values()}
    assert not table.choices.keys() - used
    assert {*table.defaults, *table.better} <= table.names


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted names as tables in tables, `[]` a list of one; a name with others below it stands for those."""
    tree: dict[str, Any] = {}
    for dotted, value in values.items():
        if any(other.startswith((f"{dotted}.", f"{dotted}[]")) for other in values):
            continue
        node, *parents = tree, *dotted.split(".")
        for name in parents[:-1]:
            inner = node.setdefault(name.removesuffix("[]"), [{}] if name.endswith("[]") else {})
            node = inner[0] if name.endswith("[]") else inner
        node[parents[-1]] = value
    return tree


def simpletuner(folder: Path) -> str:
    given = names("simpletuner")
    sets = nested({n.removeprefix("datasets[]."): v for n, v in given.items() if n.startswith("datasets[].")})
    sets |= {"dataset_type": "image", "disabled": False, "conditioning_data": "beside", "id": "mine"}
    beside = {"id": "beside", "dataset_type": "conditioning", "instance_data_dir": "before"}
    tree = nested({n: v for n, v in given.items() if not n.startswith(("datasets[].", "user_prompt_library"))})
    files = {"backends.json": [sets, beside], "lycoris.json": tree["lycoris_config"]}
    prompts = nested({n: v for n, v in given.items() if n.startswith("user_prompt_library.<name>.")})
    files["prompts.json"] = {"a": "text", "b": prompts["user_prompt_library"]["<name>"]}
    tree |= {"data_backend_config": "backends.json", "lycoris_config": "lycoris.json"}
    tree["user_prompt_library"] = "prompts.json"
    for name, content in {**files, "config.json": tree}.items():
        (folder / name).write_text(json.dumps(content))
    return str(folder / "config.json")


def toolkit(folder: Path) -> str:
    given = names("ai-toolkit")
    root = nested({n.removeprefix("$."): v for n, v in given.items() if n.startswith("$.")})
    process = nested({n: v for n, v in given.items() if not n.startswith("$.")})
    root["config"]["process"] = [process, {"type": "another"}]
    (folder / "job.json").write_text(json.dumps(root))
    return str(folder / "job.json")


def argv(system: str, folder: Path) -> Iterator[str]:
    """A command with every argument of a trainer; what stands in files beside it is written there."""
    given = names(system)
    for name, value in given.items():
        if "." not in name and "sample_prompts line" not in name and "[" not in name:
            values = [] if value is True else value if isinstance(value, list) else [value]
            yield from (f"--{name}", *map(str, values))
    if system == "musubi":
        inner = {n: v for n, v in given.items() if n.startswith(("general.", "datasets[]."))}
        (folder / "dataset.json").write_text(json.dumps(nested(inner)))
        (folder / "config.toml").write_text('[train]\nmodel_version = "dev"\n')
        flags = (f"{n.removeprefix('sample_prompts line ')} {v or 'x'}" for n, v in given.items() if " line " in n)
        (folder / "prompts.txt").write_text(f"a house {' '.join(flags)}\n")
        yield from ("--dataset_config", "dataset.json", "--config_file", "config.toml")
        yield from ("--sample_prompts", "prompts.txt")
        yield from ["--network_args", *(f"{n.partition('.')[2]}={v}" for n, v in given.items() if "network_args." in n)]


@pytest.mark.parametrize("system", COUNTS)
def test_a_configuration_of_every_option(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that sets every option of its trainer is read whole: nothing is unknown, nothing silent."""
    monkeypatch.chdir(tmp_path)
    if system == "simpletuner":
        source = simpletuner(tmp_path)
    elif system == "ai-toolkit":
        source = toolkit(tmp_path)
    else:
        source = shlex.join(argv(system, tmp_path))
    found = readers.read(source)
    unread = names(system).keys() - {option.name for option in found.options}
    inner = {one for one in unread if any(other.startswith((f"{one}.", f"{one}[]")) for other in names(system))}
    assert found.system.key == system
    assert unread - inner <= COLUMNS
    result = move(source)
    assert result["unknown"] == []
    assert sum(entry["given"] for entry in result["mapped"]) + len(result["dropped"]) == len(found.options)
    assert all(entry["reason"] for entry in result["dropped"])
    assert len([entry for entry in result["mapped"] if entry["given"]]) > 10


@pytest.mark.parametrize(
    ("system", "given", "nearest"),
    [
        ("simpletuner", "lora_rnk", "lora_rank"),
        ("ai-toolkit", "network.rnak", "network.rank"),
        ("diffusers", "learning_rat_e", "learning_rate"),
        ("musubi", "network_dmi", "network_dim"),
        ("diffsynth", "loar_rank", "lora_rank"),
    ],
)
def test_an_unknown_name_has_a_nearest(system: str, given: str, nearest: str) -> None:
    """A misspelt option is no option, and the nearest one is named."""
    assert systems()[system].known(given) is None
    assert systems()[system].nearest(given) == nearest


def test_beginnings_count_where_they_do_there() -> None:
    """As in argparse a beginning that one argument has means it, one that several have means none; YAML has none."""
    diffusers = systems()["diffusers"]
    assert diffusers.known("lr_sched") == "lr_scheduler"
    assert diffusers.known("train_b") == "train_batch_size"
    assert diffusers.known("lr_") is None
    assert systems()["simpletuner"].known("checkpoint_step") == "checkpoint_step_interval"
    assert systems()["ai-toolkit"].known("train.step") is None
