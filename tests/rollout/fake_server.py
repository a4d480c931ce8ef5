"""A server that answers as vLLM's does, in this process; what each of its routes answers can be changed."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from real_fast.rollout.vllm_transfer import tensors_in


class FakeServer:
    """vLLM's routes as far as the engine knows them; what each answers can be changed."""

    def __init__(self, state: dict[str, Any], text: list[int]) -> None:
        self.state, self.text = state, text
        self.label, self.weights = "default", dict[str, torch.Tensor]()
        self.calls: list[Any] = []
        self.active = False
        self.files: list[int] = []
        self.answers: dict[str, Callable[[Any], Any]] = {}
        self.drop = self.halve = 0  # connections closed without an answer, or within it
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(None)

            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.answer(json.loads(sent) if sent else None)

            def answer(self, body: Any) -> None:
                if fake.drop and "generate" in self.path:
                    fake.drop -= 1
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                status, said = fake.said(self.path, body)
                raw = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                halved = fake.halve > 0 and "generate" in self.path
                fake.halve -= halved
                self.wfile.write(raw[: len(raw) // 2] if halved else raw)
                if halved:
                    self.connection.shutdown(socket.SHUT_RDWR)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # who closed a connection meant it
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def said(self, path: str, body: Any) -> tuple[int, Any]:
        name = path.strip("/").replace("/", "_")
        self.calls.append((name, body) if name == "update_weight_version" else name)
        if name in self.answers:
            return self.answers[name](body)  # type: ignore[no-any-return]
        return getattr(self, name, lambda _: (404, {"detail": "Not Found"}))(body)  # type: ignore[no-any-return]

    def collective_rpc(self, body: Any) -> tuple[int, Any]:
        return 200, {"results": [self.state if body["method"] == "real_fast_state" else "False"]}

    def weight_info(self, _: Any) -> tuple[int, Any]:
        return 200, {"weight_version": self.label}

    def update_weight_version(self, body: Any) -> tuple[int, Any]:
        self.label = body["new_version"]
        return 200, {}

    def init_weight_transfer_engine(self, body: Any) -> tuple[int, Any]:
        info = body["init_info"]
        return (200, {}) if Path(info["path"]).read_text() == info["text"] else failed("not on the server's machine")

    def start_weight_update(self, _: Any) -> tuple[int, Any]:
        if self.active:
            return failed("start_weight_update called while a weight update is already active.")
        self.active = True
        return 200, {}

    def update_weights(self, body: Any) -> tuple[int, Any]:
        info = dict(body["update_info"])
        self.files.append(Path(info["path"]).stat().st_size)
        self.weights |= {name: tensor.clone() for name, tensor in tensors_in(info.pop("path"), info)}
        return 200, {}

    def finish_weight_update(self, _: Any) -> tuple[int, Any]:
        self.active = False
        return 200, {}

    def reset_prefix_cache(self, _: Any) -> tuple[int, Any]:
        return 200, {"success": True}

    def inference_v1_generate(self, body: Any) -> tuple[int, Any]:
        params = body["sampling_params"]
        tokens = self.text[body["token_ids"][0] == 8 :][: params["max_tokens"]]  # one less behind the first prompt
        choices = [{"index": i, **sampled(tokens, params)} for i in reversed(range(params.get("n", 1)))]
        return 200, {"choices": choices}


def sampled(tokens: list[int], params: Any) -> dict[str, Any]:
    """As vLLM writes them: of the tokens asked for behind the sampled one, as many as ``logprobs`` says in all."""
    content = []
    for place, token in enumerate(tokens):
        found = {token: -0.5 - place} | {i: -2.0 - i for i in params.get("logprob_token_ids", ()) if i != token}
        top = [{"token_id": i, "logprob": value} for i, value in found.items()][: max(params["logprobs"], 1)]
        content.append({"token_id": token, "logprob": -0.5 - place, "top_logprobs": top})
    return {"token_ids": tokens, "logprobs": {"content": content}}


def failed(why: str) -> tuple[int, Any]:
    return 500, {"error": {"message": f"Worker failed with error '{why}'"}}
