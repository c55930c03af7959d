"""A headless Chromium, driven by its DevTools protocol."""

import asyncio
import base64
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from waiting import wait_until

CHROMIUM = shutil.which("chromium")
_SETTLED = """new Promise(done => {
  let last = '', since = Date.now();
  const look = () => {
    const now = document.body ? document.body.innerText : '';
    if (now !== last) { last = now; since = Date.now(); }
    document.readyState === 'complete' && now && Date.now() - since > 2000
      ? done(now) : setTimeout(look, 100);
  };
  look();
})"""
_BROKEN = """Promise.all([...document.images].map(image => {
  image.loading = 'eager';  // also below the window
  return image.decode().then(() => null, () => image.src.slice(0, 80));
})).then(found => found.filter(Boolean))"""
_TOO_WIDE = "document.documentElement.scrollWidth - window.innerWidth"


@dataclass(frozen=True)
class Page:
    """text: what a person reads. errors: of scripts, and what the console calls an error. broken:
    images that did not load. too_wide: pixels beyond the window's width, or 0."""

    text: str
    errors: list[str]
    broken: list[str]
    too_wide: int


def opened(url: str, folder: Path, width: int = 1280, picture: Path | None = None) -> Page:
    """The page once it stands still. folder: for the browser's profile."""
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "about:blank"]
    command += ["--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}"]
    with (folder / "chromium.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        port = folder / "profile" / "DevToolsActivePort"
        wait_until(lambda: port.exists() and port.read_text().count("\n") == 1, 60)
        return asyncio.run(_looked_at(port.read_text().split()[0], url, width, picture))
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder / "profile", ignore_errors=True)


async def _looked_at(port: str, url: str, width: int, picture: Path | None) -> Page:
    async with aiohttp.ClientSession() as session:
        async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
            target = (await answer.json(content_type=None))["webSocketDebuggerUrl"]
        async with session.ws_connect(target, max_msg_size=1 << 28) as socket:
            errors: list[str] = []
            for domain in ("Page", "Runtime", "Log"):
                await _asked(socket, errors, f"{domain}.enable")
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            await _asked(socket, errors, "Emulation.setDeviceMetricsOverride", **size)
            await _asked(socket, errors, "Page.navigate", url=url)
            text, broken, too_wide = [
                (
                    await _asked(
                        socket,
                        errors,
                        "Runtime.evaluate",
                        expression=expression,
                        awaitPromise=True,
                        returnByValue=True,
                    )
                )["result"]["value"]
                for expression in (_SETTLED, _BROKEN, _TOO_WIDE)
            ]
            if picture is not None:
                shot = await _asked(
                    socket, errors, "Page.captureScreenshot", captureBeyondViewport=True
                )
                picture.write_bytes(base64.b64decode(shot["data"]))
            return Page(text, errors, broken, max(0, too_wide))


async def _asked(socket: Any, errors: list[str], method: str, **parameters: Any) -> dict[str, Any]:
    await socket.send_json({"id": 1, "method": method, "params": parameters})
    async with asyncio.timeout(90):
        while True:
            said = json.loads(await socket.receive_str())
            if said.get("method") == "Runtime.exceptionThrown":
                errors.append(str(said["params"]["exceptionDetails"])[:500])
            entry = said.get("params", {}).get("entry", {})
            if said.get("method") == "Log.entryAdded" and entry.get("level") == "error":
                errors.append(f"{entry['text']} {entry.get('url', '')}"[:500])
            if "id" in said:
                assert "error" not in said, said
                return dict(said["result"])
