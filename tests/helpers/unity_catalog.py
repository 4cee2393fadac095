"""A stand-in for Unity Catalog's open server: what of its REST protocol registering and loading ask for."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_ROOT = "/api/2.1/unity-catalog/models"


@contextmanager
def unity_catalog(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The server's ``uc:`` address, and the requests that it has had; versions' files go to ``folder``."""
    models: dict[str, list[dict[str, Any]]] = {}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size) or b"{}")
            path = self.path.partition("?")[0]
            asked.append(f"{self.command} {path}")
            code, said = self._find(path.removeprefix(_ROOT), body)
            content = json.dumps(said).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _find(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
            if self.command == "POST" and not path:
                name = ".".join(body[key] for key in ("catalog_name", "schema_name", "name"))
                if name in models:
                    return 409, {"error_code": "ALREADY_EXISTS", "message": f"{name} exists"}
                models[name] = []
                return 200, body | {"full_name": name}
            if self.command == "POST" and path == "/versions":
                name = ".".join(body[key] for key in ("catalog_name", "schema_name", "model_name"))
                number = len(models[name]) + 1
                home = folder / name / str(number)
                home.mkdir(parents=True)
                about = {"version": number, "storage_location": home.as_uri()}
                models[name].append(body | about | {"status": "PENDING_REGISTRATION"})
                return 200, models[name][-1]
            if path[1:] in models:
                return 200, {"full_name": path[1:], "name": path.rpartition(".")[2]}
            if found := re.fullmatch(r"/([^/]+)/versions/(\d+)(?:/finalize)?", path):
                versions = models.get(found[1], [])
                if int(found[2]) <= len(versions):
                    version = versions[int(found[2]) - 1]
                    if path.endswith("/finalize"):
                        version["status"] = "READY"
                    return 200, version
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"{path} is not there"}

        do_GET = do_POST = do_PATCH = _answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"uc:http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
