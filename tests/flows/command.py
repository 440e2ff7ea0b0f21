"""The `cacheloom` command in tests, installed or warm: its project folder, its environment, what it leaves behind."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import psutil

from flows.reaper import MARKER
from flux2_core.config.reading import dump_toml, load
from flux2_core.config.sections import Config
from tests import warm
from tests.flows.real_prefect import BIN

COMMAND = BIN / "cacheloom"
CONFIG = """
run = "{run}"
max_quarantined = 0.2
[model]
path = "{model}"
[[data]]
path = "{photos}"
trigger = "sks"
resolutions = [64]
[text]
dtype = "fp32"
max_length = 64
[latents]
dtype = "fp32"
[lora]
rank = 2
[train]
steps = 4
batch_size = 2
learning_rate = 1e-3
[validate]
every = 4
steps = 2
prompts = ["a photo of [trigger]"]
[output]
root = "runs"
cache = "cache"
save_every = 2
"""


class Project:
    """A folder with a configuration; commands run inside it, warm (tests/warm.py) or as the installed one."""

    def __init__(self, folder: Path, *, model: Path, photos: Path, run: str = "tiny", warm: bool = False) -> None:
        self.folder, self.warm = folder, warm
        self.file = folder / "config.toml"
        self.file.write_text(CONFIG.format(run=run, model=model, photos=photos))
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_") and name != MARKER}
        self.environment = kept | {"PREFECT_HOME": str(folder / "prefect"), "OMP_NUM_THREADS": "1"}

    def join(self, address: str) -> None:
        """From now on commands join a Ray that runs, instead of starting one each."""
        self.file.write_text(f'{self.file.read_text()}[cluster]\naddress = "{address}"\n')
        self.environment |= {name: value for name, value in os.environ.items() if name.startswith("RAY_")}  # its token

    def run(self, verb: str, *arguments: str) -> subprocess.CompletedProcess:
        """Run `cacheloom VERB config.toml ARGUMENTS` to its end."""
        line = self.line(verb, *arguments)
        if not self.warm:
            return subprocess.run(line, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        out, err = (self.folder.parent / f"{self.folder.name}.{name}" for name in ("out", "err"))
        code = warm.command(line, folder=self.folder, environment=self.environment, out=out, err=err)
        return subprocess.CompletedProcess(line, code, out.read_text(), err.read_text())

    def json(self, verb: str, *arguments: str, code: int = 0) -> dict[str, Any]:
        """Run a verb with `--json`; its standard output must be one JSON object and nothing else."""
        ran = self.run(verb, *arguments, "--json")
        assert ran.returncode == code, ran.stdout + ran.stderr
        assert "Traceback" not in ran.stderr
        return json.loads(ran.stdout)

    def start(self, verb: str, *arguments: str) -> subprocess.Popen:
        """Start a verb in a process group of its own, as a shell does, its output into a file of its name."""
        with (self.folder / f"{verb}.log").open("wb") as log:
            return subprocess.Popen(
                self.line(verb, *arguments),
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                process_group=0,
            )

    def line(self, verb: str, *arguments: str) -> list[str]:
        return [str(COMMAND), verb, str(self.file), *arguments]

    def config(self, *overrides: str) -> Config:
        """The configuration as the command sees it."""
        places = [f"output.root={self.folder / 'runs'}", f"output.cache={self.folder / 'cache'}"]
        return load(self.file, [*places, *overrides])

    def write(self, config: Config, name: str) -> Path:
        """A resolved configuration as another file of the project."""
        path = self.folder / name
        path.write_text(dump_toml(config))
        return path


def carrying(variable: str, value: str | None = None) -> list[psutil.Process]:
    """Living processes with an environment variable, at a value or at any."""
    found = []
    for process in psutil.process_iter():
        try:
            given = process.environ().get(variable)
            if given is not None and value in (None, given) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # gone, or not ours
    return found
