"""What the recipe's commands share: how an error ends one, processes beside others, the recipe without its noise."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def fail(reason: object) -> int:
    """One line for what the user got wrong; returns the exit status."""
    rank = int(os.environ.get("RANK", 0))
    print(f"error{f' on rank {rank}' if rank else ''}: {reason}", file=sys.stderr)
    return 2


@contextmanager
def processes() -> Iterator[None]:
    """Beside the other processes that a launcher has started, only the first of which speaks."""
    from examples.echovlm import ranks

    ranks.join()
    if not ranks.is_main():
        logging.getLogger("moe_adapter").setLevel(logging.ERROR)
    yield
    ranks.leave()  # not after an error, which the others don't know of: it would wait for them


def load_recipe() -> Callable[..., Path]:
    """The recipe, imported once the libraries below it are told to speak of errors only."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)  # its level it sets itself
    from transformers.utils.logging import set_verbosity_error

    from examples.echovlm.recipe import run

    set_verbosity_error()
    return run
