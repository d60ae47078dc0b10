"""How long the studio takes from its command to its page, beside what importing Gradio takes alone.

python benchmarks/studio.py                     medians of 5, alternating
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from http.cookiejar import CookieJar
from pathlib import Path
from tempfile import TemporaryDirectory

PATIENCE = 120.0  # seconds


def page_seconds(folder: Path) -> float:
    """From the command until the browser would have the page."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "lora_booth.cli", "studio", str(folder), "--port", "0", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = next(found for line in process.stdout if (found := re.search(r"http://\S+", line)))[0]
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        while True:
            try:
                with browser.open(address, timeout=PATIENCE) as answer:
                    page = answer.read()
                break
            except OSError:  # the socket is there before the server answers
                time.sleep(0.02)
        seconds = time.perf_counter() - began
        process.terminate()
    if b"gradio" not in page:
        raise SystemExit("not the page")
    return seconds


def import_seconds() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import gradio"], check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        page_seconds(Path(folder)), import_seconds()  # bytecode is compiled, and files are in memory
        pairs = [(page_seconds(Path(folder)), import_seconds()) for _ in range(arguments.repeats)]
    page, alone = (statistics.median(column) for column in zip(*pairs, strict=True))
    beyond = [one - other for one, other in pairs]
    print("| command to page | import gradio | beyond it: median, smallest, largest |", "|---|---|---|", sep="\n")
    print(f"| {page:.2f} s | {alone:.2f} s | {statistics.median(beyond):.2f}, {min(beyond):.2f}, {max(beyond):.2f} s |")


if __name__ == "__main__":
    main()
