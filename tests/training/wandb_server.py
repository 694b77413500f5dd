"""A W&B server in little: it takes a run, and from a chosen moment on misbehaves."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode(errors="replace")
        server = self.server
        assert isinstance(server, Server)
        if server.mode == "hang":
            time.sleep(60)
        if server.mode in ("401", "500"):
            self._answer(int(server.mode), {"error": "no"})
        elif self.path == "/graphql":
            self._answer(200, {"data": self._data(json.loads(text), f"http://127.0.0.1:{server.server_address[1]}")})
        else:
            server.taken += text.count("loss")
            self._answer(200, {"exitcode": None, "limits": {}})

    do_PUT = do_POST

    def do_GET(self) -> None:
        self._answer(200, {})

    @staticmethod
    def _data(asked: dict[str, Any], url: str) -> dict[str, Any]:
        if "upsertBucket" in asked["query"]:
            project = {"id": "p", "name": "graft-test", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": asked["variables"].get("name"), "displayName": "run", "sweepName": None,
                      "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in asked["query"]:
            files = [{"name": name, "uploadUrl": f"{url}/up/{name}"} for name in asked["variables"]["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {"model": None}

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    mode = "well"
    taken = 0  # rows of history

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that give up


def main(folder: str, at_start: str, later: str) -> None:
    """Log 30 rows, and change the server's mind after 15; prints seconds of each part."""
    import logging
    import os

    from tests.conftest import find_free_port
    from tests.training.test_wandb_log import start
    from training import wandb_log

    logging.basicConfig(format="%(levelname)s %(message)s")
    wandb_log.INIT_TIMEOUT_S = wandb_log.FINISH_TIMEOUT_S = 3.0
    server = Server(("127.0.0.1", 0), Handler)
    server.mode = at_start
    port = find_free_port() if at_start == "refuse" else server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ.update(WANDB_API_KEY="k" * 40, WANDB_BASE_URL=f"http://127.0.0.1:{port}", WANDB_ERROR_REPORTING="false")
    moments = [time.monotonic()]
    with start(Path(folder), mode="online") as run:
        moments.append(time.monotonic())
        for images in range(30):
            run.log({"loss": float(images)}, images)
            time.sleep(0.02)
            if images == 15 and later == "die":
                server.shutdown()
                server.server_close()
            elif images == 15:
                server.mode = later
        run.alert("graft health", "collapse")
        moments.append(time.monotonic())
    moments.append(time.monotonic())
    print("seconds", *(after - before for before, after in itertools.pairwise(moments)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
