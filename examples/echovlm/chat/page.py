"""The chat page: frames and a question in, the answer, the experts of the frames' patches and α, λ by layer out."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from examples.echovlm.chat.assistant import Assistant, Conversation
from moe_adapter import MoEAdapterError
from moe_adapter.analysis.prompts import open_image

NOTICE = (
    "**Research software, not a medical device.** Its answers can be wrong, and nothing here may serve to diagnose or "
    "treat anybody."
)
ABOUT = (
    "Runs on this computer alone; answers are greedy. Questions on the same frames go on with the chat, though the "
    "recipe trains on single questions; other frames begin a new one. Closing this tab deletes frames and chat."
)
FONT = ("system-ui", "sans-serif")  # the machine's own: nothing is fetched
STALE = 3600  # seconds


class Sessions:
    """What each open tab has uploaded and asked, deleted when the tab is closed."""

    def __init__(self) -> None:
        self._conversations: dict[str, tuple[list[str], Conversation]] = {}
        self._uploads: dict[str, set[str]] = {}

    def conversation(self, session: str, paths: list[str]) -> Conversation:
        """The tab's conversation on these frames, a new one where they are others than before.

        Raises: MoEAdapterError if one is no image.
        """
        if session not in self._conversations or self._conversations[session][0] != paths:
            fresh = Conversation(frames=[_open(path) for path in paths])
            self._end(session)
            self._conversations[session] = (paths, fresh)
        return self._conversations[session][1]

    def current(self, session: str) -> Conversation | None:
        return self._conversations.get(session, ([], None))[1]

    def uploaded(self, gallery: Sequence[tuple[str, Any]] | None, request: gr.Request) -> None:
        self._uploads.setdefault(_session(request), set()).update(_paths(gallery))

    def forget(self, request: gr.Request) -> None:
        self._end(_session(request))

    def close(self, request: gr.Request) -> None:
        session = _session(request)
        self._end(session)
        mine = self._uploads.pop(session, set())
        for path in mine - set().union(*self._uploads.values()):  # a file's place goes by its content
            Path(path).unlink(missing_ok=True)

    def _end(self, session: str) -> None:
        if conversation := self.current(session):
            conversation.close()
            del self._conversations[session]


def build_page(assistant: Assistant, title: str) -> gr.Blocks:
    """The page of one checkpoint; `title` names it."""
    sessions = Sessions()

    def ask(gallery: Any, question: str, layer: int, request: gr.Request) -> tuple[Any, ...]:
        paths, question = _paths(gallery), question.strip()
        if not paths or not question:
            return gr.skip(), gr.skip(), gr.skip(), _alert("Add frames first." if not paths else "Ask a question.")
        try:
            conversation = sessions.conversation(_session(request), paths)
            assistant.answer(conversation, question)
        except MoEAdapterError as error:
            return gr.skip(), gr.skip(), gr.skip(), _alert(error)
        return _chat(conversation), "", *draw(layer, request)

    def draw(layer: int, request: gr.Request) -> tuple[Any, str]:
        """The overlay, or why there is none."""
        conversation = sessions.current(_session(request))
        if conversation is None or not conversation.turns:
            return None, ""
        try:
            return assistant.overlay(conversation, layer), ""
        except MoEAdapterError as error:
            return None, _alert(error)

    with gr.Blocks(title=f"EchoVLM: {title}", analytics_enabled=False, delete_cache=(STALE, 24 * STALE)) as page:
        gr.Markdown(f"# EchoVLM: {html.escape(title)}\n\n{NOTICE}\n\n{ABOUT}")
        with gr.Row():
            with gr.Column(min_width=300):
                frames = gr.Gallery(
                    label="Frames",
                    file_types=["image"],
                    sources=["upload"],
                    interactive=True,
                    buttons=[],
                    object_fit="contain",
                    columns=3,
                )
                chat = gr.Chatbot(label="Chat", render_markdown=False, feedback_options=None, buttons=[])
                question = gr.Textbox(label="Question", placeholder="Enter sends it", lines=1, max_lines=5)
                alert = gr.HTML()
                send = gr.Button("Ask", variant="primary")
            with gr.Column(min_width=300):
                layer = gr.Dropdown(list(range(len(assistant.layers))), value=0, label="Layer", filterable=False)
                gr.Markdown("The first expert of each patch, over the frames:")
                overlay = gr.Plot(show_label=False)
                gr.Markdown(path_table(assistant))
        gr.on(
            [send.click, question.submit],
            ask,
            [frames, question, layer],
            [chat, question, overlay, alert],
            api_visibility="private",
        )
        layer.change(draw, [layer], [overlay, alert], api_visibility="private")
        frames.change(sessions.uploaded, [frames], api_visibility="private")
        chat.clear(sessions.forget, api_visibility="private")
        page.unload(sessions.close)
    return page


def path_table(assistant: Assistant) -> str:
    """α and λ by layer, in Markdown; "–" where a layer has none, since mixing is by token or a path is absent."""
    lines = ["The paths by layer, Y = α·FFN + (1 − α)·(λ·shared + routed):", "", "| layer | α | λ |", "|--:|--:|--:|"]
    for number, facts in enumerate(assistant.layers):
        weights = ("–" if value is None else f"{value:.4f}" for value in (facts.alpha, facts.lam))
        lines.append(f"| {number} | {' | '.join(weights)} |")
    return "\n".join(lines)


def _session(request: gr.Request) -> str:
    assert request.session_hash is not None, "every tab has one"
    return request.session_hash


def _paths(gallery: Sequence[tuple[str, Any]] | None) -> list[str]:
    return [path for path, _ in gallery or []]


def _open(path: str) -> Any:
    try:
        return open_image(path)
    except MoEAdapterError:
        raise MoEAdapterError(f"{Path(path).name} is not an image that Pillow reads: remove it.") from None


def _chat(conversation: Conversation) -> list[dict[str, str]]:
    """Escaped, since the component takes what looks like HTML for it."""
    return [{"role": role, "content": html.escape(text, quote=False)} for role, text in conversation.said()]


def _alert(reason: object) -> str:
    return f'<p role="alert">{html.escape(str(reason))}</p>'
