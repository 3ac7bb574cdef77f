"""The commands against a real server: llama-cpp-python's, with a model that is made here and knows only which
character follows which. Needs `pip install "llama-cpp-python[server]" gguf`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from echovlm.corpus.llm_server import write_case_file

from examples.echovlm.corpus.__main__ import main
from examples.echovlm.corpus.audit import trail
from examples.echovlm.corpus.generation import ANSWERS
from examples.echovlm.corpus.instances import INSTANCES, read_instances

pytest.importorskip("llama_cpp", reason='needs pip install "llama-cpp-python[server]"')
gguf = pytest.importorskip("gguf", reason="needs pip install gguf")
pytestmark = pytest.mark.slow

END, MERGED = "<|im_end|>", "th"
CONTEXT, WIDTH, HEAD = 16384, 288, 32  # one number for each token, and room to spare
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def follows() -> dict[str, dict[str, float]]:
    """Logits of the next character: words of letters until a quote ends them; all else is up to the grammar."""
    letters = dict.fromkeys("abcdefghijklmnopqrstuvwxyz", 6.0)
    table = {chr(code): {'"': 6.0, ",": 5.0, "}": 5.0} for code in range(33, 127)}
    table |= {letter: letters | {" ": 6.0, '"': 6.5} for letter in letters} | {" ": letters}
    table['"'] = letters | dict.fromkeys(":,}", 4.0)
    return table | {mark: {'"': 6.0} | dict.fromkeys("{12345", 5.0) for mark in ":,{"}


def write_model(path: Path) -> None:
    """A llama whose only layer adds nothing, so that the output layer reads the last token and no other."""
    characters = list(gguf_alphabet().values())
    tokens = [*characters, MERGED, END]
    place = {token: number for number, token in enumerate(tokens)}
    embedding = np.eye(len(tokens), WIDTH, dtype=np.float32)  # the norm makes sqrt(WIDTH) of the 1
    output = np.zeros((len(tokens), WIDTH), dtype=np.float32)
    for before, after in follows().items():
        for token, logit in after.items():
            output[place[gguf_alphabet()[ord(token)]], place[gguf_alphabet()[ord(before)]]] = logit / WIDTH**0.5
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(WIDTH // HEAD)
    writer.add_head_count_kv(WIDTH // HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL if token == END else gguf.TokenType.NORMAL for token in tokens]
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(MERGED)])
    writer.add_eos_token_id(place[END])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT)
    shapes = {name: (WIDTH, WIDTH) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {"ffn_gate": (32, WIDTH), "ffn_up": (32, WIDTH), "ffn_down": (WIDTH, 32)}
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros(shape, dtype=np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output.weight", output)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_alphabet() -> dict[int, str]:
    """GPT-2's character for each byte."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    model = tmp_path_factory.mktemp("model") / "characters.gguf"
    write_model(model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["--model", str(model), "--n_ctx", str(CONTEXT), "--port", str(port), "--n_threads", "1"]
    with subprocess.Popen([sys.executable, "-m", "llama_cpp.server", *command], env=os.environ) as process:
        try:
            deadline = time.monotonic() + 60
            while not is_up(port):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def is_up(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models").status == 200
    except urllib.error.URLError:
        return False


def test_generate_and_judge_by_a_real_server(url, tmp_path, capsys):
    cases = write_case_file(tmp_path / "c", ["liver", "heart"])
    server = ["--base-url", url, "--model", "m", "--max-tokens", "2000", "--concurrency", "3"]
    out = str(tmp_path / "out")
    command = ["generate", str(cases), "--out", out, *server]
    assert main([*command, "--retries", "0"]) == 2 and "may be json_schema or json_object" in capsys.readouterr().err
    server += ["--response-format", "json_object"]
    command += ["--response-format", "json_object"]
    assert main([*command, "--max-requests", "1"]) == 0 and main(command) == 0
    answers = [json.loads(line) for line in (tmp_path / "out" / ANSWERS).read_text().splitlines()]
    assert len(answers) == len({answer["key"] for answer in answers}) == 4
    assert {answer["finish"] for answer in answers} == {"stop"} and min(answer["tokens"] for answer in answers) > 1000
    instances = read_instances(tmp_path / "out" / INSTANCES)
    assert Counter(item.language for item in instances if item.kind == "open") == {"en": 7, "zh": 7}
    before = (tmp_path / "out" / INSTANCES).read_bytes()
    assert main(["generate", str(cases), "--out", str(tmp_path / "again"), *server]) == 0
    assert (tmp_path / "again" / INSTANCES).read_bytes() == before  # the seeds are the server's, too
    assert main(["judge", out, "--cases", str(cases), "--out", str(tmp_path / "j"), "--threshold", "1", *server]) == 0
    judged = read_instances(tmp_path / "j" / INSTANCES)
    assert {item.judge["faithfulness"] in range(1, 6) for item in judged if item.kind == "open"} == {True}
    asked = trail([tmp_path / "out", tmp_path / "j"], instances[0].id)["asked"]
    assert asked["judge"]["messages"] and instances[0].answer in asked["judge"]["messages"][1]["content"]
