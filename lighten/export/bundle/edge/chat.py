"""Chats with the model of this bundle: a line on standard input is a message. Needs llama-cpp-python only."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def reply(llm: Any, system: list[dict[str, str]], turns: list[dict[str, str]], tokens: int) -> str:
    """Prints what the model says next, as it says it, and returns it. The oldest turns go when the context is full."""
    while True:
        said = []
        try:
            if "tokenizer.chat_template" in llm.metadata:
                parts = llm.create_chat_completion([*system, *turns], max_tokens=tokens, stream=True)
            else:  # a base model goes on with the text
                parts = llm.create_completion(turns[-1]["content"], max_tokens=tokens, stream=True)
            for part in parts:
                choice = part["choices"][0]
                text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
                said.append(text)
                print(text, end="", flush=True)
            print(flush=True)
            return "".join(said)
        except ValueError:
            if len(turns) < 2:
                raise
            del turns[:2]


def main() -> None:
    """Reads messages until the end of the input."""
    bundle = json.loads((HERE / "bundle.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=f"Chat with {bundle['name']}.")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--system", default="", help="what the model is told first")
    arguments = parser.parse_args()
    from bench import avoid_amx, cores  # type: ignore[import-not-found]  # it lies beside this file
    from llama_cpp import Llama, llama_cpp

    avoid_amx(llama_cpp)

    llm = Llama(
        str(HERE / bundle["file"]),
        n_ctx=bundle["context"],
        n_gpu_layers=-1 if bundle["gpu"] else 0,
        n_threads=cores(),
        n_threads_batch=cores(),
        flash_attn=True,  # without it llama.cpp's memory grows with the context
        verbose=False,
    )
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    turns: list[dict[str, str]] = []
    asking = sys.stdin.isatty()
    if asking:
        print(f"{bundle['name']}: type a message; end with Ctrl-D", file=sys.stderr)
    while True:
        if asking:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        turns.append({"role": "user", "content": line.strip()})
        try:
            turns.append({"role": "assistant", "content": reply(llm, system, turns, arguments.tokens)})
        except ValueError as error:
            turns.pop()
            print(f"{error}: send something shorter", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
