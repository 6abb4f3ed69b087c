"""The page of an export in headless Chromium: a picture is dropped on it, and its boxes are those of Python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import visft_ds
from tests import finished
from visft_ds.cli import main

pytestmark = pytest.mark.slow
#: Folder `dist` of npm's onnxruntime-web (`npm pack onnxruntime-web`, unpacked).
ORT = os.environ.get("VISFT_ORT_WEB", "")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DROP = """<!doctype html><iframe id="page" src="index.html" width="900" height="900"></iframe><script>
const frame = document.getElementById("page");
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
async function until(words) {
  const state = () => frame.contentDocument.getElementById("state").textContent;
  while (!words.some((word) => state().includes(word))) await wait(100);
  return state();
}
frame.onload = async () => {
  await until(["ready", "error"]);
  const blob = await (await fetch("photograph.png")).blob();
  const transfer = new DataTransfer();
  transfer.items.add(new File([blob], "photograph.png", { type: "image/png" }));
  frame.contentWindow.least.value = LEAST;
  const drop = new frame.contentWindow.DragEvent("drop", { dataTransfer: transfer, cancelable: true });
  frame.contentDocument.dispatchEvent(drop);
  const state = await until(["objects in", "error"]);
  const found = { state };
  if (!state.includes("error")) {
    const output = frame.contentWindow.eval("shown.output");
    found.boxes = Array.from(output.boxes.data);
    found.scores = Array.from(output.scores.data);
    found.drawing = frame.contentDocument.getElementById("canvas").toDataURL("image/png");
  }
  await fetch("result", { method: "POST", body: JSON.stringify(found) });
};
</script>"""


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, and keeps what the page sends back."""

    def __init__(self, *arguments: Any, received: list[Any], come: threading.Event, **options: Any) -> None:
        self.received = received
        self.come = come
        super().__init__(*arguments, **options)

    def do_POST(self) -> None:
        self.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()
        self.come.set()

    def log_message(self, *arguments: Any) -> None:
        pass


def seen(folder: Path, profile: Path, least: float, seconds: float) -> dict[str, Any]:
    """What the page of a folder says of its photograph.png."""
    (folder / "drop.html").write_text(DROP.replace("LEAST", str(least)))
    received: list[Any] = []
    come = threading.Event()
    handler = partial(Handler, directory=str(folder), received=received, come=come)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/drop.html"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        browser = subprocess.Popen(
            [str(CHROMIUM), *flags, "--remote-debugging-port=0", address],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert come.wait(seconds), "the page never answered"
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
    found: dict[str, Any] = received[0]
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.skipif(not ORT, reason="VISFT_ORT_WEB names no folder dist of npm's onnxruntime-web")
def test_a_picture_that_is_dropped_gets_the_boxes_of_python(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    out = tmp_path / "exported"
    run = finished.runs() / "stage1"
    assert (
        main(["export", str(run), "--out", str(out), "--tasks", "detection", "--web", "--verify", "1"]) == 0
    )
    shutil.copytree(ORT, out / "ort")
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out / "photograph.png")
    found = seen(out, tmp_path / "profile", 0.0, 120)
    expected = visft_ds.load(out).predict(noise, threshold=0).boxes
    assert expected is not None and f"{len(expected)} objects in" in found["state"]
    np.testing.assert_allclose(np.reshape(found["boxes"], (-1, 4)), expected.xyxy, atol=0.01)
    np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-4)
