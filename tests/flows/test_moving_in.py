"""`import-config` and `init` as a person runs them: what is shown, written and refused, and with which exit code."""

import json
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.flows.command import COMMAND

PEERS = Path(__file__).parents[1] / "peer_configs"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(COMMAND), *arguments], cwd=folder, capture_output=True, text=True)


def test_shown_or_written(tmp_path: Path) -> None:
    """Without --out the configuration itself is the output; with it the file is written, and what became of the options
    is told, with the next command."""
    source = str(PEERS / "ai-toolkit" / "character.yaml")
    shown = run(tmp_path, "import-config", source)
    assert (shown.returncode, shown.stderr) == (0, "")
    told = run(tmp_path, "import-config", source, "--out", "my.toml")
    assert tomllib.loads(shown.stdout) == tomllib.loads((tmp_path / "my.toml").read_text())
    assert "AI Toolkit: 40 options carried over, 16 answered" in told.stdout
    assert "model.low_vram: not needed: the planner" in told.stdout
    assert told.stdout.endswith("next: cacheloom plan my.toml\n")


def test_json(tmp_path: Path) -> None:
    """`--json` prints one object with the fixed fields, and the unknown options with the nearest names."""
    command = "--pretrained_model_name_or_path m --instance_data_dir d --instance_prompt 'a b' --ranc 3 --hub_token x"
    result = json.loads(run(tmp_path, "import-config", command, "--json").stdout)
    assert {"config", "mapped", "dropped", "unknown"} <= result.keys()
    assert result["config"]["model"] == {"path": "m"}
    assert result["unknown"] == [{"option": "--ranc", "nearest": "rank"}]
    assert [entry["option"] for entry in result["dropped"]] == ["--hub_token"]
    assert {entry["option"]: entry["key"] for entry in result["mapped"]}["--instance_prompt"] == "data[].caption"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("import-config", "nothing.json"), "no such file"),
        (("import-config", "README.md"), "no command of a known trainer"),
        (("import-config", "ls -l"), "no command of a known trainer"),
        (("import-config", "damaged.json"), "damaged.json: not JSON (Expecting value: line 2 column 15"),
        (("init", "--out", "README.md"), "it is there already, and is not written over"),
        (("init", "--out", "no/where.toml"), "cannot be written"),
        (("init", "--card", "12"), "invalid choice"),
    ],
)
def test_refused_with_exit_code_2(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    """What is no configuration, and what would be written over, ends with exit code 2 and one line that says why."""
    (tmp_path / "README.md").write_text("# A page\n")
    (tmp_path / "damaged.json").write_text('{"model_family": "flux2",\n "lora_rank": }')
    ran = run(tmp_path, *arguments)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert told in ran.stderr
    assert "Traceback" not in ran.stderr
    assert (tmp_path / "README.md").read_text() == "# A page\n"


def test_begin(tmp_path: Path) -> None:
    """`init` writes a file and says what to do with it; a second one does not write over it."""
    first = run(tmp_path, "init", "--goal", "character", "--card", "80", "--data", "photos/mira")
    assert first.stdout.startswith("cacheloom.toml: put in the pictures' folder and the trigger")
    tree = tomllib.loads((tmp_path / "cacheloom.toml").read_text())
    assert tree["data"][0]["path"] == "photos/mira"
    assert (tree["cluster"]["gpu_memory"], tree["train"]["batch_size"]) == (80, 2)
    assert run(tmp_path, "init").returncode == 2
