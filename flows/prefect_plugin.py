"""`prefect deployment run cache-and-train`: a deployment's name alone is enough where only one flow has it.

Prefect refuses a deployment name without a slash. This module is an entry point of group `prefect.plugins`, whose
hook runs while `prefect` is imported, before its command line is read: for this one command the name in `sys.argv`
is completed to `flow/deployment`, for all others nothing happens. Nothing of Prefect is patched.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from prefect.plugins import register_hook

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.filters import DeploymentFilter
    from prefect.plugins import HookContext

COMMANDS = ("deployment", "deployments")
FLAGS = ("--watch", "--no-watch", "--prompt", "--no-prompt")  # every other option is followed by a value
LISTED = 200  # the server's page size, and more names than anyone reads


@register_hook
def setup_environment(*, ctx: HookContext) -> None:
    """Complete the deployment's name on the command line, if this is the command that needs it.

    Raises:
        SystemExit: no deployment has the name, or several have it; the message is one line for each.
    """
    if not _is_prefect_command():
        return
    found = slashless(sys.argv[1:])
    if found is None:
        return
    position, profile = found
    sys.argv[position + 1] = _complete(sys.argv[position + 1], profile=profile, api_url=ctx.api_url)


def slashless(arguments: Sequence[str]) -> tuple[int, str | None] | None:
    """Position of the slashless name in `deployment run NAME ...` and the `--profile` given, if any; else None."""
    if "--help" in arguments:
        return None
    words: list[int] = []
    profile = None
    skip = False
    for position, argument in enumerate(arguments):
        if skip:
            skip = False
        elif not argument.startswith("-"):
            words.append(position)
        else:
            skip = argument not in FLAGS and "=" not in argument
            if not words and argument.partition("=")[0] in ("--profile", "-p"):
                profile = argument.partition("=")[2] or next(iter(arguments[position + 1 :]), None)
    named = [arguments[position] for position in words]
    if len(named) != 3 or named[0] not in COMMANDS or named[1] != "run" or "/" in named[2] or not named[2]:
        return None
    return words[2], profile


def choose(name: str, deployed: Sequence[str]) -> str:
    """The one `flow/deployment` in `deployed` whose deployment is called `name`.

    Raises:
        SystemExit: none or several are; the message says which there are.
    """
    matches = sorted(full for full in deployed if full.partition("/")[2] == name)
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise SystemExit(f"Several deployments are called {name!r}: say which, one of {', '.join(matches)}")
    if not deployed:
        raise SystemExit(f"No deployment is called {name!r}: none exists yet; run `prefect --no-prompt deploy --all`")
    near = difflib.get_close_matches(name, [full.partition("/")[2] for full in deployed], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(deployed)[:10])}"
    raise SystemExit(f"No deployment is called {name!r}: {hint}")


def _is_prefect_command() -> bool:
    if sys.argv[:1] == ["-m"]:  # `python -m prefect`: Python has not found the module's file yet
        return "prefect" in sys.orig_argv[1:] and sys.orig_argv[sys.orig_argv.index("prefect") - 1] == "-m"
    return bool(sys.argv) and Path(sys.argv[0]).name in ("prefect", "prefect.exe")


def _complete(name: str, *, profile: str | None, api_url: str | None) -> str:
    # Imported only for this command: the client takes 0.5 s, and the command loads it anyway.
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
    from prefect.context import use_profile
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        with (
            use_profile(profile, override_environment_variables=True) if profile else nullcontext(),
            get_client(sync_client=True) as client,
        ):
            called_so = DeploymentFilter(name=DeploymentFilterName(any_=[name]))
            return choose(name, _deployed(client, called_so) or _deployed(client, None))
    except KeyError:
        return name  # an unknown profile: Prefect's own message says so
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        where = f"profile {profile}" if profile else (api_url or "this machine")
        raise SystemExit(
            f"Could not look up deployment {name!r} at {where}: {error}; is the server running (prefect server start)?"
        ) from None


def _deployed(client: SyncPrefectClient, wanted: DeploymentFilter | None) -> list[str]:
    found = client.read_deployments(deployment_filter=wanted, limit=LISTED)
    flows = {flow_id: client.read_flow(flow_id).name for flow_id in {deployment.flow_id for deployment in found}}
    return [f"{flows[deployment.flow_id]}/{deployment.name}" for deployment in found]
