"""The options of the steps that ask a language model, and what they say at the end."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from examples.echovlm.corpus.client import Server
from examples.echovlm.corpus.manifest import Manifest

HELP = {
    "base_url": "the server, such as http://localhost:8000/v1; any that speaks OpenAI's API, key in OPENAI_API_KEY",
    "model": "the model's name at the server",
    "temperature": "how freely it writes",
    "max_tokens": "of an answer",
    "concurrency": "requests at once",
    "retries": "of a request that met 429, 5xx or a lost connection",
    "timeout": "seconds for an answer",
    "attempts": "at a valid answer, each with another seed",
    "response_format": "how the schema is sent: json_schema, or json_object to a server that does not know that",
    "max_requests": "budget: answered requests, all runs of the step on this folder together",
    "max_total_tokens": "budget: tokens in and out, all runs of the step on this folder together",
}
OPTIONAL = {"max_requests": int, "max_total_tokens": int}


def add_server(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Enter an option for each of `Server`'s fields."""
    group = parser.add_argument_group("server")
    for field in fields(Server):
        flag = "--" + field.name.replace("_", "-")
        if field.name in ("base_url", "model"):
            group.add_argument(flag, required=True, help=HELP[field.name])
            continue
        default = defaults.get(field.name, field.default)
        kind = OPTIONAL.get(field.name) or type(default)
        shown = "none" if default is None else "%(default)s"
        group.add_argument(flag, type=kind, default=default, help=f"{HELP[field.name]} (default: {shown})")


def server_of(options: argparse.Namespace) -> Server:
    return Server(**{field.name: getattr(options, field.name) for field in fields(Server)})


def file_of(path: Path, name: str) -> Path:
    """A file that is named, or the one of this name in the folder of an earlier step."""
    return path / name if path.is_dir() else path


def tell(manifest: Manifest, out: object) -> None:
    """Print what a step was given, kept and dropped, in a line or two."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in manifest.dropped.items())
    print(f"{manifest.step}: {manifest.given} given, {manifest.kept} kept{f'; {dropped}' if dropped else ''}; {out}")
    if stopped := manifest.more.get("stopped"):
        print(f"stopped: {stopped}; the same command goes on")
