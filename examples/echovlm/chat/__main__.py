"""The chat page's command line: python -m examples.echovlm.chat --base DIR --adapter DIR."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moe_adapter import MoEAdapterError
from moe_adapter.directory import INDEX

HOST = "127.0.0.1"  # other machines don't see the page; it asks nobody who they are


def main(arguments: list[str] | None = None) -> int:
    """Serve the page until it is interrupted; 2 with one clear line for what the user got wrong."""
    options = _parser().parse_args(arguments)
    with TemporaryDirectory(prefix="echovlm-chat-") as uploads:
        try:
            _check_paths(options)
            _stay_home(uploads)
            page = _load(options)
            _launch(page, options.port)
        except MoEAdapterError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)
    return 0


def _stay_home(uploads: str) -> None:
    """Before gradio and transformers are imported: nothing goes out, and uploads go where they are deleted."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads, "HF_HUB_OFFLINE": "1"}


def _load(options: argparse.Namespace) -> Any:
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise MoEAdapterError('the chat page needs gradio: pip install "moe-adapter[chat]"') from None
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    from transformers.utils.logging import set_verbosity_error

    from examples.echovlm.chat.assistant import Assistant
    from examples.echovlm.chat.page import build_page

    set_verbosity_error()
    sizes = dict(max_new_tokens=options.max_new_tokens, image_side=options.image_side)
    assistant = Assistant(str(options.base), str(options.adapter), **sizes)
    return build_page(assistant, options.adapter.resolve().name)


def _launch(page: Any, port: int) -> None:
    from gradio.themes import Default

    from examples.echovlm.chat.page import FONT

    try:
        page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            ssr_mode=False,
            footer_links=[],
            theme=Default(font=FONT, font_mono=("monospace",)),
            prevent_thread_lock=True,
            quiet=True,
        )
    except OSError:
        raise MoEAdapterError(f"port {port}: it is taken; name another by --port") from None
    print(f"http://{HOST}:{port}/ (Ctrl+C ends it)", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.echovlm.chat",
        description="A chat page for a trained checkpoint. Research software, not a medical device.",
        epilog="example: python -m examples.echovlm.chat --base runs/tiny/base --adapter runs/tiny/stage2",
    )
    parser.add_argument("--base", type=Path, required=True, help="checkpoint directory of the base, as in training")
    parser.add_argument("--adapter", type=Path, required=True, help="a run's stage2 folder, or any saved adapter")
    parser.add_argument("--port", type=int, default=7860, help="on 127.0.0.1 (default: 7860)")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (default: 512)")
    help = "image_side of the preset it was trained by (default: the size that the base's processor holds)"
    parser.add_argument("--image-side", type=int, metavar="PIXELS", help=help)
    return parser


def _check_paths(options: argparse.Namespace) -> None:
    if not (options.base / "config.json").is_file():
        raise MoEAdapterError(
            f"--base {options.base}: got no checkpoint directory; expected one that holds config.json"
        )
    if not 0 <= options.port <= 65535:
        raise MoEAdapterError(f"--port {options.port}: expected a number from 0 to 65535")
    if not (options.adapter / INDEX).is_file():
        raise MoEAdapterError(f"--adapter {options.adapter}: got no adapter; expected a folder that holds {INDEX}")
    for name in ("max_new_tokens", "image_side"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise MoEAdapterError(f"--{name.replace('_', '-')} {value}: expected a whole number from 1")


if __name__ == "__main__":
    sys.exit(main())
