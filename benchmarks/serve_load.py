"""Put a service under load on the loopback: throughput, latency, and what clients do wrong.

    python benchmarks/serve_load.py --bars             # three minutes: the bars alone, printed
    python benchmarks/serve_load.py                    # some minutes; writes benchmarks/results/serve.json
    python benchmarks/serve_load.py --soak 30          # and half an hour of everything at once

It starts `starflow serve` itself and ends it with SIGTERM. Every client draws one picture a request and asks again when
it has it: its time ends with the picture's PNG, decoded from the answer's JSON. A direct call is `pipe(prompts,
candidates=1)` in this process, to pictures in memory: PNG, base64 and HTTP are the service's own cost. The bars compare
both in alternation, while the other rests. The load of the machine is printed, as figures beside other work say little
about speed; ratios say more. It needs httpx.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import torch

from starflow import StarFlowPipeline
from starflow.io.files import write_json
from starflow.sampling.cpu.engine import cpu_engine_of
from starflow.serve.service import listen

ROOT = Path(__file__).parents[1]
PROMPTS = [f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("apple", "car", "cat", "tree")]
CLIENTS = (1, 4, 16, 64)


@dataclass(frozen=True)
class Measured:
    """What so many clients got in a closed loop."""

    clients: int
    pictures: int
    pictures_a_second: float
    p50: float
    p95: float
    errors: int


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each number of clients in each round")
    parser.add_argument("--rounds", type=int, default=4, help="of the bars")
    parser.add_argument("--starts", type=int, default=3, help="of the service, from nothing to ready")
    parser.add_argument("--bars", action="store_true", help="measure the bars alone, and write nothing")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES", help="of everything at once, at the end")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/serve.json")
    options = parser.parse_args()
    report: dict[str, Any] = {"threads": torch.get_num_threads(), "load_before": os.getloadavg()}
    pipe = StarFlowPipeline.from_pretrained("glyphs")
    cpu_engine_of(pipe.flow).build()
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    url, ready = f"http://127.0.0.1:{port}", list[float]()
    for _ in range(options.starts - 1):
        process = start(port, url, ready)
        process.terminate()
        process.wait(60)
    process = start(port, url, ready)
    report["seconds_to_ready"] = {"median": statistics.median(ready), "every": ready}
    try:
        report["bars"] = bars(pipe, url, options.rounds, options.seconds)
        if not options.bars:
            report["closed_loop"] = [asdict(closed_loop(url, count, options.seconds)) for count in CLIENTS]
            report["faults"] = asyncio.run(faults(url, process.pid))
        if options.soak:
            report["soak"] = asyncio.run(soak(url, process.pid, 60 * options.soak))
        process.send_signal(signal.SIGTERM)
        report["exit"] = process.wait(60)
    finally:
        process.kill()
    report["load_after"] = os.getloadavg()
    print(json.dumps(report, indent=2))
    if not options.bars:
        write_json(options.output, report)


def start(port: int, url: str, ready: list[float]) -> subprocess.Popen[bytes]:
    """The service in a process of its own, which takes requests; the seconds until then are added to `ready`."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "starflow", "serve", "--port", str(port)], stdout=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: status(f"{url}/ready") == 200, 120)
    except BaseException:
        process.kill()
        raise
    ready.append(time.perf_counter() - began)
    return process


def bars(pipe: StarFlowPipeline, url: str, rounds: int, seconds: float) -> dict[str, Any]:
    """A lone client and sixteen against direct calls in turn, with prompts that come again and with new ones.

    Returns:
        The median of every round's seconds: of a direct call, of a client's request, and of the pictures a second.
    """
    found: dict[str, list[float]] = {}
    for round_ in range(rounds):
        for count in (1, 16):
            for kind, new in (("known prompts", ""), ("new prompts", f"of {count} {round_}")):
                found.setdefault(f"direct {count}, {kind}", []).append(direct(pipe, count, seconds, new))
                measured = closed_loop(url, count, seconds, new)
                assert not measured.errors, measured
                name = f"{count} clients, {kind}"
                found.setdefault(f"{name}: p50", []).append(measured.p50)
                found.setdefault(f"{name}: pictures a second", []).append(measured.pictures_a_second)
    return {"rounds": found, **ratios({name: statistics.median(values) for name, values in found.items()})}


def prompt_of(client: int, asked: int, new: str) -> str:
    """What a client asks for; with `new` words it is of ten tokens and not asked for before, else of five."""
    return PROMPTS[(client + asked) % len(PROMPTS)] + (f" {client} {asked} {new}" if new else "")


def direct(pipe: StarFlowPipeline, count: int, seconds: float, new: str) -> float:
    """The median seconds of calls for so many pictures at once, half as long as clients are measured."""
    prompts = [prompt_of(client, 0, new) for client in range(count)]
    pipe(prompts, candidates=1)
    took, end = list[float](), time.perf_counter() + seconds / 2
    while not took or time.perf_counter() < end:
        began = time.perf_counter()
        pipe(prompts, candidates=1)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def ratios(medians: dict[str, float]) -> dict[str, float]:
    """What the bars are about; see docs/serving.md."""
    found = {}
    for kind in ("known prompts", "new prompts"):
        many, lone = (medians[f"{count} clients, {kind}: pictures a second"] for count in (16, 1))
        found[f"16 clients over one, {kind}"] = many / lone
        found[f"16 clients over a direct call for 16, {kind}"] = many * medians[f"direct 16, {kind}"] / 16
        found[f"seconds of a lone client over a direct call, {kind}"] = (
            medians[f"1 clients, {kind}: p50"] / medians[f"direct 1, {kind}"]
        )
    known = medians["direct 16, known prompts"]
    found["16 clients with new prompts over a direct call for 16 known prompts, which are shorter"] = many * known / 16
    return found


async def draw(http: httpx.AsyncClient, url: str, number: int, **fields: Any) -> int:
    """One picture; its answer's status."""
    asked = {"prompt": PROMPTS[number % len(PROMPTS)], "candidates": 1, "seed": number, **fields}
    return int((await http.post(f"{url}/v1/images/generations", json=asked)).status_code)


def closed_loop(url: str, clients: int, seconds: float, new: str = "") -> Measured:
    """Clients that draw one picture after another, each in a thread and under a name of its own.

    They use the standard library's client, which takes a tenth of httpx's time, so that it is the service that is
    measured. With `new` words every prompt is one that was not asked for before.
    """
    end, took, errors = time.perf_counter() + seconds, list[float](), list[int]()
    host = url.removeprefix("http://")

    def client(number: int) -> None:
        http, asked = HTTPConnection(host, timeout=600), 0
        while not asked or time.perf_counter() < end:
            began = time.perf_counter()
            body = {"prompt": prompt_of(number, asked, new), "candidates": 1, "seed": asked, "user": f"client {number}"}
            headers = {"Content-Type": "application/json"}
            http.request("POST", "/v1/images/generations", json.dumps(body), headers)
            answer = http.getresponse()
            content = answer.read()
            if answer.status != 200 or not base64.b64decode(json.loads(content)["data"][0]["b64_json"]):
                errors.append(answer.status)
            took.append(time.perf_counter() - began)
            asked += 1

    began = time.perf_counter()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    spent = time.perf_counter() - began
    p95 = statistics.quantiles(took, n=20)[-1] if len(took) > 1 else took[0]
    return Measured(clients, len(took), len(took) / spent, statistics.median(took), p95, len(errors))


async def faults(url: str, pid: int) -> dict[str, Any]:
    """Clients that leave, read slowly, ask for too much at once: the others are served, and all ends at zero."""
    found: dict[str, Any] = {"resident_before": resident(pid)}
    for round_ in range(3):
        await leavers(url, 100)
        async with httpx.AsyncClient(timeout=300) as http:
            codes = await asyncio.gather(*(draw(http, url, number) for number in range(20)))
        found[f"after 100 left, of 20 served (round {round_})"] = codes.count(200)
        found[f"resident after round {round_}"] = resident(pid)
    readers = [asyncio.create_task(slow_reader(url)) for _ in range(8)]
    async with httpx.AsyncClient(timeout=300) as http:
        codes = await asyncio.gather(*(draw(http, url, number) for number in range(20)))
        found["beside 8 slow readers, of 20 served"] = codes.count(200)
        found["events of slow readers"] = [await reader for reader in readers]
        codes = await asyncio.gather(*(draw(http, url, number, n=8, user=str(number)) for number in range(48)))
    found["overrun"] = {str(code): codes.count(code) for code in sorted(set(codes))}
    wait_until(lambda: at_rest(url), 120)
    found["metrics back to zero"] = True
    return found


async def leavers(url: str, count: int) -> None:
    """Clients that hang up after 0.2 s."""

    async def leave(number: int) -> None:
        async with httpx.AsyncClient(timeout=0.2) as http:
            try:
                await draw(http, url, number, n=2, user=str(number))
            except httpx.TimeoutException:
                return

    await asyncio.gather(*(leave(number) for number in range(count)))


async def slow_reader(url: str) -> int:
    """A stream that is read in small pieces with pauses; the events that came."""
    asked = {"prompt": "a red apple", "n": 4, "candidates": 1, "stream": True, "partial_images": 3}
    text = b""
    async with (
        httpx.AsyncClient(timeout=300) as http,
        http.stream("POST", f"{url}/v1/images/generations", json=asked) as answer,
    ):
        async for piece in answer.aiter_bytes(4096):
            text += piece
            await asyncio.sleep(0.02)
    return text.count(b"event: ")


async def soak(url: str, pid: int, seconds: float) -> dict[str, Any]:
    """Everything at once for long; the resident memory at ten times."""
    end, memory, rounds = time.perf_counter() + seconds, [resident(pid)], 0
    while time.perf_counter() < end:
        await asyncio.gather(
            asyncio.to_thread(closed_loop, url, 8, seconds / 10 / 2), leavers(url, 20), slow_reader(url)
        )
        rounds += 1
        if time.perf_counter() > end - seconds + len(memory) * seconds / 10:
            memory.append(resident(pid))
    wait_until(lambda: at_rest(url), 120)
    return {"rounds": rounds, "resident": memory}


def status(url: str) -> int:
    """The status that an address answers; 0 where nobody does."""
    try:
        return int(httpx.get(url).status_code)
    except httpx.HTTPError:
        return 0


def at_rest(url: str) -> bool:
    """Whether nothing waits and nothing is at work."""
    text = httpx.get(f"{url}/metrics").text
    return "starflow_queue_depth 0.0" in text and "starflow_at_work 0.0" in text


def resident(pid: int) -> int:
    """MiB that a process has in memory; 0 where that cannot be read."""
    file = Path(f"/proc/{pid}/status")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS")), 0)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Raises TimeoutError: it did not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"it did not come true in {seconds:g} s")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
